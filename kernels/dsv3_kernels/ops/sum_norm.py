"""All-reduce of the partial outputs of a host's ranks, fused with `add_rmsnorm`.

One launch instead of an all-reduce and `add_rmsnorm`, for few rows: each rank reads the parts of
all others over the links, so the bytes grow with the number of ranks. Bound by latency: one signal
and one read.

A program owns a row and synchronizes only with the programs of the same row on the other ranks.
Each rank has memory that all ranks have mapped: two buffers for every row, and a flag for every row
and rank. A program writes its part to a buffer of its own rank, sets its flag on every rank to the
number of the turn, waits until the flags of all ranks have reached this number, and reads all parts
in rank order, so that all ranks compute the same bits. Why this is correct:

* The turn is one more than the row's own flag, which lies on the device, so a replayed CUDA graph
  continues the count. All ranks launch the same shapes in the same order, so a row's turns agree.
* A peer may be one turn ahead, not two: no turn ends without this rank's flag of that turn. So a
  flag that is ahead counts as set, and odd and even turns use different buffers. One is written
  again two turns later, when the flags of the turn between show that all ranks have read it.
* A row's buffers do not depend on the number of rows or the dtype of a launch. The count of a row
  that a launch leaves out falls behind, on all ranks alike.
* A flag is set by a release of system scope after a barrier of the program, which covers the stores
  of all its threads; flags are read by acquires of system scope, with a barrier after them. Parts
  are read by volatile loads, which bypass the first level cache: this cache does not see the writes
  of other GPUs, and the loads do not depend on the acquire having emptied it.
* No program waits for a program that cannot start: there are fewer programs than multiprocessors,
  and a kernel that shares them (on a second stream) waits for no program, so it ends. With fewer
  multiprocessors, rows start in order as earlier ones end, the same on all ranks. Launches of one
  group must follow each other on one stream, as with any collective.

If a rank never launches, the others wait, as in any collective; the watchdog ends the job.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_kernels._gpu import cdiv, next_power_of_2
from dsv3_kernels._triton import HAS_TRITON, in_turn, launch_options, tl, triton
from dsv3_kernels.fp8_format import BLOCK
from dsv3_kernels.gemm._e4m3 import e4m3_view, is_native
from dsv3_kernels.gemm.act_quant import Quantized
from dsv3_kernels.ops.rmsnorm import NormedSum, add_rmsnorm, norm_row

# Fewer than the multiprocessors of GPUs with links to others; the same on all ranks.
MAX_ROWS = 48
# Above this a ring is faster, which sends fewer bytes: by arithmetic, not measured.
_MAX_BYTES = 512 << 10
# Holds 8192 values in float32. A multiple of 16, as vector loads ask for.
_BUFFER_BYTES = 32 << 10


class Peers(NamedTuple):
    """Addresses of the shared memory of all ranks, `shared_bytes` each, as mapped by this rank.

    Attributes:
        addresses: [ranks] int64, on this rank's device; multiples of 16.
        rank: index of this rank.
        own: address of this rank's memory.
    """

    addresses: Tensor
    rank: int
    own: int

    @classmethod
    def at(cls, addresses: Sequence[int], rank: int, device: torch.device) -> "Peers":
        """Return the peers at these addresses, which must hold zeros at first."""
        return cls(torch.tensor(addresses, device=device), rank, addresses[rank])


def shared_bytes(ranks: int) -> int:
    """Return the bytes of shared memory per rank: for each row two buffers and a flag per rank."""
    return MAX_ROWS * (2 * _BUFFER_BYTES + 4 * ranks)


def fits_sum_norm(y_TD: Tensor) -> bool:
    """Return True if `sum_norm` accepts parts of this shape and dtype."""
    is_known = y_TD.dtype in (torch.bfloat16, torch.float32) and y_TD.dim() == 2 and HAS_TRITON
    is_few = is_known and 0 < len(y_TD) <= MAX_ROWS and y_TD.nbytes <= _MAX_BYTES
    return is_few and y_TD[0].nbytes <= _BUFFER_BYTES


def sum_norm_of_parts(
    x_TD: Tensor,
    parts: Sequence[Tensor],
    weight_D: Tensor,
    eps: float,
    quant: bool = False,
    ue8m0: bool = False,
) -> NormedSum:
    """Define `sum_norm`: the parts of all ranks are added in float32, in rank order."""
    total_TD = parts[0].float()
    for y_TD in parts[1:]:
        total_TD = total_TD + y_TD.float()
    return add_rmsnorm.reference(x_TD, total_TD, weight_D, eps, quant, ue8m0)


@triton.jit
def _flag(address, row, rank, RANKS: tl.constexpr, ROWS: tl.constexpr, BUFFER: tl.constexpr):
    """Return the pointer to the flag that a rank sets for a row."""
    return (address + 2 * ROWS * BUFFER + (row * RANKS + rank) * 4).to(tl.pointer_type(tl.int32))


@triton.jit
def _buffer(row, turn, ROWS: tl.constexpr, BUFFER: tl.constexpr):
    """Return the offset of a row's buffer in a turn."""
    return ((turn & 1) * ROWS + row) * BUFFER


