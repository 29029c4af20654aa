"""Every Triton kernel at DeepSeek-V3's shapes: operands, bytes, FLOPs, reference, library peer.

`cases(small=False)` has the shapes of rank 0 of 8, and some unsplit ones; with `small`, ragged
shapes that the interpreter can run.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchlib.kernel_cases.attention import absorption, decode, latents, prefill
from benchlib.kernel_cases.case import (
    FF,
    FP8_TOL,
    VOCAB,
    Args,
    Case,
    D,
    E,
    K,
    check,
    measure,
    normal,
    scaled,
)
from benchlib.kernel_cases.gemm import expert_products, few_rows, gemm, integers
from benchlib.kernel_cases.index import index_inputs, selection
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._split_k import make_locks
from dsv3_kernels.gemm.act_quant import act_quant
from dsv3_kernels.gemm.weight_dequant import weight_dequant
from dsv3_kernels.moe.permute import Groups, LocalExperts, permute, unpermute
from dsv3_kernels.moe.route import RouterInput, Routing, route
from dsv3_kernels.moe.route_and_permute import route_and_permute
from dsv3_kernels.moe.router_logits import router_logits
from dsv3_kernels.ops.rmsnorm import add_rmsnorm
from dsv3_kernels.ops.sample import RowParams, sample
from dsv3_kernels.ops.silu_mul import silu_mul_quant
from dsv3_kernels.ops.sum_norm import Peers, shared_bytes, sum_norm, sum_norm_of_parts

__all__ = ["Case", "cases", "check", "measure"]


def cases(small: bool = False) -> Iterator[Case]:
    """Yield the cases of all kernels."""
    products = (gemm, few_rows, integers, expert_products)
    attention = (absorption, decode, latents, prefill)
    index = (index_inputs, selection)
    for family in (_elementwise, *products, _routing, *attention, *index, _sampling):
        yield from family(small)


def _elementwise(small: bool) -> Iterator[Case]:
    for T, dim in [(3, 256)] if small else [(1, D), (128, D), (4096, D)]:
        values = T * dim
        quant = T * dim * (1 + 4 / BLOCK)
        name = f"{T} x {dim}"
        make = partial(_rows, T, dim)
        yield Case.of(act_quant, name, make, 2 * values + quant, tol=FP8_TOL)

        def operands(d: torch.device, T: int = T, dim: int = dim) -> Args:
            x, y = (normal(T, dim, device=d) for _ in range(2))
            return x, y, torch.rand(dim, device=d) + 0.5, 1e-6, True

        yield Case.of(add_rmsnorm, name, operands, 8 * values + quant, tol=FP8_TOL)
        make = partial(_rows, T, 2 * dim)
        yield Case.of(silu_mul_quant, name, make, 4 * values + quant, tol=FP8_TOL)
    for T, dim in [(3, 256)] if small else [(1, D), (32, D)]:
        yield _sum_norm(T, dim)
    for rows, cols in [(100, 200)] if small else [(D, FF), (4096, D)]:
        make = partial(_matrix, rows, cols)
        yield Case.of(weight_dequant, f"{rows} x {cols}", make, 3 * rows * cols)


def _sum_norm(T: int, dim: int) -> Case:
    """Return the case of a single rank: signals and memory traffic, without links."""

    def operands(d: torch.device) -> Args:
        x, y = (normal(T, dim, device=d) for _ in range(2))
        shared = torch.zeros(shared_bytes(1), dtype=torch.uint8, device=d)
        peers = Peers.at([shared.data_ptr()], 0, d)
        return x, y, torch.rand(dim, device=d) + 0.5, 1e-6, peers, shared

    return Case(
        "sum_norm",
        f"{T} x {dim}, one rank",
        operands,
        lambda x, y, weight, eps, peers, _shared: sum_norm(x, y, weight, eps, peers, quant=True),
        lambda x, y, weight, eps, *_peers: sum_norm_of_parts(x, [y], weight, eps, quant=True),
        T * dim * (12 + 1 + 4 / BLOCK),
        tol=FP8_TOL,
    )


def _rows(rows: int, cols: int, device: torch.device) -> Args:
    return (normal(rows, cols, device=device),)


def _matrix(rows: int, cols: int, device: torch.device) -> Args:
    return (*scaled(rows, cols, device), torch.bfloat16)


def _routing(small: bool) -> Iterator[Case]:
    rule = Routing("sigmoid", "noaux_tc", K, 8, 4, True, 2.5)
    for T in (3,) if small else (1, 8, 128, 1024):

        def logits(d: torch.device, T: int = T) -> Args:
            bias = torch.randn(256, device=d) / 8
            return (RouterInput(torch.randn(2, T, 256, device=d), bias, rule),)

        num_bytes = T * (8 * 256 + 12 * K)
        yield Case.of(route, f"{T} x 256", logits, num_bytes, tol=1e-5, view=_sorted)

        if T <= 16:
            yield _route_and_permute(T, rule)

        def hidden(d: torch.device, T: int = T) -> Args:
            dim = 256 if small else D
            return normal(T, dim, device=d), normal(256, dim, device=d)

        yield Case.of(
            router_logits,
            f"{T} x 256",
            hidden,
            2 * 256 * D + T * (2 * D + 4 * 256),
            2.0 * T * 256 * D,
            tol=1e-4,
            view=lambda parts: parts.sum(0),
        )
    for T in (5,) if small else (8, 128, 4096):

        def ids(d: torch.device, T: int = T) -> Args:
            return torch.rand(T, 256, device=d).topk(K).indices, LocalExperts(64, E)

        def expert_rows(d: torch.device, T: int = T) -> Args:
            groups = permute.reference(*ids(d, T))
            return normal(T * K, 256 if small else D, device=d), groups.row_TK

        name = f"{T} x {K}"
        yield Case.of(permute, name, ids, 16 * T * K, tol=0.0, view=_groups)
        num_bytes = T * D * (2 * K * E // 256 + 4)
        yield Case.of(unpermute, name, expert_rows, num_bytes, tol=1e-5)


def _route_and_permute(T: int, rule: Routing) -> Case:
    def operands(d: torch.device) -> Args:
        bias = torch.randn(256, device=d) / 8
        router = RouterInput(torch.randn(16, T, 256, device=d), bias, rule)
        return router, LocalExperts(64, E), make_locks(bias[:, None])

    def reference(router: RouterInput, local: LocalExperts, _locks: Tensor) -> tuple[Any, ...]:
        ids_TK, weight_TK = route.reference(router)
        return ids_TK, weight_TK, permute.reference(ids_TK, local)

    return Case(
        "route_and_permute",
        f"{T} x 256",
        operands,
        route_and_permute.kernel,
        reference,
        T * (64 * 256 + 20 * K) + 8 * E,
        tol=1e-5,
        view=lambda found: (_sorted(found[:2]), found[2].start_E, found[2].count_E),
    )


def _sorted(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sort the experts of each token by id."""
    ids, weight = result
    order = ids.argsort(-1)
    return ids.gather(1, order), weight.gather(1, order)


def _groups(found: Groups) -> list[Tensor | None]:
    return [found.start_E, found.count_E, found.entry_M, found.row_TK]


def _sampling(small: bool) -> Iterator[Case]:
    for B, W in [(3, 300)] if small else [(1, VOCAB), (128, VOCAB)]:

        def operands(d: torch.device, B: int = B, W: int = W) -> Args:
            ones = torch.ones(B, device=d)
            longs = torch.arange(B, device=d)
            logits = 3 * torch.randn(B, W, device=d)
            none = 0 * longs
            params = RowParams(
                temperature_B=ones,
                top_k_B=none,
                top_p_B=ones,
                min_p_B=0 * ones,
                seed_B=longs - 1,
                answer_B=none,
                position_B=longs,
            )
            return logits, params

        yield Case.of(sample, f"{B} x {W}", operands, 4 * B * W, tol=0.0)
