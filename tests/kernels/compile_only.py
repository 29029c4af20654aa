"""Compiles the kernels that the wrappers would launch, without a GPU.

TRITON_INTERPRET=0 python tests/kernels/compile_only.py 90 [--instructions]

The interpreter runs kernels as Python: it forgives branches of different types, and never makes a
constant of an integer argument that is 1. The compiler does not. Prints a line for each kernel: its
name, bytes of shared memory, bytes of a thread's stack (registers that did not suffice), how often
it holds each of `MARKS` and a thread's registers. With --instructions the number of machine
instructions, too, which takes about as long as compiling.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import dsv3_kernels  # noqa: F401 - all of its modules are looked through below
from dsv3_kernels._gpu import Gpu
from dsv3_kernels.attention._decode_tiles import tile_for as decode_tile
from dsv3_kernels.attention._mla_prefill_kernel import launch_prefill
from dsv3_kernels.attention._mla_prefill_kernel import tile_for as prefill_tile
from dsv3_kernels.attention.absorb_query import absorb_query
from dsv3_kernels.attention.expand_values import expand_values
from dsv3_kernels.attention.keys_values import KeysValues
from dsv3_kernels.attention.kv_fp8 import packed_bytes
from dsv3_kernels.attention.merge_lse import merge_lse
from dsv3_kernels.attention.mha_decode import mha_decode
from dsv3_kernels.attention.mla_decode import launch_mla_decode
from dsv3_kernels.attention.mla_decode_parts import mla_decode_parts
from dsv3_kernels.attention.norm_and_cache import norm_and_cache
from dsv3_kernels.attention.paging import PageTables, Paging
from dsv3_kernels.attention.parts import empty_parts, open_parts
from dsv3_kernels.attention.rope import Rotation, rotate
from dsv3_kernels.attention.rope_and_cache import EntryWrite, rope_and_cache
from dsv3_kernels.attention.write_slots import write_slots
from dsv3_kernels.gemm._split_k import make_locks
from dsv3_kernels.gemm.act_quant import Quantized, act_quant
from dsv3_kernels.gemm.bf16_gemm import bf16_gemm
from dsv3_kernels.gemm.fp8_gemm import OLD_TILES, TILES, fp8_gemm, launch_large
from dsv3_kernels.gemm.weight_dequant import weight_dequant
from dsv3_kernels.index.index_cache import IndexCache, index_key_bytes
from dsv3_kernels.index.index_key import IndexWrite, write_index_keys
from dsv3_kernels.index.index_query import index_queries
from dsv3_kernels.index.index_scores import index_scores
from dsv3_kernels.index.top_k import select_slots, top_candidates
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Stack
from dsv3_kernels.moe.permute import LocalExperts, permute, unpermute
from dsv3_kernels.moe.route import RouterInput, Routing, route
from dsv3_kernels.moe.route_and_permute import route_and_permute
from dsv3_kernels.moe.router_logits import router_logits
from dsv3_kernels.ops.rmsnorm import add_rmsnorm
from dsv3_kernels.ops.sample import RowParams, sample
from dsv3_kernels.ops.silu_mul import silu_mul_quant
from dsv3_kernels.ops.sum_norm import Peers, sum_norm
from tests.kernels.integer_launches import integer_launches

# Hopper's matrix units, tiles through TMA, words to and from other GPUs, loads past the cache.
MARKS = (
    "wgmma.mma_async",
    "cp.async.bulk.tensor",
    ".sys.release.",
    ".sys.acquire.",
    "ld.volatile.global.v4",
)


def launches(capability: int) -> None:
    """Call every wrapper with tensors whose shapes matter and whose values do not."""
    x = torch.zeros(129, 512, dtype=torch.bfloat16)
    q = act_quant.kernel(x)
    add_rmsnorm.kernel(x[:1], x[:1].float(), torch.ones(512), 1e-6, quant=True)
    silu_mul_quant.kernel(x[:1], ue8m0=True)
    for ranks in (8, 3):
        peers = Peers.at([1 << 40] * ranks, 0, x.device)
        sum_norm(x[:1], x[:1].float(), torch.ones(512), 1e-6, peers, quant=True)
    w, scale = torch.zeros(576, 512).to(torch.float8_e4m3fn), torch.ones(5, 4)
    weight_dequant.kernel(w[:100, :100], scale[:1, :1], torch.bfloat16)
    few_rows()
    is_hopper, y = capability >= 90, torch.zeros(129, 576, dtype=torch.bfloat16)
    for tile in TILES[:2] if is_hopper else OLD_TILES[-1:]:
        launch_large(q, w, scale, y, tile, tma=is_hopper)
    routing()
    experts(is_hopper)
    integer_launches(is_hopper)
    attention(is_hopper)
    wide_heads(is_hopper)
    index()
    attention_to_selected(is_hopper)


def few_rows() -> None:
    """One row, as many as a program takes, more, odd ones of a wider tensor; K split and not."""
    w, x = (torch.zeros(n, 1024, dtype=torch.bfloat16) for n in (576, 128))
    bf16_gemm.kernel(x[:1], w, locks=make_locks(w))
    bf16_gemm.kernel(x[:64], w, torch.float32)
    bf16_gemm.kernel(x[:20, :100], w[:70, :100].contiguous())
    w = w.to(torch.float8_e4m3fn)
    scale = torch.ones(5, 8)
    q = act_quant.kernel(x)
    for rows in (1, 128):
        fp8_gemm.kernel(Quantized(q.q[:rows], q.scale[:rows]), w, scale, locks=make_locks(w))
    fp8_gemm.kernel(q, w, scale)
    half = Quantized(q.q[:, :512].contiguous(), q.scale[:, :4].contiguous())
    fp8_gemm.kernel(half, w[:, :512].contiguous(), scale[:, :4].contiguous())


def routing() -> None:
    """From hidden states to the rows of experts, and back."""
    rule = Routing("sigmoid", "noaux_tc", 8, 8, 4, True, 2.5)
    for tokens, dtype in ((1, torch.bfloat16), (300, torch.bfloat16), (2, torch.float32)):
        x = torch.zeros(tokens, 512, dtype=dtype)
        logits = router_logits.kernel(x, torch.zeros(256, 512))
        router_logits.kernel(x, torch.zeros(256, 512, dtype=torch.bfloat16))
    position = torch.zeros(1, dtype=torch.int64)
    route.kernel(RouterInput(torch.zeros(16, 1, 256), torch.zeros(256), rule, position))
    ids, _ = route.kernel(RouterInput(logits[:, :1].contiguous(), None, rule))
    locks = make_locks(torch.zeros(256, 1))
    for tokens in (1, 8, 16):
        router = RouterInput(torch.zeros(16, tokens, 256), torch.zeros(256), rule)
        route_and_permute.kernel(router, LocalExperts(32, 32), locks)
    for num_local in (1, 256):
        groups = permute.kernel(ids, LocalExperts(0, num_local))
    y = torch.zeros(8, 512, dtype=torch.bfloat16)
    unpermute.kernel(y, groups.row_TK, torch.zeros(2, 512))


def experts(is_hopper: bool) -> None:
    """Both products, for few rows and for many, in every kind of numbers."""
    groups = permute.kernel(torch.zeros(3, 2, dtype=torch.int64), LocalExperts(0, 4))
    gate_up, down = torch.zeros(4, 512, 512), torch.zeros(4, 512, 256)
    fp8 = [
        Stack(w.to(torch.float8_e4m3fn), torch.ones(4, 4, w.shape[2] // 128))
        for w in (gate_up, down)
    ]
    quantized = [act_quant.kernel(torch.zeros(m, k)) for m, k in ((3, 512), (6, 256))]
    few_and_many = (1, 64, 256) if is_hopper else (256,)
    cases: list[tuple[Sequence[Tensor | Quantized], list[Stack], int]] = []
    cases += [(quantized, fp8, rows) for rows in few_and_many]
    for dtype in (torch.bfloat16, torch.float32):
        plain = [torch.zeros(3, 512, dtype=dtype), torch.zeros(6, 256, dtype=dtype)]
        stacks = [Stack(w.to(dtype)) for w in (gate_up, down)]
        cases += [(plain, stacks, 256), (plain, fp8, 256)]
    if is_hopper:
        cases.append((plain, fp8, 1))
    for x, w, rows in cases:
        grouped_gate_up.kernel(x[0], w[0], groups, rows)
        grouped_down.kernel(x[1], w[1], groups, rows, torch.bfloat16, torch.zeros(3, 2))


def _tool(name: str, *flags: str, cubin: bytes) -> str:
    """Return the output of one of the tools that come with triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage_of(cubin: bytes) -> tuple[int, int]:
    """Return a thread's registers, and the bytes of memory that it needs beside them."""
    usage = _tool("cuobjdump", "-res-usage", cubin=cubin)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def stack_of(cubin: bytes) -> int:
    """Return the bytes of memory that a thread needs beside its registers."""
    return usage_of(cubin)[1]


