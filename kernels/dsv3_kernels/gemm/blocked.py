"""bfloat16 matrices in oneDNN's blocked layout, for products on CPUs that have bfloat16 units.

torch rearranges a plain matrix at each product, which may take as long as reading it. A blocked
matrix is an opaque tensor (`is_mkldnn`); `to_dense` restores the plain one.

A large matrix (the head) stays plain where the CPU has AMX: one row then takes a seventh less time,
16 rows take a twentieth more (measured with 102,400 x 2,048).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Fewer rows of x are padded to this number: oneDNN's product of one row takes a quarter longer.
_LEAST_ROWS = 4
# Values of a matrix that stays plain for products of one row.
_LARGE = 1 << 27


def has_blocked_product(w_FD: Tensor) -> bool:
    """Return True if products of the matrix on this CPU are faster in a blocked layout."""
    is_matrix = w_FD.device.type == "cpu" and w_FD.dtype == torch.bfloat16 and w_FD.numel() > 0
    if not is_matrix or not torch.backends.mkldnn.is_available():
        return False
    has_units = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if not has_units or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return not has_vector_product(w_FD)


def has_vector_product(w_FD: Tensor) -> bool:
    """Return True if one row is multiplied faster by the plain matrix (`torch.mv`).

    Args:
        w_FD: [..., F, D] bfloat16 on a CPU.
    """
    is_large = w_FD.shape[-2] * w_FD.shape[-1] >= _LARGE
    return is_large and bool(torch.cpu._is_amx_tile_supported())


def to_blocked(w_FD: Tensor) -> Tensor:
    """Return a copy in the blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight(w_FD, _LEAST_ROWS)


def blocked_linear(x_TD: Tensor, w_FD: Tensor) -> Tensor:
    """Return x W^T of bfloat16, summed in float32 and rounded once.

    Args:
        x_TD: [T, D].
        w_FD: [F, D] from `to_blocked`.
    """
    num_rows = len(x_TD)
    if not num_rows:
        return x_TD.new_empty((0, w_FD.shape[0]))
    x_TD = F.pad(x_TD, (0, 0, 0, max(0, _LEAST_ROWS - num_rows))).contiguous()
    y_TF = torch.ops.mkldnn._linear_pointwise(x_TD, w_FD, None, "none", [], "")
    return y_TF[:num_rows]
