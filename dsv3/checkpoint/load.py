"""Fills a rank's model from a checkpoint: only its slices, straight into memory already allocated.

Where the stored type is the held type, bytes are read into the parameter itself. Else rows pass
through a bounded buffer, converted or dequantized on the way. So loading needs the rank's shard
and a few buffers, whatever the model's size.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.region import Region, region_shape, whole
from dsv3.checkpoint.scales import read_scales
from dsv3.checkpoint.sharding import (
    FP8_DTYPE,
    Split,
    TensorSpec,
    scale_region,
    shard_region,
    tensor_specs,
)
from dsv3.config import ParallelConfig
from dsv3.errors import CheckpointError
from dsv3.parallel.weights import BLOCK, FP8, Target
from dsv3_kernels import weight_dequant

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, FP8_DTYPE: FP8}
# Bytes read at a time by each worker where values are converted on the way.
_BUFFER = 16 << 20
_WORKERS = 4


def fp8_weights(source: Source) -> frozenset[str]:
    """Return the names of the weights stored in FP8."""
    return frozenset(n for n, info in source.tensors.items() if info.dtype == FP8_DTYPE)


def has_fp8_weights(source: Source) -> bool:
    """Return True if any weight of the main model is stored in FP8."""
    specs = tensor_specs(source.config)
    return any(name in specs and not specs[name].mtp for name in fp8_weights(source))


def has_fp8_experts(source: Source) -> bool:
    """Return True if all routed experts of the main model are stored in FP8."""
    specs, stored = tensor_specs(source.config).values(), fp8_weights(source)
    return all(s.name in stored for s in specs if s.expert is not None and not s.mtp)


def load_weights(source: Source, targets: Iterable[Target], layout: ParallelConfig) -> None:
    """Read this rank's part of every target.

    Args:
        source: an open, checked checkpoint.
        targets: memory to fill; all of it is filled.
        layout: this rank's place.

    Raises:
        CheckpointError: a file is missing or cut short; a norm, a bias or a scale is not finite.
    """
    specs = tensor_specs(source.config)

    with ThreadPoolExecutor(_WORKERS) as pool:
        loads = pool.map(lambda t: _load_target(source, t, specs[t.name], layout), targets)
        list(loads)  # raises the first failure, and drops what waits behind it


def _load_target(source: Source, target: Target, spec: TensorSpec, layout: ParallelConfig) -> None:
    # A routed expert may be held by any rank, and more than once.
    region = whole(spec.shape) if spec.split is Split.EXPERT else shard_region(spec, layout)
    assert region is not None, f"{target.name} is not held by rank {layout.rank}"
    assert region_shape(region) == tuple(target.dest.shape), f"{target.name} {region=}"
    if not target.dest.numel():
        return
    stored = DTYPES[source.tensors[target.name].dtype]
    if stored == FP8:
        _load_fp8(source, target, region)
    elif stored == target.dest.dtype and target.dest.device.type == "cpu":
        source.read(target.name, region, _memory(target.dest))
    else:
        for rows, part in _row_blocks(region, stored.itemsize):
            target.dest[rows].copy_(_read(source, target.name, part, stored))
    if target.must_be_finite and target.dest.dtype != FP8:
        _check_finite(source, target.name, target.dest)


def _check_finite(source: Source, name: str, values: Tensor) -> None:
    """Raise CheckpointError if a tensor has NaN or infinity.

    Most matrices are not checked: an infinity in them makes logits that are not finite, which
    fails the row.
    """
    if not values.isfinite().all():
        raise CheckpointError(
            f"{source.where(name)}: tensor {name} has values that are NaN or infinite; "
            "fetch or export it again"
        )


def _load_fp8(source: Source, target: Target, region: Region) -> None:
    """Keep FP8 rows with their covering scales, or dequantize them into the compute dtype."""
    scale = torch.from_numpy(read_scales(source, target.name, scale_region(region)))
    _check_finite(source, scale_name(target.name), scale)
    col_offset = region[1][0] % BLOCK
    if target.scale is not None:
        for rows, part in _row_blocks(region, 1):
            target.dest[rows].copy_(_read(source, target.name, part, FP8))
        target.scale.copy_(scale)
        return
    for rows, part in _row_blocks(region, 1):
        first, last = (n - region[0][0] // BLOCK for n in scale_region(part)[0])
        stored, offset = _read(source, target.name, part, FP8), part[0][0] % BLOCK
        weight = weight_dequant(stored, scale[first:last], target.dest.dtype, offset, col_offset)
        target.dest[rows].copy_(weight)


def _row_blocks(region: Region, itemsize: int) -> Iterable[tuple[slice, Region]]:
    """Cut a region into runs of rows of at most `_BUFFER` bytes (at least one row)."""
    (start, stop), rest = region[0], region[1:]
    row_bytes = itemsize * int(np.prod(region_shape(rest), dtype=np.int64))
    step = max(1, _BUFFER // row_bytes)
    for row in range(start, stop, step):
        part = (row, min(row + step, stop))
        yield slice(part[0] - start, part[1] - start), (part, *rest)


def _read(source: Source, name: str, region: Region, dtype: torch.dtype) -> Tensor:
    """Return a region as a CPU tensor."""
    out = torch.empty(region_shape(region), dtype=dtype)
    source.read(name, region, _memory(out))
    return out


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")
