"""Settings of a rank before the rendezvous, the rendezvous, and properties of the mesh."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import bench
import generate
import program
from dsv3 import llm
from dsv3.config import ParallelConfig
from dsv3.distributed import mesh, rendezvous
from dsv3.distributed import store as store_module
from dsv3.distributed.mesh import Mesh, join_world
from dsv3.distributed.rendezvous import Hello, Peer, Roster
from dsv3.distributed.stand_in import StandIn
from dsv3.distributed.store import Backoff
from dsv3.distributed.watchdog import Watchdog
from dsv3.errors import ConfigError, RankError
from tests.programs import free_port


def test_impossible_settings_are_refused_before_the_rendezvous() -> None:
    with pytest.raises(ConfigError, match="device=tpu is unknown"), join_world("tpu"):
        pass
    with (
        pytest.raises(ConfigError, match="rank_timeout=1 must be at least 3 seconds"),
        join_world("cpu", rank_timeout=1),
    ):
        pass
    for timeout in (float("nan"), float("inf")):
        with (
            pytest.raises(ConfigError, match=r"rank_timeout=(nan|inf) must be"),
            join_world("cpu", rank_timeout=timeout),
        ):
            pass


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("RANK", "x", "RANK=x in the environment must be a whole number"),
        ("WORLD_SIZE", "", "WORLD_SIZE= in the environment must be a whole number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0 in the environment must be a whole number from 1"),
        ("RANK", "2", "RANK=2 in the environment must be below WORLD_SIZE=2"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set; start with torchrun"),
        ("MASTER_PORT", "port", "MASTER_PORT=port in the environment must be a whole number"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999 in the environment must be"),
    ],
)
def test_an_invalid_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for variable, text in (usual | {name: value}).items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setattr(mesh, "_REPORT_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "EXTRA_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=reason), join_world("cpu"):
        pass


def hello(rank: int, failure: str = "", **settings: str) -> Hello:
    return Hello(Peer(rank, "node", "boot", 1, ""), 4, settings, failure)


def call(store: dist.Store, mine: Hello, seconds: float = 20.0) -> Roster:
    backoff = Backoff(mine.peer.rank, 4, seconds)
    if mine.peer.rank == 0:
        return rendezvous._RosterServer(store, mine, backoff).roster()
    return rendezvous._join_roster(store, mine, backoff)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 0.2)
    monkeypatch.setattr(store_module, "EXTRA_SECONDS", 2.0)
    store = dist.HashStore()
    store.set(rendezvous._ADDRESS, "1 old")  # of an earlier attempt; nothing listens there
    return store


def address(store: dist.Store) -> tuple[int, str]:
    """Return the port and the token of rank 0, after waiting for it."""
    while store.get(rendezvous._ADDRESS) == b"1 old":
        time.sleep(0.01)
    port, token = store.get(rendezvous._ADDRESS).decode().split()
    return int(port), token


def test_rendezvous_in_any_order_and_with_strangers(store: dist.Store) -> None:
    """Strangers send nothing, another protocol, or a hello without the token of this job."""
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(call, store, hello(rank)) for rank in (3, 0)]
        port, _ = address(store)
        messages = (b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 10_000 + b"\n", hello(2).line("other"))
        strangers = [socket.create_connection(("localhost", port)) for _ in messages]
        for stranger, message in zip(strangers, messages, strict=True):
            stranger.sendall(message)
        time.sleep(0.5)
        calls += [pool.submit(call, store, hello(rank)) for rank in (2, 1)]
        rosters = [done.result() for done in calls]
        for stranger in strangers:
            stranger.close()
    assert [[peer.rank for peer in roster.peers] for roster in rosters] == [[0, 1, 2, 3]] * 4
    assert [sorted(roster.links) for roster in rosters] == [[0], [1, 2, 3], [0], [0]]


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Return a port at which nothing listens, where the ranks are to meet without torchrun."""
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(store_module, "EXTRA_SECONDS", 60.0)
    yield port
    store_module._host_store.cache_clear()


