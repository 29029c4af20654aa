"""Messages between ranks."""

import selectors
import socket
import time

from dsv3.distributed.peer_links import PeerLinks


def linked() -> tuple[PeerLinks, PeerLinks, socket.socket]:
    """Return both ends of a connection, and the first one's socket."""
    with socket.create_server(("localhost", 0)) as server:
        first = socket.create_connection(server.getsockname())
        second = server.accept()[0]
    ends = (PeerLinks({1: first}), PeerLinks({0: second}))
    for end in ends:
        with selectors.DefaultSelector() as selector:
            end.register(selector, 5.0)
    return *ends, first


def test_the_last_message_of_a_rank_that_ends_arrives() -> None:
    """It follows a heartbeat, and a heartbeat of the other rank is not read: TCP resets then."""
    rank0, rank1, link = linked()
    for _ in range(3):
        rank0.send("heartbeat", 1)
        rank1.receive(0)
        rank1.send("heartbeat", 1)
        rank0.receive(1)
    time.sleep(0.1)
    rank1.send("heartbeat", 2)
    rank0.send("heartbeat", 2)
    rank0.send("end", "the reason")
    link.close()
    received = []
    is_open = True
    while is_open:
        messages, is_open = rank1.receive(0)
        received += messages
    assert received == [("heartbeat", 2), ("end", "the reason")]
