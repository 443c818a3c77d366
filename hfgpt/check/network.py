"""The network watched: whether anything tries to reach another machine."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOCAL = ("localhost", "127.0.0.1", "::1")


@contextmanager
def watch_network() -> Iterator[list[str]]:
    """Refuse connections to other machines, and write down to where they were tried: a list that grows."""
    asked_for: list[str] = []
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def refuse(host: Any) -> None:
        if host not in LOCAL:
            asked_for.append(str(host))
            raise OSError(f"a connection to {host} was tried while the network is being watched")

    def watched_connect(self: socket.socket, address: Any) -> Any:
        if self.family != getattr(socket, "AF_UNIX", None):
            refuse(address[0])
        return connect(self, address)

    def watched_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return getaddrinfo(host, *args, **kwargs)

    socket.socket.connect, socket.getaddrinfo = watched_connect, watched_getaddrinfo  # type: ignore[method-assign, assignment]
    try:
        yield asked_for
    finally:
        socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo  # type: ignore[method-assign]
