"""Promises about attention implementations, dtypes and dropout."""
