"""Launches of every kernel that multiplies integers, for `compile_only.py`."""

import torch
from torch import Tensor

from dsv3_kernels.gemm._split_k import make_locks
from dsv3_kernels.gemm.act_quant import Quantized
from dsv3_kernels.gemm.fp8_gemm import OLD_TILES, TILES, launch_large
from dsv3_kernels.gemm.int8_quant import int8_quant
from dsv3_kernels.gemm.int_gemm import int_gemm
from dsv3_kernels.gemm.integers import int_dequant
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Stack
from dsv3_kernels.moe.permute import LocalExperts, permute


def integer_launches(is_hopper: bool) -> None:
    """Call every wrapper with tensors whose shapes matter and whose values do not."""
    integers()
    int8_rows(is_hopper)
    integer_experts()


def integer_stack(rows: int, cols: int, bits: int, group: int, zeros: bool = False) -> Stack:
    """Return the matrices of four experts."""
    q = torch.zeros(4, rows, cols * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scale = torch.ones(4, rows, cols // group, dtype=torch.bfloat16)
    return Stack(q, scale, group, scale.to(torch.uint8) if zeros else None)


def integers() -> None:
    """int8 with a scale per row, int4 in groups of 32 and of 128 (with zeros); K split and not."""
    x = torch.zeros(64, 1024, dtype=torch.bfloat16)
    for bits, group, zeros in ((8, 1024, False), (4, 32, False), (4, 128, True)):
        w = integer_stack(576, 1024, bits, group, zeros).integers(0)
        int_dequant.kernel(w, torch.bfloat16)
        int_gemm.kernel(x[:1], w, torch.bfloat16, make_locks(w.q))
        int_gemm.kernel(x, w, torch.bfloat16)
    int_gemm.kernel(x[:3].float(), w, torch.float32)


def integer_experts() -> None:
    """Both products of float rows, few and many, with integers, and of int8 rows with int8."""
    groups = permute.kernel(torch.zeros(3, 2, dtype=torch.int64), LocalExperts(0, 4))
    x, h = torch.zeros(3, 512, dtype=torch.bfloat16), torch.zeros(6, 256, dtype=torch.bfloat16)
    forms = ((8, 0, False), (4, 32, False), (4, 128, True))
    cases: list[tuple[Tensor | Quantized, Tensor | Quantized, tuple[int, int, bool], int]] = []
    cases += [(x, h, form, rows) for form in forms for rows in (1, 256)]
    cases += [(x, h, forms[2], rows) for rows in (24, 64)]
    cases += [(x.float(), h.float(), forms[1], rows) for rows in (1, 256)]
    cases += [(int8_quant.kernel(x), int8_quant.kernel(h), forms[0], rows) for rows in (1, 256)]
    for x_rows, h_rows, (bits, group, zeros), rows in cases:
        gate_up = integer_stack(512, 512, bits, group or 512, zeros)
        down = integer_stack(512, 256, bits, group or 256, zeros)
        grouped_gate_up.kernel(x_rows, gate_up, groups, rows)
        grouped_down.kernel(h_rows, down, groups, rows, torch.bfloat16, torch.zeros(3, 2))


def int8_rows(is_hopper: bool) -> None:
    """Many rows of int8 times int8, in one product a tile and in two."""
    x = int8_quant.kernel(torch.zeros(129, 512, dtype=torch.bfloat16))
    w, scale = torch.zeros(576, 512, dtype=torch.int8), torch.ones(576, 1)
    for tile in TILES[:2] if is_hopper else OLD_TILES:
        y = torch.zeros(129, 576, dtype=torch.bfloat16)
        launch_large(x, w, scale, y, tile, tma=is_hopper)
