"""What `fastgrpo bench` runs: this package, its peers and the machine's own limits, interleaved in one process."""
