"""What a rank decides by itself before it meets the others."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist

from dsv3.config import ParallelConfig
from dsv3.errors import ConfigError, RankError
from dsv3.parallel import meeting
from dsv3.parallel.collectives import StandIn
from dsv3.parallel.meeting import Meeting, Peer
from dsv3.parallel.mesh import Mesh, _num_threads, join_world
from dsv3.parallel.watch import Watch


def test_threads_are_the_users_or_a_share_of_the_usable_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _num_threads(4) == 5
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _num_threads(4) == 3
    assert _num_threads(24) == 1


def test_impossible_settings_are_refused_before_anybody_is_met() -> None:
    with pytest.raises(ConfigError, match="--device=tpu is unknown"), join_world("tpu"):
        pass
    with (
        pytest.raises(ConfigError, match="--rank-timeout=1 must be at least 3 seconds"),
        join_world("cpu", rank_timeout=1),
    ):
        pass


def call(rank: int, store: dist.Store) -> Meeting:
    peer = Peer(rank, "node", "boot", 1, "")
    patience = meeting._Patience(4)
    if rank == 0:
        return meeting._invite(store, peer, 4, patience)
    return meeting._join(store, peer, patience)


def test_ranks_meet_in_any_order_and_past_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(meeting, "_ANSWER_SECONDS", 0.2)
    store = dist.HashStore()
    store.set(meeting._PORT, "1")  # of an attempt before, where nobody answers
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(call, 3, store), pool.submit(call, 0, store)]
        while store.get(meeting._PORT) == b"1":
            time.sleep(0.01)
        with socket.create_connection(("localhost", int(store.get(meeting._PORT)))):
            time.sleep(0.5)
        calls += [pool.submit(call, rank, store) for rank in (2, 1)]
        met = [done.result() for done in calls]
    assert [[peer.rank for peer in each.peers] for each in met] == [[0, 1, 2, 3]] * 4
    assert [sorted(each.links) for each in met] == [[0], [1, 2, 3], [0], [0]]


def test_who_dies_while_others_are_waited_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, 0, store)
        while not store.check([meeting._PORT]):
            time.sleep(0.01)
        with socket.create_connection(("localhost", int(store.get(meeting._PORT)))) as link:
            link.sendall(json.dumps(asdict(Peer(2, "node", "boot", 1, ""))).encode() + b"\n")
            time.sleep(0.3)
            assert not first.done()
        with pytest.raises(RankError, match=r"^rank 2 on node has died during rendezvous$"):
            first.result(10)


def test_ranks_are_named_by_their_hosts() -> None:
    peers = [Peer(rank, f"node{rank // 2}", "boot", 1, "") for rank in range(4)]
    assert (
        Watch(0, Meeting(peers, dist.HashStore(), {})).name_of(1, 2)
        == "rank 1 on node0, rank 2 on node1"
    )
    assert Watch().name_of(0) == "rank 0"


def test_graphs_hold_steps_of_all_groups_that_exchange_over_nccl() -> None:
    """Plans travel beside them, over Gloo; where that is all there is, nothing can be captured."""
    layout, cuda = ParallelConfig(world_size=4, rank=0, dp=2), torch.device("cuda")
    nccl, gloo = StandIn(0, 4), StandIn(0, 4)
    gloo.is_capturable = False
    assert Mesh(layout, cuda, nccl, nccl, gloo, 4, dp=nccl).is_capturable
    assert not Mesh(layout, cuda, nccl, nccl, gloo, 4, dp=gloo).is_capturable
    assert not Mesh(layout, cuda, nccl, nccl, gloo, 4, dp=nccl, hosts=gloo).is_capturable
    assert not Mesh(layout, cuda, gloo, gloo, gloo, 4).is_capturable
    assert not Mesh(layout, torch.device("cpu"), nccl, nccl, nccl, 4).is_capturable
