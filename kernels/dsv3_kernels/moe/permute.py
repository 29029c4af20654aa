"""Rows in the order of their experts, and back: `permute` tells where, `unpermute` sums.

An entry (t, k) says that token t chose an expert as its k-th. Sorted by expert (stable, so by token
within one) the entries become rows; those of experts that are held elsewhere come last and are no
rows. All sizes are upper bounds known on the host and all counts stay on the device, so that the
launches are the same whatever was chosen.

Bound: `permute` by latency (every expert's program reads all ids), `unpermute` by bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels._triton import in_turn, launch_options, tl, triton, use_triton


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong to which expert.

    Args:
        start_E: [E] int32 first row of each expert.
        count_E: [E] int32 rows of each expert.
        entry_M: [M] int32 t * K + k of each row, -1 after the last row; None where rows are not
            sorted entries (`masked_groups`).
        slot_TK: [T, K] int32 row of each entry, -1 where its expert is held elsewhere.
    """

    start_E: Tensor
    count_E: Tensor
    entry_M: Tensor | None = None
    slot_TK: Tensor | None = None


def masked_groups(count_E: Tensor, capacity: int) -> Groups:
    """Return the groups of rows laid out as [E, capacity], the first count_E of each valid."""
    start_E = torch.arange(len(count_E), dtype=torch.int32, device=count_E.device) * capacity
    return Groups(start_E, count_E.to(torch.int32))


def permute_ref(ids_TK: Tensor, first_expert: int, num_local: int) -> Groups:
    """Define `permute`."""
    local = ids_TK.flatten() - first_expert
    local = torch.where((local >= 0) & (local < num_local), local, num_local)
    order = local.argsort(stable=True)
    count = torch.zeros(num_local + 1, dtype=torch.int64, device=ids_TK.device)
    count.scatter_add_(0, local, torch.ones_like(local))
    num_rows = len(order) - count[-1]
    row = torch.arange(len(order), device=ids_TK.device)
    slot = torch.empty_like(row)
    slot[order] = torch.where(row < num_rows, row, -1)
    entry = torch.where(row < num_rows, order, -1)
    count_E = count[:-1]
    start_E = count_E.cumsum(0) - count_E
    return Groups(start_E.int(), count_E.int(), entry.int(), slot.view(ids_TK.shape).int())


