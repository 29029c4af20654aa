"""`mla_decode` for the heads of several ranks, in the layouts of the collectives around it.

Queries come from an all-gather; the partial outputs are written in the layout that an all-to-all
sends back, without a copy.
"""

from torch import Tensor

from dsv3_kernels.attention._mla_decode_kernel import launch_decode
from dsv3_kernels.attention.mla_decode import mla_decode
from dsv3_kernels.attention.paging import PageTables
from dsv3_kernels.attention.parts import open_parts
from dsv3_kernels.operation import operation


def _launch_mla_decode_parts(
    q_PTHX: Tensor, cache_SX: Tensor, tables: PageTables, scale: float, parts_PTHY: Tensor
) -> None:
    launch_decode(q_PTHX, cache_SX, tables, scale, open_parts(parts_PTHY), None)


@operation(kernel=_launch_mla_decode_parts)
def mla_decode_parts(
    q_PTHX: Tensor, cache_SX: Tensor, tables: PageTables, scale: float, parts_PTHY: Tensor
) -> None:
    """Do `mla_decode` for P ranks' heads.

    Args:
        q_PTHX: [P, B * Q, H, C + R] of an all-gather, every rank's part contiguous.
        cache_SX: see `mla_decode`.
        tables: the keys of the queries.
        scale: multiplies the scores.
        parts_PTHY: [P, B * Q, H, Y] from `empty_parts`: the results, to be written.
    """
    out = open_parts(parts_PTHY)
    P, T, H, C = out.o.shape
    q_BQHX = q_PTHX.transpose(0, 1).flatten(1, 2).unflatten(0, tables.query_pos_BQ.shape)
    o_BQHC, lse_BQH = mla_decode.reference(q_BQHX, cache_SX, tables, C, scale)
    out.o.copy_(o_BQHC.view(T, P, H, C).transpose(0, 1))
    out.lse.copy_(lse_BQH.view(T, P, H).transpose(0, 1))
