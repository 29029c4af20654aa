"""`sum_norm` on real GPUs (TRITON_INTERPRET=0): two ranks on one, on streams; and one on each."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch import multiprocessing as mp

from dsv3.distributed.one_shot_group import OneShotGroup, connect
from dsv3_kernels import NormedSum, Peers, shared_bytes, sum_norm
from dsv3_kernels.gemm.act_quant import act_quant
from dsv3_kernels.ops.sum_norm import MAX_ROWS, sum_norm_of_parts
from dsv3_kernels.testing import assert_bitwise_equal, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPES = ((1, 7168), (36, 7168), (2, 512), (MAX_ROWS, 1000), (17, 7168))
SECONDS = 20.0


def operands(step: int, ranks: int, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the stream, all ranks' parts and the weights; the same wherever they are made."""
    rng = torch.Generator().manual_seed(step)
    rows, dim = SHAPES[step % len(SHAPES)]
    dtype = torch.float32 if step % 2 and rows * dim <= 17 * 7168 else torch.bfloat16
    x, *parts = (torch.randn(rows, dim, generator=rng).to(device) for _ in range(ranks + 1))
    weight = torch.rand(dim, generator=rng).to(device) + 0.5
    return x.bfloat16(), [part.to(dtype) for part in parts], weight


def check(
    got: NormedSum,
    x: Tensor,
    parts: list[Tensor],
    weight: Tensor,
    ue8m0: bool,
) -> None:
    want = sum_norm_of_parts(x, parts, weight, 1e-6)
    assert_bitwise_equal("sum", got[0], want[0])
    assert_close("norm", got[1], want[1], 2**-7)
    if got[2] is not None:
        quantized = act_quant.reference(got[1].cpu(), ue8m0)
        assert_bitwise_equal("scale", got[2].scale.cpu(), quantized.scale)
        assert_bitwise_equal("q", got[2].q.cpu(), quantized.q)


def flags_of(shared: Tensor, ranks: int) -> Tensor:
    """Return the flags in a rank's memory, [rows, ranks]."""
    return shared[-4 * MAX_ROWS * ranks :].view(torch.int32).view(MAX_ROWS, ranks)


@pytest.mark.skipif("CUDA_LAUNCH_BLOCKING" in os.environ, reason="two kernels wait for each other")
@pytest.mark.parametrize("step", [0, 2, 5, 7])  # few rows: both ranks' programs run at once
def test_two_ranks_on_two_streams(step: int) -> None:
    device, quant = torch.device("cuda"), (True, step % 2 == 0)
    shared = [torch.zeros(shared_bytes(2), dtype=torch.uint8, device=device) for _ in range(2)]
    ranks = [Peers.at([memory.data_ptr() for memory in shared], r, device) for r in range(2)]
    x, parts, weight = operands(step, 2, device)
    flags = [flags_of(memory, 2) for memory in shared]
    flags[0][:, 1] = 1 << 20  # the first launch waits for no peer: it compiles and loads
    sum_norm(x, parts[0], weight, 1e-6, ranks[0], *quant)
    for each in flags:
        each.zero_()
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for turn in range(6):
        for r in (0, 1) if turn % 2 else (1, 0):
            with torch.cuda.stream(streams[r]):
                torch.cuda._sleep(1_000_000 * ((turn // 2 + r) % 2))
                results.append(sum_norm(x, parts[r], weight, 1e-6, ranks[r], *quant))
    deadline = time.monotonic() + SECONDS
    while not all(stream.query() for stream in streams) and time.monotonic() < deadline:
        time.sleep(0.01)
    is_done = all(stream.query() for stream in streams)
    if not is_done:  # lets those go that wait
        with torch.cuda.stream(torch.cuda.Stream()):
            for r, each in enumerate(flags):
                each[:, 1 - r] = 1 << 20
    torch.cuda.synchronize()
    assert is_done, "the ranks wait for each other for ever"
    for out in results:
        check(out, x, parts, weight, quant[1])
        assert_bitwise_equal("norm", out[1], results[0][1])


def test_a_graph_counts_on() -> None:
    device = torch.device("cuda")
    shared = torch.zeros(shared_bytes(1), dtype=torch.uint8, device=device)
    peers = Peers.at([shared.data_ptr()], 0, device)
    x, parts, weight = operands(1, 1, device)
    y = parts[0].clone()
    sum_norm(x, y, weight, 1e-6, peers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sum_norm(x, y, weight, 1e-6, peers)
    for step in range(5):
        y.copy_(parts[0] * step)
        graph.replay()
        check(out, x, [y], weight, False)
        check(sum_norm(x, parts[0], weight, 1e-6, peers), x, parts, weight, False)
    assert flags_of(shared, 1)[: len(x), 0].tolist() == [11] * len(x)


def _check_group(group: OneShotGroup, device: torch.device) -> None:
    rank, size = group.rank, group.size
    for step in range(4 * len(SHAPES)):
        x, parts, weight = operands(step, size, device)
        if step % size == rank:
            torch.cuda._sleep(5_000_000)
        quant = x.shape[1] % 128 == 0, step % 2 == 0
        out = group.sum_norm(x, parts[rank].clone(), weight, 1e-6, *quant)
        check(out, x, parts, weight, quant[1])
        for other in group.all_gather(out[1]):
            assert_bitwise_equal("norm on all ranks", other, out[1])
        small = torch.full((8,), float(rank), device=device)  # torch's kernel, in the same memory
        assert group.all_reduce(small).tolist() == [sum(range(size))] * 8
    x, parts, weight = operands(0, size, device)
    y, norm = parts[rank].clone(), (weight, 1e-6, True, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group.sum_norm(x, y, *norm)
        again = group.sum_norm(out[0], y, *norm)
    for step in range(10):
        y.copy_(parts[rank] * (step + 1))
        if step % size == rank:
            torch.cuda._sleep(5_000_000)
        graph.replay()
        scaled = [part * (step + 1) for part in parts]
        check(out, x, scaled, weight, False)
        check(again, out[0], scaled, weight, False)
        check(group.sum_norm(x, parts[rank].clone(), *norm), x, parts, weight, False)


def _rank_main(rank: int, size: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("nccl", init_method=init, rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    group = connect(dist.group.WORLD, device, via_host=False, ranks_on_host=size, one_shot=True)
    try:
        assert isinstance(group, OneShotGroup)
        _check_group(group, device)
    finally:
        group.close()
        dist.destroy_process_group()


def _all_see_each_other() -> bool:
    every = range(torch.cuda.device_count())
    return len(every) > 1 and all(
        torch.cuda.can_device_access_peer(a, b) for a in every for b in every if a != b
    )


@pytest.mark.multi_gpu
@pytest.mark.skipif(not _all_see_each_other(), reason="needs GPUs that read each other's memory")
def test_ranks_on_their_gpus(tmp_path: Path) -> None:
    size = torch.cuda.device_count()
    mp.spawn(_rank_main, args=(size, str(tmp_path)), nprocs=size)