@triton.jit(do_not_specialize=["first_expert", "num_entries"])
def _permute_kernel(
    ids, entries, slots, starts, counts, first_expert, E, num_entries, BLOCK: tl.constexpr
):
    """Place the entries of one expert; the last program's are those of no expert held here."""
    in_turn()
    e = tl.program_id(0)
    step = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_entries, BLOCK):
        entry = first + step
        local = tl.load(ids + entry, mask=entry < num_entries, other=-1) - first_expert
        local = tl.where((local >= 0) & (local < E), local, E)
        real = entry < num_entries
        before += (real & (local < e)).to(tl.int32)
        equal += (real & (local == e)).to(tl.int32)
    row = tl.sum(before, 0)
    if e < E:
        tl.store(starts + e, row)
        tl.store(counts + e, tl.sum(equal, 0))
    for first in range(0, num_entries, BLOCK):
        entry = first + step
        local = tl.load(ids + entry, mask=entry < num_entries, other=-1) - first_expert
        local = tl.where((local >= 0) & (local < E), local, E)
        mine = (entry < num_entries) & (local == e)
        slot = row + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(entries + slot, tl.where(e < E, entry, -1), mask=mine)
        tl.store(slots + entry, tl.where(e < E, slot, -1), mask=mine)
        row += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _permute_few(
    ids,
    entries,
    slots,
    starts,
    counts,
    first_expert,
    E,
    num_entries,
    SIZE: tl.constexpr,
):
    """Do all of `permute` for entries whose ids one program holds, [SIZE]."""
    EXPERTS: tl.constexpr = 32  # at a time
    entry = tl.arange(0, SIZE)
    local = ids - first_expert
    local = tl.where((entry < num_entries) & (local >= 0) & (local < E), local, E).to(tl.int32)
    # All different. An entry's row is how many there are before it.
    key = local * SIZE + entry
    row = tl.sum((key[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(entries + row, tl.where(local < E, entry, -1), mask=entry < num_entries)
    tl.store(slots + entry, tl.where(local < E, row, -1), mask=entry < num_entries)
    for first in range(0, E, EXPERTS):
        e = first + tl.arange(0, EXPERTS)
        before = (local[None, :] < e[:, None]).to(tl.int32)
        equal = (local[None, :] == e[:, None]).to(tl.int32)
        tl.store(starts + e, tl.sum(before, 1), mask=e < E)
        tl.store(counts + e, tl.sum(equal, 1), mask=e < E)


@triton.jit
def permute_last(
    ids,
    chosen,
    locks,
    T,
    entries,
    slots,
    starts,
    counts,
    first_expert,
    E,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Do all of `permute` in the program that ends last of T, one for each row of `ids`.

    ALONE, it has its ids in registers: `chosen`, K filled up. With a SIZE of 0 nothing is done.
    """
    into = (entries, slots, starts, counts, first_expert, E)
    if SIZE > 0 and ALONE:
        _permute_few(chosen, *into, K, SIZE=chosen.shape[0])
    elif SIZE > 0:
        # All threads' stores come before the count, the count before the loads.
        tl.debug_barrier()
        if tl.atomic_add(locks, 1, sem="acq_rel") == T - 1:
            entry = tl.arange(0, SIZE)
            every = tl.load(ids + entry, mask=entry < T * K, other=-1, cache_modifier=".cg")
            _permute_few(every, *into, T * K, SIZE=SIZE)
            tl.store(locks, 0)  # as the next launch expects it


def empty_groups(
    shape: tuple[int, int], num_local: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memory for the fields of `Groups` of [T, K] entries, in their order."""
    start_E, count_E = torch.empty((2, num_local), dtype=torch.int32, device=device).unbind()
    entry_M = torch.empty(shape[0] * shape[1], dtype=torch.int32, device=device)
    return start_E, count_E, entry_M, torch.empty(shape, dtype=torch.int32, device=device)


def permute_triton(ids_TK: Tensor, first_expert: int, num_local: int) -> Groups:
    """Launch one program per local expert and one for all others."""
    assert ids_TK.is_contiguous() and ids_TK.numel() < 2**31, f"{ids_TK.shape=}"
    num_entries = ids_TK.numel()
    (T, K), device = ids_TK.shape, ids_TK.device
    start_E, count_E, entry_M, slot_TK = empty_groups((T, K), num_local, device)
    block, warps = (1024, 4) if num_entries <= 1024 else (4096, 8)
    _permute_kernel[(num_local + 1,)](
        ids_TK,
        entry_M,
        slot_TK,
        start_E,
        count_E,
        first_expert,
        num_local,
        num_entries,
        BLOCK=block,
        num_warps=warps,
        **launch_options(),
    )
    return Groups(start_E, count_E, entry_M, slot_TK)


def permute(ids_TK: Tensor, first_expert: int, num_local: int) -> Groups:
    """Sort the entries of the local experts.

    Args:
        ids_TK: [T, K] int64 expert ids, contiguous; any outside the local range is skipped.
        first_expert: id of the first local expert.
        num_local: local experts.

    Returns:
        groups: rows of the local experts in order; M = T * K, of which sum(count_E) are rows.
    """
    if use_triton(ids_TK):
        return permute_triton(ids_TK, first_expert, num_local)
    return permute_ref(ids_TK, first_expert, num_local)


def unpermute_ref(
    y_MD: Tensor, slot_TK: Tensor, weight_TK: Tensor | None = None, also_TD: Tensor | None = None
) -> Tensor:
    """Define `unpermute`: one sum in the order of k, then what else is added."""
    y_TD = y_MD.new_zeros((slot_TK.shape[0], y_MD.shape[1]), dtype=torch.float32)
    for k, slot_T in enumerate(slot_TK.long().unbind(1)):
        rows = slot_T >= 0
        part = y_MD[slot_T[rows]].float()
        y_TD[rows] += part if weight_TK is None else part * weight_TK[rows, k, None]
    return y_TD if also_TD is None else y_TD.add_(also_TD)


@triton.jit
def _unpermute_kernel(
    y_rows,
    slots,
    weights,
    also,
    y,
    D,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the rows of one token over a block of columns."""
    in_turn()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slots + token * K + k).to(tl.int64)
        mask = column < tl.where(slot >= 0, D, 0)
        part = tl.load(y_rows + slot * D + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * K + k)
        total += tl.where(slot >= 0, part, 0.0)
    at = token * D + column
    if ADD:
        total += tl.load(also + at, mask=column < D, other=0.0).to(tl.float32)
    tl.store(y + at, total, mask=column < D)


def unpermute_triton(
    y_MD: Tensor, slot_TK: Tensor, weight_TK: Tensor | None = None, also_TD: Tensor | None = None
) -> Tensor:
    """Launch one program per token and 1024 columns."""
    (T, K), D = slot_TK.shape, y_MD.shape[1]
    assert y_MD.is_contiguous() and slot_TK.is_contiguous(), f"{y_MD.stride()=}"
    y_TD = y_MD.new_empty((T, D), dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(D))
    if T:
        _unpermute_kernel[(T, triton.cdiv(D, block))](
            y_MD,
            slot_TK,
            y_MD if weight_TK is None else weight_TK.contiguous(),
            y_MD if also_TD is None else also_TD.contiguous(),
            y_TD,
            D,
            K=K,
            WEIGHTED=weight_TK is not None,
            ADD=also_TD is not None,
            BLOCK=block,
            **launch_options(),
        )
    return y_TD


def unpermute(
    y_MD: Tensor, slot_TK: Tensor, weight_TK: Tensor | None = None, also_TD: Tensor | None = None
) -> Tensor:
    """Sum every token's rows in float32, in the order of k, so always in the same one.

    Args:
        y_MD: [M, D] rows as `permute` ordered them, any float dtype, contiguous.
        slot_TK: [T, K] int32 row of each entry, -1 for none.
        weight_TK: [T, K] float32 factor of each entry, or None where the rows are weighted.
        also_TD: [T, D], any float dtype: added last; None for nothing.

    Returns:
        [T, D] float32; a token without rows has but what is added.
    """
    op = unpermute_triton if use_triton(y_MD) else unpermute_ref
    return op(y_MD, slot_TK, weight_TK, also_TD)
