"""Promises about weights saved and loaded."""
