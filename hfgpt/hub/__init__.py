"""To the Hub and back: push in one commit, of what is on the allowlist; pull with every file's checksum verified."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "PushByList":  # imports huggingface_hub, which `hfgpt --help` does not need
        from hfgpt.hub.trainer_mixin import PushByList

        return PushByList
    raise AttributeError(f"module 'hfgpt.hub' has no attribute {name!r}")
