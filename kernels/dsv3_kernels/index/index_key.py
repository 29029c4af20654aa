"""Index keys from their projection: normalize, rotate, round, store. Bound by latency."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.attention.rope import Rotation, apply_rope
from dsv3_kernels.gemm._e4m3 import is_native
from dsv3_kernels.gemm.act_quant import quantize_block
from dsv3_kernels.index._index_rows import hadamard_rows, partner_of, turn_rows
from dsv3_kernels.index.index_cache import IndexCache, stages_of
from dsv3_kernels.operation import operation

# Of DeepSeek's and transformers' indexers, independent of the config's rms_norm_eps.
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class IndexWrite:
    """The keys of new tokens, and the slots for them.

    Attributes:
        key_TI: [T, I] as projected; rows may be strided.
        weight_I, bias_I: [I] float32, of the LayerNorm.
        rotation: of the first dimensions of the keys, as many as it has.
        cache: written in place.
        slot_T: [T] int64, distinct except for -1, which stores nothing.
    """

    key_TI: Tensor
    weight_I: Tensor
    bias_I: Tensor
    rotation: Rotation
    cache: IndexCache
    slot_T: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.key_TI.device


@triton.jit
def _normalize(x, mean, inverse, weight_ptr, bias_ptr, i):
    weight = tl.load(weight_ptr + i)
    bias = tl.load(bias_ptr + i)
    return (x - mean) * inverse * weight + bias


@triton.jit(do_not_specialize=["slot_ptr"])
def _index_key_kernel(
    key_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    value_ptr,
    scale_ptr,
    stride_key,
    stride_page,
    stride_page_scale,
    eps,
    I: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    IS_FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ROOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute and store a token's key, unless it is of another rank."""
    in_turn()
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + t).to(tl.int64)
    if slot >= 0:
        dtype = key_ptr.dtype.element_ty
        i = tl.arange(0, I)[None, :]
        other = tl.where(i < 2 * HALF, partner_of(i, HALF, INTERLEAVED), i)
        x = tl.load(key_ptr + t * stride_key + i).to(tl.float32)
        partner = tl.load(key_ptr + t * stride_key + other).to(tl.float32)
        mean = tl.sum(x, 1)[:, None] / I
        variance = tl.sum((x - mean) * (x - mean), 1)[:, None] / I
        inverse = tl.rsqrt(variance + eps)
        x = _normalize(x, mean, inverse, weight_ptr, bias_ptr, i).to(dtype).to(tl.float32)
        partner = _normalize(partner, mean, inverse, weight_ptr, bias_ptr, other)
        partner = partner.to(dtype).to(tl.float32)
        x = turn_rows(x, partner, i, cos_ptr, sin_ptr, t, HALF, INTERLEAVED).to(dtype)
        page = slot // PAGE
        at = slot % PAGE
        value_at = value_ptr + page * stride_page + at * I + i
        if IS_FP8:
            x = hadamard_rows(x.to(tl.float32), ROOT, STAGES).to(dtype).to(tl.float32)
            code, scale = quantize_block(x, True, NATIVE)
            tl.store(value_at, code.to(tl.uint8, bitcast=True))
            tl.store(scale_ptr + page * stride_page_scale + at + tl.arange(0, 1), scale)
        else:
            tl.store(value_at, x.to(value_ptr.dtype.element_ty))


def _launch_write_index_keys(write: IndexWrite) -> None:
    """Launch a program per token."""
    T, dim = write.key_TI.shape
    cache = write.cache
    assert write.key_TI.stride(1) == 1 and cache.slots.is_contiguous(), f"{write.key_TI.stride()=}"
    write.rotation.check_contiguous()
    values, scales = cache.views()
    if T:
        _index_key_kernel[(T,)](
            key_ptr=write.key_TI,
            weight_ptr=write.weight_I,
            bias_ptr=write.bias_I,
            cos_ptr=write.rotation.cos_Tr,
            sin_ptr=write.rotation.sin_Tr,
            slot_ptr=write.slot_T,
            value_ptr=values,
            scale_ptr=scales,
            stride_key=write.key_TI.stride(0),
            stride_page=values.stride(0),
            stride_page_scale=scales.stride(0),
            eps=_EPS,
            I=dim,
            HALF=write.rotation.cos_Tr.shape[1],
            INTERLEAVED=write.rotation.interleaved,
            PAGE=cache.slots_per_page,
            IS_FP8=cache.is_fp8,
            NATIVE=is_native(write.key_TI),
            ROOT=dim**-0.5,
            STAGES=stages_of(dim),
            num_warps=1,
            **launch_options(),
        )


@operation(kernel=_launch_write_index_keys)
def write_index_keys(write: IndexWrite) -> None:
    """Store LayerNorm(key), its first dimensions rotated, in the cache's format.

    Source: DeepSeek-V3.2 report, section 2.1 (lightning indexer).
    """
    dim = (write.key_TI.shape[1],)
    k_TI = F.layer_norm(write.key_TI.float(), dim, write.weight_I, write.bias_I, _EPS)
    k_TI = k_TI.to(write.key_TI.dtype)
    split = 2 * write.rotation.cos_Tr.shape[1]
    turned_TR = apply_rope(k_TI[:, :split], write.rotation)
    write.cache.write(write.slot_T, torch.cat((turned_TR, k_TI[:, split:]), 1))
