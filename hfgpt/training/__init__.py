"""A run from its recipe to its results; in reading order: train, run, loop and trainer, control, evaluate, finish."""
