"""How good a model is: loss and perplexity of a text, tasks of lm-eval, and whether it is GPT-2 to the last digit."""

from pathlib import Path

METRIC = str(Path(__file__).with_name("perplexity_metric.py"))
"""What `evaluate.load` takes to load perplexity as a metric, without a network."""
