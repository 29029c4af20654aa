"""Weight matrices as the layers hold them: rows of several checkpoint tensors packed into one.

Packing is told once, where the layer is built (`{"q_a_proj": 1536, "kv_a_proj_with_mqa": 576}`);
the loader walks `targets()` and fills the memory in place. A matrix is held in the compute dtype,
or, where the checkpoint stores FP8 and the user asked to keep it, as e4m3 with its block scales:
any rectangle, to be dequantized at every use, or whole blocks with their scales in one tensor, to
be multiplied as they are (`fp8_gemm`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsv3_kernels import Stack, weight_dequant

FP8 = torch.float8_e4m3fn
BLOCK = 128


@dataclass
class BlockScale:
    """Scales of one FP8 rectangle: the covering blocks and where in the first one it begins."""

    scale: Tensor
    row_offset: int
    col_offset: int


@dataclass
class Target:
    """One checkpoint tensor and the memory that this rank's part of it goes to.

    `dest` is a view of a parameter. `keep_scale` is called with the block scales when `dest` is
    FP8; otherwise the loader dequantizes.
    """

    name: str
    dest: Tensor
    matrix: "Matrix | None" = None
    part: tuple[int, int] = (0, 0)

    def keep_scale(self, scale: BlockScale) -> None:
        """Store the scales beside the FP8 rows."""
        assert self.matrix is not None, f"{self.name} has no place for scales"
        self.matrix.keep_scale(self.part, scale)


@dataclass(frozen=True)
class WeightFormat:
    """How weights are held.

    Attributes:
        dtype: of activations, and of weights not kept in FP8.
        fp8_names: weights kept in FP8.
        fp8_products: those are whole blocks, to be multiplied by activations in FP8.
        ue8m0: whose scales are then powers of two.
    """

    dtype: torch.dtype
    device: torch.device
    fp8_names: frozenset[str] = field(default_factory=frozenset)
    fp8_products: bool = False
    ue8m0: bool = False


class Matrix(nn.Module):
    """[rows, cols], or [E, rows, cols] for stacked experts, packed from named parts.

    Args:
        names: checkpoint names of the parts, one list per stacked matrix.
        rows: rows of each part, in order.
        cols: columns.
        fmt: dtype and device; FP8 when every part is in `fmt.fp8_names`.
        uncut: the parts are whole checkpoint tensors, so that none begins inside a block.

    Attributes:
        block_scale: [E, ceil(rows / 128), ceil(cols / 128)] float32 where FP8 parts lie in whole
            blocks: for FP8 products, and of uncut parts if all but the last end with a block.
        quantizes: whether it is multiplied in FP8, so that its input is best made in FP8 at once.
    """

    block_scale: Tensor | None

    def __init__(
        self,
        names: list[list[str]],
        rows: list[int],
        cols: int,
        fmt: WeightFormat,
        uncut: bool = False,
    ) -> None:
        super().__init__()
        fp8 = bool(fmt.fp8_names) and all(n in fmt.fp8_names for part in names for n in part)
        self.dtype, self.ue8m0 = fmt.dtype, fmt.ue8m0
        self.names, self.rows = names, rows
        data = torch.empty(
            (len(names), sum(rows), cols), dtype=FP8 if fp8 else fmt.dtype, device=fmt.device
        )
        self.weight = nn.Parameter(data, requires_grad=False)
        self._weights = self.weight.unbind()  # a view of each, made once and not at every use
        self.scales: dict[tuple[int, int], BlockScale] = {}
        blocks = None
        self.quantizes = fp8 and fmt.fp8_products
        if self.quantizes:
            assert not any(n % BLOCK for n in (*rows[:-1], cols)), f"{names[0]} {rows=} {cols=}"
        if self.quantizes or (fp8 and uncut and not any(n % BLOCK for n in rows[:-1])):
            shape = (len(names), -(-sum(rows) // BLOCK), -(-cols // BLOCK))
            blocks = torch.empty(shape, dtype=torch.float32, device=fmt.device)
        self.register_buffer("block_scale", blocks, persistent=False)

    def targets(self) -> Iterator[Target]:
        """Yield a view for every part of every stacked matrix."""
        for e, parts in enumerate(self.names):
            for i, (name, view) in enumerate(
                zip(parts, self.weight[e].split(self.rows), strict=True)
            ):
                yield Target(name, view.detach(), self, (e, i))

    def keep_scale(self, part: tuple[int, int], scale: BlockScale) -> None:
        """Store the scales of part `part[1]` of matrix `part[0]`."""
        if self.block_scale is None:
            self.scales[part] = scale
            return
        assert scale.row_offset == scale.col_offset == 0, f"{self.names[part[0]]}: {scale}"
        first = sum(self.rows[: part[1]]) // BLOCK
        self.block_scale[part[0], first : first + len(scale.scale)] = scale.scale

    def matrix(self, e: int = 0) -> Tensor:
        """Return matrix `e` in the compute dtype, [rows, cols]."""
        weight = self._weights[e]
        if weight.dtype != FP8:
            return weight
        if self.block_scale is not None:
            return weight_dequant(weight, self.block_scale[e], self.dtype)
        if not weight.numel():  # nothing of it is this rank's, so it has no scales
            return weight.to(self.dtype)
        parts = []
        for i, rows in enumerate(weight.split(self.rows)):
            s = self.scales[e, i]
            parts.append(weight_dequant(rows, s.scale, self.dtype, s.row_offset, s.col_offset))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stack(self) -> Stack:
        """Return all matrices as `experts` takes them; dequantized where blocks are cut."""
        if self.weight.dtype != FP8 or self.block_scale is not None:
            return Stack(self.weight, self.block_scale)
        return Stack(torch.stack([self.matrix(e) for e in range(len(self.names))]))

    def take(self, stacked: list[int]) -> list[Tensor]:
        """Return copies of some stacked matrices and of their scales."""
        parts = range(len(self.rows) if self.scales else 0)
        scales = [[self.scales[e, i].scale for e in range(len(self.names))] for i in parts]
        return [t[stacked] for t in (*self._bytes(), *map(torch.stack, scales))]

    def put(self, stacked: list[int], values: list[Tensor]) -> None:
        """Overwrite some stacked matrices with what another rank's `take` returned."""
        mine = self._bytes()
        for t, value in zip(mine, values, strict=False):
            t[stacked] = value
        for i, scale in enumerate(values[len(mine) :]):
            for e, value in zip(stacked, scale, strict=True):
                self.scales[e, i].scale.copy_(value)

    def _bytes(self) -> list[Tensor]:
        """Return views of all that is stacked: Gloo sends no FP8, and nothing computes with it."""
        return [t.view(torch.uint8) for t in (*self.parameters(), *self.buffers())]


class Vector(nn.Module):
    """A replicated small tensor held in float32 (norms, router bias), whatever is stored."""

    def __init__(self, name: str, shape: tuple[int, ...], fmt: WeightFormat) -> None:
        super().__init__()
        self.name = name
        data = torch.empty(shape, dtype=torch.float32, device=fmt.device)
        self.weight = nn.Parameter(data, requires_grad=False)

    def targets(self) -> Iterator[Target]:
        """Yield the whole tensor."""
        yield Target(self.name, self.weight.detach())
