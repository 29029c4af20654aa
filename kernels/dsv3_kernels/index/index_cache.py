"""Index keys of one layer in the paged cache, and their FP8 form.

In FP8 a page is planar: the e4m3 values of all its slots, then their scales, one float32 power of
two each. The key is rotated by a Hadamard matrix first, which spreads its large values over all
dimensions. Reading such a page as if every key were followed by its scale raises no error, and
selects wrong positions; so all readers and writers take the views of this file.

Source: DeepSeek-V3.2's inference code (rotation, powers of two), and the page layout of the index
kernels in DeepGEMM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels.fp8_format import FP8, quantize
from dsv3_kernels.gemm._e4m3 import e4m3_floats

_SCALE_BYTES = 4


def index_key_bytes(dim: int) -> int:
    """Return the bytes of an index key of `dim` values and its scale in FP8."""
    return dim + _SCALE_BYTES


@dataclass(frozen=True, slots=True)
class IndexCache:
    """One layer's index keys on this rank.

    Attributes:
        slots: [slots, I] float32 or bfloat16; in FP8 [slots, I + 4] uint8, the memory of whole
            pages, in which a row is not an entry.
        slots_per_page: of this rank.
    """

    slots: Tensor
    slots_per_page: int

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.slots.device

    @property
    def is_fp8(self) -> bool:
        """True if the keys are rotated and in FP8."""
        return self.slots.dtype == torch.uint8

    @property
    def dim(self) -> int:
        """I, the values of a key."""
        return self.slots.shape[1] - _SCALE_BYTES * self.is_fp8

    def views(self) -> tuple[Tensor, Tensor]:
        """Return the values [pages, P, I] of all pages, and their scales [pages, P] float32.

        The values are uint8 in FP8. Otherwise there are no scales: [pages, 0], of their dtype.
        """
        P = self.slots_per_page
        dim = self.dim
        page_GY = self.slots.view(-1, P * self.slots.shape[1])
        values, scales = page_GY.split([P * dim, page_GY.shape[1] - P * dim], 1)
        if self.is_fp8:
            scales = scales.view(torch.float32)
        return values.unflatten(1, (P, dim)), scales

    def read(self, slot_S: Tensor) -> Tensor:
        """Return the keys of some slots [S], in float32, [S, I]."""
        if not self.is_fp8:
            return self.slots[slot_S].float()
        values, scales = self.views()
        page = slot_S // self.slots_per_page
        at = slot_S % self.slots_per_page
        return e4m3_floats(values[page, at].view(FP8)) * scales[page, at].unsqueeze(-1)

    def read_pages(self, page_G: Tensor) -> Tensor:
        """Return the keys of whole pages [G], in float32, [G * P, I]."""
        values, scales = (x.index_select(0, page_G) for x in self.views())
        if not self.is_fp8:
            return values.flatten(0, 1).float()
        return (e4m3_floats(values.view(FP8)) * scales.unsqueeze(-1)).flatten(0, 1)

    def write(self, slot_T: Tensor, key_TI: Tensor) -> None:
        """Store keys, not yet rotated, in distinct slots; skip those with slot -1."""
        is_own = slot_T >= 0
        slot_T = slot_T[is_own]
        key_TI = key_TI[is_own]
        if not self.is_fp8:
            self.slots[slot_T] = key_TI.to(self.slots.dtype)
            return
        values, scales = self.views()
        page = slot_T // self.slots_per_page
        at = slot_T % self.slots_per_page
        q_TI, scale_T = quantize_index(key_TI)
        values[page, at] = q_TI.view(torch.uint8)
        scales[page, at] = scale_T


def stages_of(dim: int) -> int:
    """Return the logarithm of `dim`, a power of two: the stages of a Hadamard rotation."""
    stages = dim.bit_length() - 1
    assert dim == 1 << stages, f"index keys of {dim} values, no power of two"
    return stages


def hadamard(x_TI: Tensor) -> Tensor:
    """Return x times the orthonormal Hadamard matrix, in the dtype of x; I is a power of two.

    A stage adds and subtracts neighbours. It moves the lowest bit of each index to the top, so that
    after all stages the bits are where they were.
    """
    dim = x_TI.shape[-1]
    x = x_TI.float()
    for _ in range(stages_of(dim)):
        even = x[..., ::2]
        odd = x[..., 1::2]
        x = torch.cat((even + odd, even - odd), -1)
    return (x * dim**-0.5).to(x_TI.dtype)


def quantize_index(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate vectors and quantize each with one scale, a power of two.

    Args:
        x_TI: [..., I], any float dtype; the rotated values are rounded to it.

    Returns:
        [..., I] float8_e4m3fn, and the scales [...] float32.
    """
    return quantize(hadamard(x_TI).float(), ue8m0=True)
