"""Several processes, signals, and what happens when one dies."""
