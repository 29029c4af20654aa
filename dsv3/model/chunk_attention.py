"""Expanded attention of prompt chunks: each to itself, then to its cached context.

The context is gathered from the cache and expanded to keys and values block by block; the partial
outputs of the blocks are merged by their log-sum-exp.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from dsv3.cache.pool import LayerCache
from dsv3.model.batch import Batch, Chunk
from dsv3_kernels import KeysValues, PartialOutputs, merge_lse, mla_prefill, mla_prefill_packed

# Cached positions gathered and expanded at a time; a multiple of every usual page size.
_BLOCK = 2048
# Blocks whose partial outputs are kept, then merged. With 2,048 queries and V3's 128 heads, each
# takes 134 MB.
_MERGED_BLOCKS = 4

# Entries [S, C + R] -> keys and values of the local heads.
Expand = Callable[[Tensor], KeysValues]


def attend_chunks(
    q_THX: Tensor, entry_TX: Tensor, expand: Expand, batch: Batch, cache: LayerCache, scale: float
) -> Tensor:
    """Attend from the rows of all chunks.

    A collective if a chunk has a cached context.

    Args:
        q_THX: [T, H, N + R] rotated queries of the chunks' rows.
        entry_TX: [T, C + R] their entries as the cache will return them, so that the output does
            not depend on where chunks were cut.
        expand: see `Expand`.
        batch: the step.
        cache: of this layer.
        scale: multiplies the scores.

    Returns:
        [T, H, V] the outputs of these rows.
    """
    assert batch.chunk_start_L is not None
    attended = mla_prefill_packed(
        q_THX,
        keys=expand(entry_TX),
        start_L=batch.chunk_start_L,
        longest=max(chunk.stop - chunk.start for chunk in batch.chunks),
        scale=scale,
    )
    for chunk in batch.chunks:
        if chunk.context_len:
            rows = slice(chunk.start - batch.num_decode_rows, chunk.stop - batch.num_decode_rows)
            merged = PartialOutputs(attended.o[rows], attended.lse[rows])
            parts = _context_parts(q_THX[rows], chunk, expand, cache, scale)
            while some := list(islice(parts, _MERGED_BLOCKS)):
                some.append(merged)
                o_NTHV = torch.stack([part.o for part in some])
                lse_NTH = torch.stack([part.lse for part in some])
                merged = merge_lse(o_NTHV, lse_NTH)
            attended.o[rows] = merged.o
    return attended.o


def _context_parts(
    q_QHX: Tensor, chunk: Chunk, expand: Expand, cache: LayerCache, scale: float
) -> Iterator[PartialOutputs]:
    """Attend from a chunk to its cached context, block by block."""
    context = chunk.context_len
    pages_per_block = max(1, _BLOCK // cache.layout.page_size)
    for first_page in range(0, cache.layout.pages_for(context), pages_per_block):
        first = first_page * cache.layout.page_size
        page_G = chunk.page_G[first_page : first_page + pages_per_block]
        length = min(context - first, len(page_G) * cache.layout.page_size)
        keys = expand(cache.gather(page_G, length, q_QHX.dtype))
        yield mla_prefill(q_QHX, keys=keys, first_key=first, first_query=context, scale=scale)
