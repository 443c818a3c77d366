"""A recipe: its options (schema.py), what they must be (validation.py), and how it is read (loading.py)."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_config":  # imports OmegaConf and transformers, which the names of recipes do not need
        from hfgpt.config.loading import load_config

        return load_config
    raise AttributeError(f"module 'hfgpt.config' has no attribute {name!r}")
