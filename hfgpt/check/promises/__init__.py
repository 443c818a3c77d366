"""The promises, a file for each kind; to import this package registers them."""

from hfgpt.check.promises import (
    adapters,
    attention,
    cache,
    export,
    generation,
    loading,
    loss,
    masks,
    processes,
    tools,
    trainer,
    training,
)

__all__ = [
    "adapters",
    "attention",
    "cache",
    "export",
    "generation",
    "loading",
    "loss",
    "masks",
    "processes",
    "tools",
    "trainer",
    "training",
]
