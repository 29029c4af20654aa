"""Messages between ranks over the connections of the rendezvous: one JSON list per line."""

import json
import selectors
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any


class PeerLinks:
    """This rank's open connections: to every other rank on rank 0, to rank 0 on the others."""

    def __init__(self, links: Mapping[int, socket.socket]) -> None:
        self._links = dict(links)
        self._unread = dict.fromkeys(links, b"")

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._links))

    def register(self, selector: selectors.BaseSelector, timeout: float) -> None:
        """Add all connections to a selector; sending and receiving block for `timeout` seconds."""
        for link in self._links.values():
            # Otherwise a rank's last message waits until its heartbeat is acknowledged, and is lost
            # if the rank ends before.
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.settimeout(timeout)
            selector.register(link, selectors.EVENT_READ)

    def descriptor(self, rank: int) -> int:
        """Return the file descriptor of a rank's connection."""
        return self._links[rank].fileno()

    def send(self, kind: str, value: Any) -> None:
        """Send a message to all connected ranks."""
        data = json.dumps([kind, value]).encode() + b"\n"
        for link in list(self._links.values()):
            with suppress(OSError):  # detected when receiving
                link.sendall(data)

    def receive(self, rank: int) -> tuple[list[tuple[str, Any]], bool]:
        """Return a rank's new messages (kind, value), and False if its connection is closed."""
        try:
            data = self._links[rank].recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
        messages = []
        for line in lines:
            kind, value = json.loads(line)
            messages.append((kind, value))
        return messages, bool(data)

    def drop(self, rank: int, selector: selectors.BaseSelector) -> None:
        """Remove a closed connection from this object and the selector."""
        selector.unregister(self._links.pop(rank))