def instructions_of(cubin: bytes) -> int:
    """Return the number of machine instructions, without those that pad the end."""
    lines = _tool("nvdisasm", "-c", cubin=cubin).splitlines()
    return sum("NOP" not in line for line in lines if re.search(r"/\*[0-9a-f]{4,}\*/", line))


def attention(is_hopper: bool) -> None:
    """The kernels of the attention layer at V3's shapes, over every form of the cache."""
    page, pos = torch.zeros(2, 40, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64)
    packed = torch.zeros(64, packed_bytes(512, 64), dtype=torch.uint8)
    slot = torch.zeros(4, dtype=torch.int64)
    rotation = Rotation(torch.zeros(4, 32), torch.zeros(4, 32), True)
    plain, kv = (torch.zeros(64, width, dtype=torch.bfloat16) for width in (576, 16 * 320))
    forms = (plain, 32), (packed, 128), (plain.float(), 16)  # others: `attention_to_selected`
    for cache, heads in forms:
        q = torch.zeros(2, 1, heads, 576, dtype=torch.bfloat16)
        tile = decode_tile(heads, cache.dtype == torch.float32, is_hopper)
        launch_mla_decode(q, cache, PageTables(page, pos, Paging(64, 8, 1)), 512, 0.1, tile)
    for cache in (plain, packed):
        write = EntryWrite(
            kv_TX=kv[:4, 1536:2112],
            weight_C=torch.ones(512),
            eps=1e-6,
            rotation=rotation,
            cache_SX=cache,
            slot_T=slot,
            keep_from=2,
        )
        rope_and_cache.kernel(write)
        norm_and_cache.kernel(kv[:4, :1536], torch.ones(1536), cache is packed, False, write)
    write_slots.kernel(plain, slot, plain[:4])
    absorption(page, pos, plain)
    q = torch.zeros(4, 16, 192, dtype=torch.bfloat16)
    rotate.kernel(q[..., 128:], rotation)
    k_r, start = kv[:4, None, :64].expand(-1, 16, -1), torch.tensor([0, 1, 4], dtype=torch.int32)
    keys = KeysValues(q[..., :128], k_r, q[..., :128])
    launch_prefill(q, keys, start, 3, 0, 0.1, prefill_tile(False, is_hopper, 256))
    mha_decode.kernel(q[:2], kv, PageTables(page, pos, Paging(64)), 0.1)
    merge_lse.kernel(torch.zeros(8, 4, 16, 513)[..., :-1], torch.zeros(8, 4, 16))
    zeros, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    params = RowParams(ones, zeros, ones, ones, zeros, zeros, zeros)
    sample.kernel(torch.zeros(2, 129280), params)


