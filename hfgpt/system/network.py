"""How long this process waits for the Hub, and for the name of its machine."""

import socket
from functools import cache
from urllib.request import getproxies

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import (
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._http import default_client_factory

ANSWER_SECONDS = 60.0
"""How long the Hub may take to answer; huggingface_hub 2.4 itself would wait forever."""


@cache
def limit_waiting() -> None:
    """Let this process wait for no answer longer than `ANSWER_SECONDS`, and not at all where no names are resolved.

    It is done once: it closes the client that other threads may be using.
    """
    set_client_factory(make_client)


def make_client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(ANSWER_SECONDS, connect=10.0)
    client.event_hooks["request"].insert(0, check_name_service)
    return client


def check_name_service(request: httpx2.Request) -> None:
    """Take a machine without name service for offline: huggingface_hub (2.4) would try for 23 s, file by file.

    Raises:
        OfflineModeIsEnabled: what huggingface_hub raises when HF_HUB_OFFLINE is set; what is cached can be used.
    """
    if getproxies():  # they resolve the names
        return
    try:
        resolve(request.url.host)
    except OSError as error:
        raise OfflineModeIsEnabled(f"cannot reach {request.url.host}: no such name is known. Is it online?") from error


@cache
def resolve(host: str) -> None:
    """Look a name up, once.

    Raises:
        OSError: nobody knows it; that is asked again.
    """
    socket.getaddrinfo(host, None)
