"""Index scores of the cached positions that this rank stores. Bound by FLOPs at many heads.

I(t, s) = sum_h w_h(t) relu(q_h(t) . k(s)), -inf where a query does not see a key.
"""

import torch
from torch import Tensor

from dsv3_kernels.attention.paging import PageTables
from dsv3_kernels.index.index_cache import IndexCache

# Products in memory at a time in the reference: 4 MiB of float32, which fit a processor's cache.
_PRODUCTS = 1 << 20


def index_scores(q_THI: Tensor, weight_TH: Tensor, cache: IndexCache, tables: PageTables) -> Tensor:
    """Return the scores of all positions of the page tables that this rank stores.

    Args:
        q_THI: [B * Q, H, I] from `index_queries`.
        weight_TH: [B * Q, H] float32 from `index_queries`.
        cache: the index keys; FP8 if the queries are.
        tables: of the B sequences.

    Returns:
        [B * Q, tables.capacity] float32, in order of position.

    Source: DeepSeek-V3.2 report, eq. 1.
    """
    B, Q = tables.query_pos_BQ.shape
    _, H, dim = q_THI.shape
    paging = tables.paging
    capacity = tables.capacity
    slot_P = torch.arange(paging.slots_per_page, device=q_THI.device)
    slot_BS = (tables.page_BG[..., None].long() * paging.slots_per_page + slot_P).flatten(1)
    key_pos_S = torch.arange(capacity, device=q_THI.device) * paging.shards + paging.shard
    q_BYI = q_THI.float().view(B, Q * H, dim)
    weight_BQH = weight_TH.view(B, Q, 1, H)
    score_BQS = weight_TH.new_empty(B, Q, capacity)
    step = max(1, _PRODUCTS // (Q * H))
    for b in range(B):
        seen = paging.local_len(int(tables.query_pos_BQ[b].max()) + 1)
        for s in range(0, seen, step):
            slots = slice(s, min(s + step, seen))
            key_SI = cache.read(slot_BS[b, slots])
            product_QHS = (q_BYI[b] @ key_SI.T).relu_().view(Q, H, -1)
            torch.matmul(weight_BQH[b], product_QHS, out=score_BQS[b, :, slots].unsqueeze(1))
    is_later_BQS = key_pos_S > tables.query_pos_BQ.unsqueeze(2)
    return score_BQS.masked_fill_(is_later_BQS, float("-inf")).flatten(0, 1)
