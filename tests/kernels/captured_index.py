"""The indexer and attention to its selection in a CUDA graph, on a GPU or in a dry run."""

import torch

from dsv3_kernels import (
    IndexCache,
    IndexWrite,
    PageTables,
    Paging,
    Rotation,
    index_key_bytes,
    index_queries,
    index_scores,
    mla_decode,
    select_slots,
    top_candidates,
    write_index_keys,
)


def capture(form: torch.dtype, device: torch.device) -> None:
    """Capture a step of two sequences of one of eight ranks, by tables of 160,000 positions."""
    dtype = torch.float32 if form == torch.float32 else torch.bfloat16
    width = index_key_bytes(128) if form == torch.uint8 else 128
    cache = IndexCache(torch.zeros(300 * 8, width, dtype=form, device=device), 8)
    angle, slot = torch.zeros(2, 32, device=device), torch.zeros(2, 1, device=device).long()
    tables = PageTables(slot.int().expand(2, 2500).contiguous(), slot, Paging(64, 8, 3))
    rotation = Rotation(angle, angle, False)
    q = torch.zeros(2, 64, 128, dtype=dtype, device=device)
    parts, ones = torch.zeros(16, 2, 64, device=device), torch.ones(128, device=device)
    latents = torch.zeros(300 * 8, 576, dtype=dtype, device=device)
    absorbed = torch.zeros(2, 1, 128, 576, dtype=dtype, device=device)

    def step() -> None:
        write_index_keys(IndexWrite(q[:, 0], ones, ones, rotation, cache, slot.flatten()))
        queries = index_queries(q, parts, rotation, cache.is_fp8)
        found = top_candidates(index_scores(*queries, cache, tables), 2048, tables)
        gathered = found[None].expand(8, -1, -1).contiguous()
        mla_decode(absorbed, latents, select_slots(gathered, 2048, tables), 512, 0.1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()


if __name__ == "__main__":
    for form in (torch.uint8, torch.bfloat16, torch.float32):
        capture(form, torch.device("cuda"))