def gather(rank: int, failure: str = "") -> Roster:
    return rendezvous.gather_roster(Hello(Peer(rank, "node", "boot", 1, ""), 2, {}, failure), 60.0)


def test_a_rank_connects_again_if_its_store_ends(port: int) -> None:
    earlier = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(gather, 1)
        time.sleep(1.0)
        del earlier
        first = pool.submit(gather, 0)
        assert [len(roster.result().peers) for roster in (first, second)] == [2, 2]


def test_the_store_of_rank_0_outlives_the_rendezvous(port: int) -> None:
    """The other ranks of a script that makes several LLMs may still be connected to it."""
    with ThreadPoolExecutor() as pool:
        refused = [pool.submit(gather, 0, "wrong"), pool.submit(gather, 1, "wrong")]
        assert [type(roster.exception()) for roster in refused] == [ConfigError] * 2
        client = dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
        rosters = [pool.submit(gather, rank) for rank in (0, 1)]
        assert [len(roster.result().peers) for roster in rosters] == [2, 2]
    assert client.check([rendezvous._ADDRESS])


def test_a_rank_that_dies_during_rendezvous_is_named(store: dist.Store) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, store, hello(0))
        port, token = address(store)
        with socket.create_connection(("localhost", port)) as link:
            link.sendall(hello(2).line(token))
            time.sleep(0.3)
            assert not first.done()
        with pytest.raises(RankError, match=r"^rank 2 on node has died during rendezvous$"):
            first.result(10)


def test_settings_that_differ_are_named_on_all_ranks(store: dist.Store) -> None:
    with ThreadPoolExecutor() as pool:
        settings = [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}]
        calls = [pool.submit(call, store, hello(rank, **s)) for rank, s in enumerate(settings)]
        raised = [done.exception(20) for done in calls]
    assert {type(error) for error in raised} == {ConfigError}
    (text,) = {str(error) for error in raised}
    assert re.search("b is 2 on rank 0 on node and (3|not known) on rank [23] on node$", text)
    errors = [error for error in raised if isinstance(error, ConfigError)]
    assert [error.reported_by_rank0 for error in errors] == [
        False,
        True,
        True,
        True,
    ]


def test_the_reason_is_reported_though_a_rank_is_missing(store: dist.Store) -> None:
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(call, store, hello(rank, a=str(rank))) for rank in (0, 1)]
        raised = [done.exception(20) for done in calls]
    assert all("a is 0 on rank 0 on node and 1 on rank 1" in str(error) for error in raised)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_start_reports_to_all_others(store: dist.Store, rank: int) -> None:
    reasons = {rank: "--odd: unrecognized arguments"}
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(call, store, hello(i, reasons.get(i, ""))) for i in (0, 1, 3)]
        raised = [done.exception(20) for done in calls]
    assert {type(error) for error in raised} == {ConfigError}
    name = "" if rank == 0 else "rank 1 on node: "
    assert {str(error) for error in raised} == {f"{name}--odd: unrecognized arguments"}
    errors = [error for error in raised if isinstance(error, ConfigError)]
    assert [error.reported_by_rank0 for error in errors] == [
        False,
        True,
        True,
    ]


def test_a_second_rank_0_is_refused(store: dist.Store) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, store, hello(0))
        address(store)
        second = pool.submit(call, store, hello(0))
        raised = [first.exception(20), second.exception(20)]
    reason = "rank 0 on node (process 1) cannot join: the process 1 is this rank already"
    assert [str(error) for error in raised] == [reason] * 2


