"""The parts of the ops that start at hidden states: chunks of rows, matrix products, row compaction, both passes."""
