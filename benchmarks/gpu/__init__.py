"""What `benchmarks/gpu_check.sh` runs on a machine with one NVIDIA GPU; every module rehearses on a CPU."""
