"""MLA decode attention in the absorbed form, over the cached latents themselves."""

import torch
from torch import Tensor

from dsv3_kernels._cast import as_float32
from dsv3_kernels._gpu import cdiv
from dsv3_kernels.attention._decode_tiles import Tile
from dsv3_kernels.attention._mla_decode_kernel import launch_decode
from dsv3_kernels.attention.kv_fp8 import unpack_latent
from dsv3_kernels.attention.merge_lse import softmax, softmax_lse
from dsv3_kernels.attention.paging import Keys, PageTables
from dsv3_kernels.attention.parts import PartialOutputs
from dsv3_kernels.operation import operation

# Values in memory at a time in the reference: 4 MiB of float32, which fit a processor's cache.
_SCORES = 1 << 20


def _attend(
    q_BQHX: Tensor, cache_SX: Tensor, keys: Keys, value_dim: int, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the references for few sequences, with all keys in memory at once."""
    B, Q, H, _ = q_BQHX.shape
    scaled = as_float32(q_BQHX.flatten(1, 2)) * scale  # a sequence's Q * H queries share its keys
    kv = cache_SX.index_select(0, keys.slot_BS.flatten())
    if kv.dtype == torch.uint8:
        kv = unpack_latent(kv, value_dim, torch.float32)
    kv_BSX = as_float32(kv).view(B, -1, kv.shape[-1])
    score = torch.bmm(scaled, kv_BSX.transpose(1, 2))
    if keys.mask_BQS is not None:
        score.add_(_per_head(keys.mask_BQS, H))
    is_blind = None if keys.is_blind_BQ is None else _per_head(keys.is_blind_BQ, H)
    lse = None
    if with_lse:
        p, lse = softmax_lse(score, is_blind)
        lse = lse.view(B, Q, H)
    else:
        p = softmax(score, is_blind)
    return torch.bmm(p, kv_BSX[..., :value_dim]).view(B, Q, H, value_dim), lse


def _per_head(x_BQ: Tensor, num_heads: int) -> Tensor:
    """Repeat values of queries for all heads, as [B, Q * H, ...]; one query's are broadcast."""
    return x_BQ if x_BQ.shape[1] == 1 else x_BQ.repeat_interleave(num_heads, 1)


def _attend_in_parts(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    tables: PageTables,
    value_dim: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the references, a part of the sequences at a time."""
    B, Q, H, X = q_BQHX.shape
    keys = tables.expanded()
    most = max(1, _SCORES // max(1, len(keys.key_pos_S) * max(Q * H, X)))
    if most >= B:
        return _attend(q_BQHX, cache_SX, keys, value_dim, scale, with_lse)
    step = cdiv(B, cdiv(B, most))
    outs = []
    lses = []
    for b in range(0, B, step):
        some = keys.sequences(b, b + step)
        o, lse = _attend(q_BQHX[b : b + step], cache_SX, some, value_dim, scale, with_lse)
        outs.append(o)
        if lse is not None:
            lses.append(lse)
    return torch.cat(outs), torch.cat(lses) if lses else None


def launch_mla_decode(
    q_BQHX: Tensor,
    cache_SX: Tensor,
    tables: PageTables,
    value_dim: int,
    scale: float,
    tile: Tile | None,
) -> PartialOutputs:
    """Launch `mla_decode` with programs of this shape; None for the best one."""
    B, Q, H, X = q_BQHX.shape
    o = torch.empty(B, Q, H, value_dim, dtype=torch.float32, device=q_BQHX.device)
    lse = o.new_empty(B, Q, H)
    q_PTHX = q_BQHX.contiguous().view(1, B * Q, H, X)
    out = PartialOutputs(o.view(1, B * Q, H, value_dim), lse.view(1, B * Q, H))
    launch_decode(q_PTHX, cache_SX, tables, scale, out, tile)
    return PartialOutputs(o, lse)


def _launch_mla_decode(
    q_BQHX: Tensor, cache_SX: Tensor, tables: PageTables, value_dim: int, scale: float
) -> PartialOutputs:
    return launch_mla_decode(q_BQHX, cache_SX, tables, value_dim, scale, None)


@operation(kernel=_launch_mla_decode)
def mla_decode(
    q_BQHX: Tensor, cache_SX: Tensor, tables: PageTables, value_dim: int, scale: float
) -> PartialOutputs:
    """Attend to cached latents, all heads sharing one key (the absorbed form).

    A key is a whole cache entry (latent, then rotated key), its value the latent.

    Args:
        q_BQHX: [B, Q, H, C + R] absorbed queries of B sequences.
        cache_SX: [slots, C + R], one layer of this rank's cache; uint8 for the packed FP8 form.
        tables: the keys of the queries.
        value_dim: C.
        scale: multiplies the scores.

    Returns:
        o_BQHC: [B, Q, H, C] float32, 0 for a query without keys.
        lse_BQH: [B, Q, H] float32, -inf for a query without keys.

    Source: DeepSeek-V2 paper, 2.1.2 and appendix C (absorption of W_UK and W_UV).
    """
    o_BQHC, lse_BQH = _attend_in_parts(q_BQHX, cache_SX, tables, value_dim, scale, True)
    assert lse_BQH is not None
    return PartialOutputs(o_BQHC, lse_BQH)


def _launch_mla_decode_values(
    q_BQHX: Tensor, cache_SX: Tensor, tables: PageTables, value_dim: int, scale: float
) -> Tensor:
    return _launch_mla_decode(q_BQHX, cache_SX, tables, value_dim, scale).o


@operation(kernel=_launch_mla_decode_values)
def mla_decode_values(
    q_BQHX: Tensor, cache_SX: Tensor, tables: PageTables, value_dim: int, scale: float
) -> Tensor:
    """Return the outputs of `mla_decode` alone, where no other rank has keys to merge."""
    return _attend_in_parts(q_BQHX, cache_SX, tables, value_dim, scale, False)[0]
