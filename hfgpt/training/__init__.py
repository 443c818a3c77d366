"""A run from its recipe to its results: train.py is its story, loop.py the steps, control.py what is done around them."""
