"""`mla_decode` for the heads of several ranks, as an all-gather brings their queries.

The results are written as an all-to-all sends them back: no copy stands between.
"""

from torch import Tensor

from dsv3_kernels._triton import use_triton
from dsv3_kernels.attention._decode_tiles import Tile
from dsv3_kernels.attention.mla_decode import launch_decode, mla_decode_ref
from dsv3_kernels.attention.paging import Keys, Paging
from dsv3_kernels.attention.parts import open_parts


def mla_decode_parts_ref(
    q_PTHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    scale: float,
    parts_PTHY: Tensor,
    keys: Keys | None = None,
) -> None:
    """Define `mla_decode_parts`."""
    z_PTHC, lse_PTH = open_parts(parts_PTHY)
    P, T, H, C = z_PTHC.shape
    q_BQHX = q_PTHX.transpose(0, 1).flatten(1, 2).unflatten(0, query_pos_BQ.shape)
    rest = cache_SX, page_BG, query_pos_BQ, paging, C, scale, keys
    o_BQHC, lse_BQH = mla_decode_ref(q_BQHX, *rest)
    z_PTHC.copy_(o_BQHC.view(T, P, H, C).transpose(0, 1))
    lse_PTH.copy_(lse_BQH.view(T, P, H).transpose(0, 1))


def mla_decode_parts_triton(
    q_PTHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    scale: float,
    parts_PTHY: Tensor,
    tile: Tile | None = None,
) -> None:
    """Launch `mla_decode_parts`."""
    out = open_parts(parts_PTHY)
    launch_decode(q_PTHX, cache_SX, page_BG, query_pos_BQ, paging, scale, out, tile)


def mla_decode_parts(
    q_PTHX: Tensor,
    cache_SX: Tensor,
    page_BG: Tensor,
    query_pos_BQ: Tensor,
    paging: Paging,
    scale: float,
    parts_PTHY: Tensor,
    keys: Keys | None = None,
) -> None:
    """Do `mla_decode` for P ranks' heads, as an all-gather brings the queries.

    Args:
        q_PTHX: [P, B * Q, H, C + R], every rank's part contiguous.
        cache_SX: see `mla_decode`, as for the next three.
        page_BG: [B, G].
        query_pos_BQ: [B, Q].
        paging: which of the positions this rank holds, and where.
        scale: multiplies the scores.
        parts_PTHY: [P, B * Q, H, Y], as `parts.empty_parts` makes them: the results, written as
            an all-to-all sends them.
        keys: see `mla_decode`.
    """
    args = q_PTHX, cache_SX, page_BG, query_pos_BQ, paging, scale, parts_PTHY
    if use_triton(q_PTHX):
        mla_decode_parts_triton(*args)
    else:
        mla_decode_parts_ref(*args, keys)
