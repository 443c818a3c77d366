"""The promises, a file for each group; to import this package registers them."""

from hfgpt.check.promises import attention, cache, generation, loading, masks, tools, training

__all__ = ["attention", "cache", "generation", "loading", "masks", "tools", "training"]
