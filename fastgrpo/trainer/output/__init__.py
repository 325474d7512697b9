"""All that a run shows and writes: terminal, metrics, report, closing words, and its folder."""
