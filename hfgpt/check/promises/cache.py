"""Promises about keys and values that are kept."""
