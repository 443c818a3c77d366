"""Promises about the loss and training steps."""
