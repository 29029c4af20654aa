"""Exchanges through shared memory, with threads as ranks, and failures to make a segment."""

import mmap
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.distributed import shared_segment
from dsv3.distributed.shared_memory import MemoryGroup
from dsv3.distributed.shared_rounds import Rounds
from dsv3.distributed.shared_segment import (
    BUFFER_BYTES,
    SharedSegment,
    create_file,
    handle_of,
    open_file,
)
from dsv3.errors import RankError
from dsv3_kernels.testing import assert_bitwise_equal

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8)
SUMMED = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


@contextmanager
def file_of(size: int) -> Iterator[int]:
    descriptor = create_file(size)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def make_groups(size: int, is_crowded: bool = True) -> list[MemoryGroup]:
    """Return the groups of all ranks; every rank maps the memory by itself."""
    with file_of(size) as descriptor:
        segments = [SharedSegment(descriptor, rank, size) for rank in range(size)]
    ranks = list(range(10, 10 + size))
    return [
        MemoryGroup(Rounds(segment, ranks, rank, is_crowded))
        for rank, segment in enumerate(segments)
    ]


def on_all(groups: list[MemoryGroup], run: Callable[[MemoryGroup], Any]) -> list[Any]:
    """Run a function on all ranks, each in a thread; return the results in rank order."""
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(run, groups))


