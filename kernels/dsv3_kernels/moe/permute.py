"""Sorting of entries by expert (`permute`), and the sum over a token's rows (`unpermute`).

Entry (t, k) is the k-th expert chosen by token t. Sorted by expert (stable, so by token within one)
the entries of local experts become rows; entries of other ranks' experts come last and are no rows.
All sizes are upper bounds known on the host, and all counts stay on the device, so the launches do
not depend on the choice of experts.

Bound: `permute` by latency (every expert's program reads all ids), `unpermute` by bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2, row_bucket
from dsv3_kernels._triton import in_turn, launch_options, tl, triton
from dsv3_kernels.operation import operation


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """The experts of this rank.

    Attributes:
        first: id of the first local expert.
        count: number of local experts; their ids are consecutive.
    """

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Groups:
    """The rows of each expert.

    Attributes:
        start_E: [E] int32 first row of each expert.
        count_E: [E] int32 rows of each expert.
        entry_M: [M] int32 t * K + k of each row, -1 after the last row.
        row_TK: [T, K] int32 row of each entry, -1 if its expert is on another rank.
    """

    start_E: Tensor
    count_E: Tensor
    entry_M: Tensor
    row_TK: Tensor


@triton.jit(do_not_specialize=["first_expert", "num_entries"])
def _permute_kernel(
    ids, entries, rows, starts, counts, first_expert, E, num_entries, BLOCK: tl.constexpr
):
    """Place the entries of one expert; the last program places those of other ranks' experts."""
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
        target = row + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(entries + target, tl.where(e < E, entry, -1), mask=mine)
        tl.store(rows + entry, tl.where(e < E, target, -1), mask=mine)
        row += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _permute_few(
    ids,
    entries,
    rows,
    starts,
    counts,
    first_expert,
    E,
    num_entries,
    SIZE: tl.constexpr,
):
    """Do `permute` in one program that holds the ids of all entries, [SIZE]."""
    EXPERTS: tl.constexpr = 32  # at a time
    entry = tl.arange(0, SIZE)
    local = ids - first_expert
    local = tl.where((entry < num_entries) & (local >= 0) & (local < E), local, E).to(tl.int32)
    # Keys are distinct, so an entry's row is the number of smaller keys.
    key = local * SIZE + entry
    row = tl.sum((key[None, :] < key[:, None]).to(tl.int32), 1)
    tl.store(entries + row, tl.where(local < E, entry, -1), mask=entry < num_entries)
    tl.store(rows + entry, tl.where(local < E, row, -1), mask=entry < num_entries)
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
    rows,
    starts,
    counts,
    first_expert,
    E,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Do `permute` in the last of T programs to end, one for each row of `ids`.

    If ALONE (T = 1), the ids are in registers: `chosen`, K padded. Does nothing if SIZE is 0.
    """
    if SIZE > 0 and ALONE:
        _permute_few(
            ids=chosen,
            entries=entries,
            rows=rows,
            starts=starts,
            counts=counts,
            first_expert=first_expert,
            E=E,
            num_entries=K,
            SIZE=chosen.shape[0],
        )
    elif SIZE > 0:
        # All threads' stores come before the count, the count before the loads.
        tl.debug_barrier()
        if tl.atomic_add(locks, 1, sem="acq_rel") == T - 1:
            entry = tl.arange(0, SIZE)
            all_ids = tl.load(ids + entry, mask=entry < T * K, other=-1, cache_modifier=".cg")
            _permute_few(
                ids=all_ids,
                entries=entries,
                rows=rows,
                starts=starts,
                counts=counts,
                first_expert=first_expert,
                E=E,
                num_entries=T * K,
                SIZE=SIZE,
            )
            tl.store(locks, 0)  # as the next launch expects it


def empty_groups(shape: tuple[int, int], num_local: int, device: torch.device) -> Groups:
    """Return uninitialized memory for the groups of [T, K] entries."""
    start_E, count_E = torch.empty((2, num_local), dtype=torch.int32, device=device).unbind()
    return Groups(
        start_E=start_E,
        count_E=count_E,
        entry_M=torch.empty(shape[0] * shape[1], dtype=torch.int32, device=device),
        row_TK=torch.empty(shape, dtype=torch.int32, device=device),
    )


def _launch_permute(ids_TK: Tensor, local: LocalExperts) -> Groups:
    """Launch one program per local expert, and one for the entries of all other experts."""
    assert ids_TK.is_contiguous() and ids_TK.numel() < 2**31, f"{ids_TK.shape=}"
    num_entries = ids_TK.numel()
    T, K = ids_TK.shape
    groups = empty_groups((T, K), local.count, ids_TK.device)
    is_short = row_bucket(T) * K <= 1024
    _permute_kernel[(local.count + 1,)](
        ids=ids_TK,
        entries=groups.entry_M,
        rows=groups.row_TK,
        starts=groups.start_E,
        counts=groups.count_E,
        first_expert=local.first,
        E=local.count,
        num_entries=num_entries,
        BLOCK=1024 if is_short else 4096,
        num_warps=4 if is_short else 8,
        **launch_options(),
    )
    return groups


@operation(kernel=_launch_permute)
def permute(ids_TK: Tensor, local: LocalExperts) -> Groups:
    """Sort the entries of the local experts.

    Args:
        ids_TK: [T, K] int64 expert ids, contiguous; ids outside the local range are skipped.
        local: experts of this rank.

    Returns:
        groups: rows of the local experts in order; M = T * K, of which sum(count_E) are rows.
    """
    index = ids_TK.flatten() - local.first
    index = torch.where((index >= 0) & (index < local.count), index, local.count)
    order = index.argsort(stable=True)
    count = torch.zeros(local.count + 1, dtype=torch.int64, device=ids_TK.device)
    count.scatter_add_(0, index, torch.ones_like(index))
    num_rows = len(order) - count[-1]
    row = torch.arange(len(order), device=ids_TK.device)
    row_of_entry = torch.empty_like(row)
    row_of_entry[order] = torch.where(row < num_rows, row, -1)
    entry = torch.where(row < num_rows, order, -1)
    count_E = count[:-1]
    start_E = count_E.cumsum(0) - count_E
    return Groups(start_E.int(), count_E.int(), entry.int(), row_of_entry.view(ids_TK.shape).int())


@triton.jit
def _unpermute_kernel(
    y_rows,
    rows,
    addend,
    y,
    D,
    K: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the rows of one token over a block of columns."""
    in_turn()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows + token * K + k).to(tl.int64)
        mask = column < tl.where(row >= 0, D, 0)
        part = tl.load(y_rows + row * D + column, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(row >= 0, part, 0.0)
    at = token * D + column
    if ADD:
        total += tl.load(addend + at, mask=column < D, other=0.0).to(tl.float32)
    tl.store(y + at, total, mask=column < D)


def _launch_unpermute(y_MD: Tensor, row_TK: Tensor, addend_TD: Tensor | None = None) -> Tensor:
    """Launch one program per token and 1024 columns."""
    T, K = row_TK.shape
    D = y_MD.shape[1]
    assert y_MD.is_contiguous() and row_TK.is_contiguous(), f"{y_MD.stride()=}"
    y_TD = y_MD.new_empty((T, D), dtype=torch.float32)
    block = min(1024, next_power_of_2(D))
    if T:
        _unpermute_kernel[(T, cdiv(D, block))](
            y_rows=y_MD,
            rows=row_TK,
            addend=y_MD if addend_TD is None else addend_TD.contiguous(),
            y=y_TD,
            D=D,
            K=K,
            ADD=addend_TD is not None,
            BLOCK=block,
            **launch_options(),
        )
    return y_TD


@operation(kernel=_launch_unpermute)
def unpermute(y_MD: Tensor, row_TK: Tensor, addend_TD: Tensor | None = None) -> Tensor:
    """Sum every token's rows in float32, in the order of k, then add `addend_TD`.

    Args:
        y_MD: [M, D] rows as `permute` ordered them, any float dtype, contiguous.
        row_TK: [T, K] int32 row of each entry, -1 for none.
        addend_TD: [T, D], any float dtype, added last; None for nothing.

    Returns:
        [T, D] float32; `addend_TD` or 0 for a token without rows.
    """
    y_TD = y_MD.new_zeros((row_TK.shape[0], y_MD.shape[1]), dtype=torch.float32)
    for row_T in row_TK.long().unbind(1):
        is_row_T = row_T >= 0
        y_TD[is_row_T] += y_MD[row_T[is_row_T]].float()
    return y_TD if addend_TD is None else y_TD.add_(addend_TD)
