"""Promises about what `generate` writes."""
