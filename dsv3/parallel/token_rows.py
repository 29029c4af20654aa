"""Rows of expert dispatch: tokens with their choice of experts, and their form as bytes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.settings import DispatchVariant
from dsv3_kernels import act_quant, weight_dequant
from dsv3_kernels.fp8_format import BLOCK, FP8


class TokenRows(NamedTuple):
    """Tokens with their choice of experts, one row each.

    Attributes:
        x_MD: hidden states.
        ids_MK: ids of physical experts; -1 for none.
        weight_MK: float32 weights of the experts.
    """

    x_MD: Tensor
    ids_MK: Tensor
    weight_MK: Tensor


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """Settings of the exchange of tokens.

    Attributes:
        variant: "allreduce", "alltoall", or "auto", which decides by the number of tokens.
        dtype: of hidden states during dispatch; e4m3 has a scale per 128 values, None keeps the
            activations' dtype. Sums are sent back in the activations' dtype.
        groups: number of groups of neighbouring experts, and the number of groups that a token
            chooses from.
        ue8m0: FP8 scales are powers of two, as in the experts' products: then quantizing received
            FP8 values again does not change them.
    """

    variant: DispatchVariant = "auto"
    dtype: torch.dtype | None = None
    groups: tuple[int, int] = (1, 1)
    ue8m0: bool = False


def serialize_rows(rows: TokenRows, settings: DispatchSettings) -> Tensor:
    """Return each row's hidden state, ids and weights as bytes, [M, bytes per row] uint8."""
    x_MD = rows.x_MD
    if settings.dtype == FP8:
        parts = [*act_quant(x_MD.contiguous(), settings.ue8m0)]
    else:
        parts = [x_MD.to(settings.dtype or x_MD.dtype)]
    parts += [rows.ids_MK.int(), rows.weight_MK]
    if not len(x_MD):  # a reduction over no rows leaves strides that `view` refuses
        parts = [part.new_empty(part.shape) for part in parts]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def deserialize_rows(data: Tensor, like: TokenRows, settings: DispatchSettings) -> TokenRows:
    """Undo `serialize_rows`.

    Args:
        data: [M, bytes per row] uint8.
        like: rows of the same widths and dtypes.
        settings: as for `serialize_rows`.
    """
    dim = like.x_MD.shape[1]
    top_k = like.ids_MK.shape[1]
    dtype = settings.dtype or like.x_MD.dtype
    num_scale_bytes = 4 * (dim // BLOCK) if dtype == FP8 else 0
    widths = [dim * dtype.itemsize, num_scale_bytes, 4 * top_k, 4 * top_k]
    x, scale, ids, weight = data.split(widths, dim=1)
    x = x.view(dtype)
    if dtype == FP8:
        x = weight_dequant(x, scale.view(torch.float32), like.x_MD.dtype, block=(1, BLOCK))
    return TokenRows(
        x_MD=x.to(like.x_MD.dtype),
        ids_MK=ids.view(torch.int32).to(like.ids_MK.dtype),
        weight_MK=weight.view(like.weight_MK.dtype),
    )