def drawn(seed: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return (torch.randn(shape, generator=generator) * 9).abs().to(dtype)


def in_order(parts: list[Tensor]) -> Tensor:
    """Return the sum of the ranks' tensors in rank order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def check(name: str, got: list[Tensor], want: list[Tensor]) -> None:
    for rank, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (name, rank, a.shape, b.shape)
        assert_bitwise_equal(f"{name} on rank {rank}", as_bytes(a), as_bytes(b))


def check_even(groups: list[MemoryGroup], operation: str, seed: int, n: int, dtype: Any) -> None:
    """Compare an exchange of [size, n] with its meaning."""
    size = len(groups)
    x = [drawn(seed, rank, (size, n), dtype) for rank in range(size)]
    got = on_all(groups, lambda group: getattr(group, operation)(x[group.rank].clone()))
    if operation == "all_reduce":
        want = [in_order(x)] * size
    elif operation == "reduce_scatter":
        want = [in_order(x)[rank : rank + 1] for rank in range(size)]
    elif operation == "all_gather":
        want = [torch.stack(x)] * size
    elif operation == "all_to_all":
        want = [torch.stack([part[rank] for part in x]) for rank in range(size)]
    else:
        want = [x[0]] * size
    check(f"{operation} of {n} {dtype}", got, want)


def check_uneven(
    groups: list[MemoryGroup], counts: list[list[int]], seed: int, width: int, dtype: Any
) -> None:
    """Exchange `counts[i][j]` rows from rank i to rank j, around other exchanges."""
    size = len(groups)
    x = [drawn(seed, rank, (sum(counts[rank]), width), dtype) for rank in range(size)]

    def run(group: MemoryGroup) -> tuple[Tensor, Tensor]:
        receive = [row[group.rank] for row in counts]
        send = counts[group.rank]
        first = group.start_exchange(x[group.rank], send, receive, "first")
        second = group.start_exchange(x[group.rank], send, receive, "second")
        numbers = group.all_gather(torch.tensor([group.rank])).flatten().tolist()
        assert numbers == list(range(size))
        got = second.wait(), first.wait()
        assert first.wait() is got[1]
        return got

    want = [
        torch.cat([x[sender].split(counts[sender])[rank] for sender in range(size)])
        for rank in range(size)
    ]
    for got in zip(*on_all(groups, run), strict=True):
        check(f"uneven {counts} {dtype}", list(got), want)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_operation_and_dtype(size: int) -> None:
    """Elements of zero, one and several rounds; sums that are split over the ranks and not."""
    groups = make_groups(size)
    peer_bytes = BUFFER_BYTES // size
    for seed, num_bytes in enumerate((0, 24, peer_bytes, peer_bytes + 8, 3 * peer_bytes)):
        for dtype in DTYPES:
            n = num_bytes // dtype.itemsize
            for operation in ("all_gather", "all_to_all", "broadcast"):
                check_even(groups, operation, seed, n, dtype)
            if dtype in SUMMED:
                check_even(groups, "all_reduce", seed, n, dtype)
                check_even(groups, "reduce_scatter", seed, n, dtype)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_uneven_exchanges(size: int) -> None:
    """No rows at all, none for some ranks, and more for one than fit into a round."""
    groups = make_groups(size)
    rng = random.Random(size)
    many = 2 * BUFFER_BYTES // size // 64
    for most in (0, 1, 5):
        counts = [[rng.randrange(most + 1) for _ in range(size)] for _ in range(size)]
        for dtype in DTYPES:
            check_uneven(groups, counts, most, 16, dtype)
    counts[0][size - 1], counts[size - 1] = many, [0] * size
    check_uneven(groups, counts, 7, 16, torch.float32)


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (3, 1), (4, 2)])
def test_random_exchanges_in_random_order(size: int, seed: int) -> None:
    """Two groups take turns; ranks are fast and slow, and sleep or spin."""
    rng = random.Random(seed)
    pair = [make_groups(size, is_crowded) for is_crowded in (True, False)]
    calls = []
    for _ in range(150):
        operation = rng.choice(["all_reduce", "all_gather", "all_to_all", "broadcast", "exchange"])
        n = rng.choice([0, 1, 3, 100, rng.randrange(BUFFER_BYTES // 4 * 3)])
        counts = [[rng.choice([0, 1, 7, n // 9]) for _ in range(size)] for _ in range(size)]
        calls.append((rng.randrange(2), operation, n, counts, rng.random() < 0.3))

    def run(rank: int) -> list[float]:
        sums, pending = [], []
        for number, (which, operation, n, counts, is_time_to_wait) in enumerate(calls):
            group = pair[which][rank]
            if operation == "exchange":
                x = torch.full((sum(counts[rank]), 3), 1.0 + number + rank)
                receive = [row[rank] for row in counts]
                pending.append(group.start_exchange(x, counts[rank], receive, "exchange"))
            else:
                x = torch.full((size, n), 1.0 + number + rank)
                sums.append(float(getattr(group, operation)(x).sum()))
            if is_time_to_wait:
                sums += [float(each.wait().sum()) for each in pending]
                pending = []
        sums += [float(each.wait().sum()) for each in pending]
        return sums

    def wanted(rank: int, number: int) -> float:
        _, operation, n, counts, _ = calls[number]
        value = [1.0 + number + other for other in range(size)]
        if operation == "exchange":
            return sum(3 * counts[other][rank] * value[other] for other in range(size))
        if operation == "broadcast":
            return size * n * value[0]
        return sum(value) * n * (1 if operation == "all_to_all" else size)

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(run, range(size)))
    for rank in range(size):
        want = [wanted(rank, number) for number in range(len(calls))]
        assert sorted(found[rank]) == pytest.approx(sorted(want), rel=1e-6)


def test_views_are_exchanged_in_their_own_order() -> None:
    groups = make_groups(2)
    x = [drawn(0, rank, (5, 4), torch.float32).T for rank in range(2)]
    assert_bitwise_equal("sum", on_all(groups, lambda g: g.all_reduce(x[g.rank]))[0], in_order(x))
    got = on_all(groups, lambda g: g.all_gather(x[g.rank]))
    assert_bitwise_equal("gather", got[1], torch.stack(x))
    got = on_all(groups, lambda g: g.all_to_all(x[g.rank]))
    assert_bitwise_equal("all to all", got[1], torch.cat([part[2:] for part in x]))


@pytest.mark.parametrize("is_first_inside", [True, False])
def test_inference_mode_may_change_between_calls(is_first_inside: bool) -> None:
    """The buffers and the tensors may come from inside or outside of it."""
    groups = make_groups(2)

    def run(group: MemoryGroup) -> list[Tensor]:
        results = []
        for is_inside in (is_first_inside, not is_first_inside):
            with torch.inference_mode(is_inside):
                mine = torch.full((3,), 1.0 + group.rank)
            for is_call_inside in (True, False):
                with torch.inference_mode(is_call_inside):
                    results.append(group.all_reduce(mine))
                    results.append(group.broadcast(mine))
                    results.append(group.all_gather(mine)[0])
                    pending = group.start_exchange(mine[:2], [1, 1], [1, 1], "exchange")
                with torch.inference_mode(not is_call_inside):
                    results.append(pending.wait()[:1].expand(3))
        return results

    assert all(bool((x == y).all()) for x, y in zip(*on_all(groups, run), strict=True))


def test_bytes_and_calls_are_counted() -> None:
    groups = make_groups(4)

    def run(group: MemoryGroup) -> tuple[dict[str, int], int]:
        x = torch.ones(8, 10)
        group.all_reduce(x)
        group.all_gather(x)
        group.reduce_scatter(x)
        group.all_to_all(x)
        group.broadcast(x)
        group.start_exchange(x[:4], [1] * 4, [1] * 4, "dispatch").wait()
        return dict(group.sent), group.num_calls

    for rank, (sent, num_calls) in enumerate(on_all(groups, run)):
        assert num_calls == 6 and not groups[rank].in_exchange
        assert sent == {
            "all_reduce": 480,
            "all_gather": 960,
            "reduce_scatter": 240,
            "all_to_all": 240,
            "broadcast": 960 if rank == 0 else 0,
            "dispatch": 120,
        }


def test_a_waiting_rank_is_marked_and_uses_no_processor() -> None:
    first, second = make_groups(2, is_crowded=False)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(first.broadcast, torch.ones(1)).result()  # it has nothing to wait for
        assert not first.in_exchange
        deadline = time.monotonic() + 60
        result = pool.submit(first.all_reduce, torch.ones(1))
        while not first.in_exchange:
            assert time.monotonic() < deadline
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1 and first.in_exchange
        second.broadcast(torch.zeros(1))
        assert float(second.all_reduce(torch.ones(1))) == float(result.result()) == 2
        assert not first.in_exchange


@pytest.mark.parametrize("operation", ["broadcast", "all_reduce"])
def test_a_rank_in_another_exchange_is_detected(operation: str) -> None:
    def run(group: MemoryGroup) -> str:
        try:
            if group.rank == 1:
                getattr(group, operation)(torch.zeros(4))
            else:
                group.all_gather(torch.zeros(4))
        except RankError as error:
            return str(error)
        return ""

    errors = on_all(make_groups(2), run)
    same = "all ranks must make the same calls"
    assert errors[1] == f"rank 11 is in another exchange than rank 10: {same}"
    assert errors[0] == f"rank 10 is in another exchange than rank 11: {same}"


def names() -> set[str]:
    """Return the names of shared memory, without the semaphores of tests that run beside this."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def test_the_memory_has_no_name_and_is_freed() -> None:
    before = names()
    groups = make_groups(2)
    assert names() == before
    maps = Path("/proc/self/maps")
    assert "dsv3 exchange" in maps.read_text()
    del groups
    assert "dsv3 exchange" not in maps.read_text()


def test_memory_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of the process; no room when an area is reserved; no such files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (mmap.PAGESIZE, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            create_file(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reader, writer = os.pipe()  # no pages can be reserved in it
    with pytest.raises(OSError, match="Illegal seek"):
        SharedSegment(writer, 1, 2)
    os.close(reader)
    os.close(writer)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match="not implemented"):
        create_file(2)


def test_a_file_of_another_process_is_recognized() -> None:
    """A process with the same id in another container has other files, or none."""
    with file_of(2) as descriptor, file_of(2) as other:
        handle = handle_of(descriptor)
        os.close(open_file(handle))
        with pytest.raises(OSError, match="No such process"):
            open_file(handle._replace(descriptor=other))
        with pytest.raises(OSError, match="No such file"):
            open_file(handle._replace(descriptor=1 << 20))


def test_an_area_reserves_all_of_its_pages() -> None:
    """Memory that is missing later would end the process with SIGBUS."""
    with file_of(3) as descriptor:
        assert os.fstat(descriptor).st_blocks == 0
        for rank in range(3):
            SharedSegment(descriptor, rank, 3)
        status = os.fstat(descriptor)
        assert status.st_blocks * 512 == status.st_size == 3 * shared_segment._area_bytes(3)