def wide_heads(is_hopper: bool) -> None:
    """The kernels that see whole heads, at GLM's shapes: 192 + 64 dims of keys, 256 of values."""
    q, v = (torch.zeros(4, 8, 256, dtype=torch.bfloat16) for _ in range(2))
    k_r, start = v[:, :1, :64].expand(-1, 8, -1), torch.tensor([0, 1, 4], dtype=torch.int32)
    keys = KeysValues(q[..., :192], k_r, v)
    launch_prefill(q, keys, start, 3, 0, 0.1, prefill_tile(False, is_hopper, 512))
    exact = KeysValues(keys.k_SHN.float(), keys.k_SHR.float(), keys.v_SHV.float())
    launch_prefill(q.float(), exact, None, 4, 9, 0.1, prefill_tile(True, is_hopper, 512))
    page, pos = torch.zeros(2, 40, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64)
    kv = torch.zeros(64, 8 * 512, dtype=torch.bfloat16)
    mha_decode.kernel(q[:2], kv, PageTables(page, pos, Paging(64)), 0.1)
    w, trig = torch.zeros(8, 448, 512, dtype=torch.bfloat16), torch.zeros(2, 32)
    latent = absorb_query.kernel(q[:2], w[:, :192], Rotation(trig, trig, True))
    expand_values.kernel(latent[None, ..., :512].float(), None, w[:, 192:], True)


