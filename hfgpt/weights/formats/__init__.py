"""One file for each format of weights: its table of names, its reader and writer, its own forward pass."""