@triton.jit
def _signal(flags, turn, mask):
    """Set the flags on all peers after all stores of this program."""
    tl.debug_barrier()
    tl.atomic_xchg(flags, turn, mask=mask, sem="release", scope="sys")


@triton.jit
def _await(flags, turn, mask):
    """Wait until all peers have set their flags; the difference stays right if turns overflow."""
    late = 1
    while late > 0:
        seen = tl.atomic_add(flags, 0, mask=mask, sem="acquire", scope="sys")
        late = tl.sum((mask & (seen - turn < 0)).to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rank"])
def _sum_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    sum_ptr,
    h_ptr,
    q_ptr,
    scale_ptr,
    address_ptr,
    own,
    rank,
    D,
    eps,
    RANKS: tl.constexpr,
    PEERS: tl.constexpr,
    ROWS: tl.constexpr,
    BUFFER: tl.constexpr,
    B: tl.constexpr,
    QUANT: tl.constexpr,
    UE8M0: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Sum and normalize one row, held as B blocks of 128; PEERS is RANKS rounded up."""
    in_turn()
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, B)[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = col < D
    # Loads that do not depend on the peers come before the wait.
    y = tl.load(y_ptr + row * D + col, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * D + col, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0)
    peer = tl.arange(0, PEERS)
    is_peer = peer < RANKS
    peers = tl.load(address_ptr + peer, mask=is_peer, other=0)
    parts = ()
    for r in tl.static_range(RANKS):
        parts += (tl.load(address_ptr + r),)  # type: ignore[assignment]
    turn = tl.load(_flag(own, row, rank, RANKS, ROWS, BUFFER)) + 1
    buffer = _buffer(row, turn, ROWS, BUFFER)
    own_ptr = tl.multiple_of((own + buffer).to(y_ptr.dtype), 16)
    tl.store(own_ptr + col, y, mask=mask)
    _signal(_flag(peers, row, rank, RANKS, ROWS, BUFFER), turn, is_peer)
    _await(_flag(own, row, peer, RANKS, ROWS, BUFFER), turn, is_peer)
    total = x
    for r in tl.static_range(RANKS):
        part_ptr = tl.multiple_of((parts[r] + buffer).to(y_ptr.dtype), 16)
        part = tl.load(part_ptr + col, mask=mask, other=0.0, volatile=True).to(tl.float32)
        total = part if r == 0 else total + part
    rounded = (x + total).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * D + col, rounded, mask=mask)
    x = rounded.to(tl.float32)
    norm_row(
        x=x,
        weight=weight,
        h_ptr=h_ptr,
        q_ptr=q_ptr,
        scale_ptr=scale_ptr,
        row=row,
        D=D,
        eps=eps,
        B=B,
        QUANT=QUANT,
        UE8M0=UE8M0,
        NATIVE=NATIVE,
    )


def sum_norm(
    x_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    peers: Peers,
    quant: bool = False,
    ue8m0: bool = False,
) -> NormedSum:
    """Do `add_rmsnorm` with the sum of `y_TD` over ranks.

    A collective of GPUs; `sum_norm_of_parts` is its reference.

    Args:
        x_TD: [T, D] residual stream, the same on all ranks, any float dtype.
        y_TD: [T, D] bf16 or float32, this rank's part; see `fits_sum_norm`.
        weight_D: [D] float32.
        eps: added to the mean square.
        peers: the ranks of the group.
        quant: also return the result in FP8; then D is a multiple of 128.
        ue8m0: with scales that are powers of two.

    Returns:
        The same bits on all ranks.
    """
    assert fits_sum_norm(y_TD) and x_TD.shape == y_TD.shape, f"{x_TD.shape=} {y_TD.shape=}"
    T, D = x_TD.shape
    ranks = len(peers.addresses)
    assert not quant or D % BLOCK == 0, f"{x_TD.shape=}"
    h_TD = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = torch.empty_like(h_TD)
    out = Quantized.empty(x_TD.shape, x_TD.device) if quant else None
    blocks = next_power_of_2(cdiv(D, BLOCK))
    _sum_norm_kernel[(T,)](
        x_ptr=x_TD.contiguous(),
        y_ptr=y_TD.contiguous(),
        weight_ptr=weight_D,
        sum_ptr=sum_TD,
        h_ptr=h_TD,
        q_ptr=h_TD if out is None else e4m3_view(out.q),
        scale_ptr=h_TD if out is None else out.scale,
        address_ptr=peers.addresses,
        own=peers.own,
        rank=peers.rank,
        D=D,
        eps=eps,
        RANKS=ranks,
        PEERS=next_power_of_2(ranks),
        ROWS=MAX_ROWS,
        BUFFER=_BUFFER_BYTES,
        B=blocks,
        QUANT=quant,
        UE8M0=ue8m0,
        NATIVE=is_native(x_TD),
        # Twice those of `add_rmsnorm`, for more loads under way: not measured.
        num_warps=min(16, max(1, blocks // 4)),
        **launch_options(),
    )
    return NormedSum(sum_TD, h_TD, out)
