"""The client's side of the test Hub: everything in a process that knows where the Hub is, led there and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers.utils.hub
from hub_server import TestHub
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import hfgpt.hub.retry

TOKEN = "hf_CANARYtheTokenThatMustBeNowhere00000"
OTHER_TOKEN = "hf_somebodyElsesTokenForTheTestHub0000"
TOKENS = {TOKEN: ["anna", "guild"], OTHER_TOKEN: ["boris"]}


@contextmanager
def connected(home: Path, **options: object) -> Iterator[TestHub]:
    """A test Hub, and this process as its client.

    huggingface_hub reads its environment when it is imported, so what it has read is put right here. The waits of hfgpt
    are short; those of huggingface_hub itself, from 1 s to 8 s, are as they are.

    Args:
        home: in place of ~/.cache/huggingface.
        **options: of `TestHub`.
    """
    with pytest.MonkeyPatch.context() as patch, TestHub(TOKENS, **options) as hub:
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DOWNLOAD_TIMEOUT": 1,
            "HF_HUB_ETAG_TIMEOUT": 1,
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # it keeps the address it was made with
        patch.setattr(hfgpt.hub.retry, "FIRST_WAIT_SECONDS", 0.01)
        patch.setattr(hfgpt.system.network, "ANSWER_SECONDS", 5.0)
        start_anew()
        yield hub
    start_anew()


def start_anew() -> None:
    hfgpt.system.network.limit_waiting.cache_clear()
    close_session()


def environment(hub: TestHub, home: Path) -> dict[str, str]:
    """The same for a process of its own."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    }
