"""How long this process waits for the Hub to answer, and for its name to be resolved."""

import socket
from functools import cache
from urllib.request import getproxies

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory

ANSWER_SECONDS = 60.0
"""How long the Hub may take to answer; huggingface_hub 2.4 itself would wait forever."""


@cache
def limit_waiting() -> None:
    """Let requests to the Hub fail after `ANSWER_SECONDS`, and at once where its name is not resolved.

    Done once per process: it closes the HTTP client, which other threads may be using.
    """
    set_client_factory(make_client)


def make_client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(ANSWER_SECONDS, connect=10.0)
    client.event_hooks["request"].insert(0, check_name_service)
    return client


def check_name_service(request: httpx2.Request) -> None:
    """Treat a machine without name service as offline: huggingface_hub (2.4) would retry for 23 s, file by file.

    Raises:
        OfflineModeIsEnabled: as huggingface_hub does when HF_HUB_OFFLINE is set; it then takes what is cached.
    """
    if getproxies():  # they resolve the names
        return
    try:
        resolve(request.url.host)
    except OSError as error:
        raise OfflineModeIsEnabled(f"cannot reach {request.url.host}: no such name is known. Is it online?") from error


@cache
def resolve(host: str) -> None:
    """Look a name up, once; a failure is not remembered.

    Raises:
        OSError: the name is not known.
    """
    socket.getaddrinfo(host, None)
