"""Promises about what other tools do with a model."""