def absorption(page: torch.Tensor, pos: torch.Tensor, cache: torch.Tensor) -> None:
    """Into latent space and back, alone and with the heads of eight ranks."""
    w = torch.zeros(16, 256, 512, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        q, trig = torch.zeros(2, 16, 192, dtype=dtype), torch.zeros(2, 32)
        q = absorb_query.kernel(q, w[:, :128].to(dtype), Rotation(trig, trig, True))
        expand_values.kernel(q[None, ..., :512].float(), None, w[:, 128:].to(dtype), True)
    q = torch.zeros(8, 2, 16, 576, dtype=torch.bfloat16)
    parts = empty_parts(q, 512)
    tables = PageTables(page, pos, Paging(64, 8, 1))
    mla_decode_parts.kernel(q, cache, tables, 0.1, parts)
    expand_values.kernel(*open_parts(parts), w[:, 128:], True)


def index() -> None:
    """The lightning indexer at V3.2's shapes: all forms of its keys, long rows and short ones."""
    tables = PageTables(
        torch.zeros(1, 2560, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int64), Paging(64)
    )
    angle = torch.zeros(3, 32)
    for form in (torch.uint8, torch.bfloat16, torch.float32):
        is_fp8 = form == torch.uint8
        dtype = torch.bfloat16 if is_fp8 else form
        slots = torch.zeros(128, index_key_bytes(128) if is_fp8 else 128, dtype=form)
        cache = IndexCache(slots, 64)
        for interleaved in (False, True):
            rotation = Rotation(angle, angle, interleaved)
            key = torch.zeros(3, 640, dtype=dtype)[:, 512:]
            slot = torch.zeros(3, dtype=torch.int64)
            write = IndexWrite(key, torch.ones(128), torch.zeros(128), rotation, cache, slot)
            write_index_keys.kernel(write)
            q = torch.zeros(3, 64, 128, dtype=dtype)
            q, weight = index_queries.kernel(q, torch.zeros(16, 3, 64), rotation, is_fp8)
        scores = index_scores.kernel(q, weight, cache, tables)
    candidates = top_candidates.kernel(scores, 2048, tables)
    top_candidates.kernel(scores[:, :300], 2048, tables)
    shards = PageTables(tables.page_BG, tables.query_pos_BQ, Paging(64, 8, 3))
    select_slots.kernel(candidates[None].expand(8, -1, -1).contiguous(), 2048, shards)
    select_slots.kernel(candidates[None], 2048, tables)


def attention_to_selected(is_hopper: bool) -> None:
    """Decode attention over selected slots, as pages of one slot, and for a chunk of a prompt."""
    plain, packed = (
        torch.zeros(64, 576, dtype=torch.bfloat16),
        torch.zeros(64, packed_bytes(512, 64), dtype=torch.uint8),
    )
    few_and_many = [
        PageTables(torch.zeros(T, 2048, dtype=torch.int32), torch.zeros(T, 1).long(), Paging(1))
        for T in (1, 2048)
    ]
    few, many = few_and_many
    forms = (plain, 16, many), (plain, 128, many), (packed, 16, many), (plain.float(), 128, many)
    for cache, heads, selected in (*forms, (packed, 128, few)):
        q = torch.zeros(len(selected.page_BG), 1, heads, 576, dtype=torch.bfloat16)
        tile = decode_tile(heads, cache.dtype == torch.float32, is_hopper)
        launch_mla_decode(q, cache, selected, 512, 0.1, tile)
    kv = torch.zeros(64, 16 * 320, dtype=torch.bfloat16)
    mha_decode.kernel(torch.zeros(2048, 16, 192, dtype=torch.bfloat16), kv, few_and_many[1], 0.1)


class NoDevice:
    """The part of a driver that Triton needs to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(capability: int, **more: Callable[[Tensor], Any]) -> None:
    """Let wrappers take tensors of the CPU for those of such a GPU."""
    shared = (228 if capability == 90 else 100) << 10
    gpu = Gpu(divmod(capability, 10), multiprocessors=132, shared_bytes=shared)
    answers = {"gpu_of": lambda device: gpu} | more
    for name, module in list(sys.modules.items()):
        for function, answer in answers.items():
            if name.startswith("dsv3_kernels.") and hasattr(module, function):
                setattr(module, function, answer)


def main() -> None:
    capability, counts_instructions = int(sys.argv[1]), "--instructions" in sys.argv[2:]
    driver.set_active(NoDevice(capability))
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
        registers, stack = usage_of(cubin)
        counts = [ptx.count(mark) for mark in MARKS]
        facts = [kernel.metadata.shared, stack, *counts, registers]
        if counts_instructions:
            facts.append(instructions_of(cubin))
        sys.stdout.write(f"{self.__name__} {' '.join(map(str, facts))}\n")

    JITFunction.run = compile_only
    pretend(capability)
    launches(capability)


if __name__ == "__main__":
    main()
