"""Arguments of `mla_decode` for tests."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_kernels import PageTables, Paging, mla_decode
from dsv3_kernels.attention._decode_tiles import Tile
from dsv3_kernels.attention.mla_decode import launch_mla_decode
from dsv3_kernels.attention.paging import Keys
from tests.kernels.paged import scatter

H = 3
C = 16
R = 8
PAGE = 16

# float32 in another order of summation: 2.2e-6 on one processor, below 2e-6 on others.
TOLERANCE = 4e-6


class Dims(NamedTuple):
    """Heads, value dim and rotary dim."""

    heads: int = H
    value: int = C
    rotary: int = R


class Arguments(NamedTuple):
    """Arguments of `mla_decode`."""

    q: Tensor
    cache: Tensor
    page: Tensor
    query_pos: Tensor
    paging: Paging
    value_dim: int
    scale: float


def make(
    lengths: list[int], queries: int, paging: Paging | None = None, dims: Dims | None = None
) -> tuple[list[Tensor], Arguments]:
    """Return keys and the arguments of `mla_decode`; the queries are the last positions."""
    paging = paging or Paging(PAGE)
    heads, value, rotary = dims or Dims()
    torch.manual_seed(0)
    keys = [torch.randn(n, value + rotary) for n in lengths]
    q = torch.randn(len(lengths), queries, heads, value + rotary)
    query_pos = torch.tensor([[n - queries + i for i in range(queries)] for n in lengths])
    cache, page = scatter(keys, paging)
    return keys, Arguments(q, cache, page, query_pos, paging, value, 0.25)


def decode(
    args: Arguments,
    keys: Keys | None = None,
    op: Callable[..., tuple[Tensor, Tensor]] = mla_decode,
) -> tuple[Tensor, Tensor]:
    tables = PageTables(args.page, args.query_pos, args.paging, keys)
    return op(args.q, args.cache, tables, args.value_dim, args.scale)


def run(args: Arguments, tile: Tile) -> tuple[Tensor, Tensor]:
    """Run the kernel with a tile."""
    tables = PageTables(args.page, args.query_pos, args.paging)
    return launch_mla_decode(args.q, args.cache, tables, args.value_dim, args.scale, tile)