@pytest.mark.parametrize(
    ("rank", "words"), [(0, "is used by another program"), (1, "no answer at localhost")]
)
@pytest.mark.slow
def test_a_server_that_is_no_store_ends_the_process(rank: int, words: str) -> None:
    """The server accepts connections and sends nothing; torch's thread would wait for ever."""
    code = (
        "from dsv3.distributed import rendezvous\n"
        "rendezvous.EXTRA_SECONDS = 0.5\n"
        f"me = rendezvous.Peer({rank}, 'node', 'boot', 1, '')\n"
        "rendezvous.gather_roster(rendezvous.Hello(me, 4), 0.5)\n"
    )
    with socket.create_server(("localhost", 0)) as server:
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | address,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 3
    assert words in done.stderr


@pytest.mark.parametrize(
    ("rank", "reason"),
    [(7, "RANK must be below WORLD_SIZE=4"), (1, "the process 1 is this rank already")],
)
def test_an_invalid_or_duplicate_rank_is_refused(store: dist.Store, rank: int, reason: str) -> None:
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(call, store, hello(0))]
        address(store)
        calls.append(pool.submit(call, store, hello(1)))
        time.sleep(0.3)
        calls.append(pool.submit(call, store, hello(rank)))
        raised = [done.exception(20) for done in calls]
    assert all(f"rank {rank} on node (process 1) cannot join: {reason}" in str(e) for e in raised)


def test_missing_ranks_are_named_after_the_timeout(store: dist.Store) -> None:
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(call, store, hello(rank), 1.0 + rank) for rank in (0, 2)]
        raised = [done.exception(20) for done in calls]
    assert {type(error) for error in raised} == {RankError}
    assert all("for 2 of 4 ranks (1, 3)" in str(error) for error in raised)


def test_ranks_are_named_by_their_hosts() -> None:
    peers = [Peer(rank, f"node{rank // 2}", "boot", 1, "") for rank in range(4)]
    assert (
        Watchdog(0, Roster(peers, dist.HashStore(), {})).name_of(1, 2)
        == "rank 1 on node0, rank 2 on node1"
    )
    assert Watchdog().name_of(0) == "rank 0"


def test_steps_are_capturable_if_all_groups_use_nccl() -> None:
    """Step plans are sent over Gloo, outside of graphs; with Gloo only, nothing is captured."""
    layout, cuda = ParallelConfig(world_size=4, rank=0, dp=2), torch.device("cuda")
    nccl, gloo = StandIn(0, 4), StandIn(0, 4)
    gloo.is_capturable = False
    assert Mesh(layout, cuda, nccl, nccl, gloo, 4, dp=nccl).is_capturable
    assert not Mesh(layout, cuda, nccl, nccl, gloo, 4, dp=gloo).is_capturable
    assert not Mesh(layout, cuda, nccl, nccl, gloo, 4, dp=nccl, hosts=gloo).is_capturable
    assert not Mesh(layout, cuda, gloo, gloo, gloo, 4).is_capturable
    assert not Mesh(layout, torch.device("cpu"), nccl, nccl, nccl, 4).is_capturable


@pytest.mark.parametrize("is_asked", [False, True])
def test_one_shot_sums_are_asked_for(is_asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library and the programs pass the setting on when they join the world."""

    def join(*_: object, one_shot: bool, **__: object) -> None:
        raise RuntimeError(f"{one_shot=}")

    for module in (llm, program):
        monkeypatch.setattr(module, "join_world", join)
    for module in (generate, bench):
        monkeypatch.setattr(module, "set_up_logging", lambda *_: None)
    flags = ["--one-shot"] if is_asked else []
    calls: tuple[tuple[list[str], Callable[[], object]], ...] = (
        ([], lambda: llm.LLM(one_shot=is_asked)),
        (["--prompt", "Hi", *flags], generate.main),
        (["throughput", *flags], bench.main),
        (["plan", "--measure", *flags], bench.main),
    )
    for arguments, call in calls:
        monkeypatch.setattr("sys.argv", ["program", *arguments])
        with pytest.raises(RuntimeError, match=f"one_shot={is_asked}"):
            call()
