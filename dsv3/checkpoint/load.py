"""Load a rank's slices of a checkpoint into the allocated parameters of its model.

If a parameter has the stored dtype, bytes are read into it directly. Otherwise rows are converted
or dequantized in a bounded buffer. So loading needs the memory of the rank's shard and of a few
buffers, for models of any size.
"""

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.integer_values import check_stated_shape, pack, read_integers
from dsv3.checkpoint.integers import IntegerForm, Layout, integer_form
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
from dsv3.parallel.weight_format import KeptIntegers
from dsv3.parallel.weights import Target
from dsv3_kernels import weight_dequant
from dsv3_kernels.fp8_format import BLOCK, FP8

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, FP8_DTYPE: FP8}
_BUFFER_BYTES = 16 << 20  # of each worker, for rows to convert
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
    specs = tensor_specs(source.config).values()
    stored = fp8_weights(source)
    return all(s.name in stored for s in specs if s.expert is not None and not s.mtp)


def integer_weights(
    source: Source, widths: Collection[int], exact: bool
) -> dict[str, KeptIntegers]:
    """Return the weights that can be held as stored integers, and how.

    Args:
        source: the checkpoint.
        widths: bits of the integers to hold.
        exact: for products of a CPU: hold only weights without zeros, whose scales bfloat16 holds
            exactly, in float32.
    """
    kept = {}
    for spec in tensor_specs(source.config).values() if widths else ():
        form = integer_form(source.tensors, spec.name, spec.shape)
        if form is None or form.kind.bits not in widths:
            continue
        has_zeros = form.layout is Layout.AWQ
        is_bf16 = source.tensors[form.scale_name(spec.name)].dtype == "BF16"
        if not exact or (is_bf16 and not has_zeros):
            scale = torch.bfloat16 if is_bf16 and not exact else torch.float32
            kept[spec.name] = KeptIntegers(form.kind.of_rows(spec.shape[1]), scale, has_zeros)
    return kept


def has_int8_rows(source: Source) -> bool:
    """Return True if any weight is stored in int8 with a scale per row."""
    kept = integer_weights(source, (8,), exact=False).values()
    return any(not each.kind.group for each in kept)


def bf16_vectors(source: Source) -> frozenset[str]:
    """Return the weights of products in float32 that are stored in bfloat16.

    These are the routers, and the weights of the indexers' heads.
    """
    kinds = (".mlp.gate.weight", ".indexer.weights_proj.weight")
    exact = (n for n in tensor_specs(source.config) if n.endswith(kinds))
    stored = source.tensors
    return frozenset(n for n in exact if n in stored and stored[n].dtype == "BF16")


def load_weights(source: Source, targets: Iterable[Target], layout: ParallelConfig) -> None:
    """Read this rank's slice of every target.

    Args:
        source: an open, checked checkpoint.
        targets: parameters to fill; each is filled completely.
        layout: this rank's place.

    Raises:
        CheckpointError: a file is missing or cut short; a norm, a bias or a scale is not finite.
    """
    specs = tensor_specs(source.config)

    with ThreadPoolExecutor(_WORKERS) as pool:
        loads = pool.map(lambda t: _load_target(source, t, specs[t.name], layout), targets)
        list(loads)  # raises the first failure and cancels the loads after it


@torch.inference_mode()  # a thread does not inherit the mode in which a script makes its model
def _load_target(source: Source, target: Target, spec: TensorSpec, layout: ParallelConfig) -> None:
    # Expert placement may put a routed expert on any rank, and on several.
    region = whole(spec.shape) if spec.split is Split.EXPERT else shard_region(spec, layout)
    assert region is not None, f"rank {layout.rank} has no part of {target.name}"
    held = target.dest.shape
    cols = held[-1] * (2 if target.dest.dtype == torch.uint8 else 1)  # two int4 values a byte
    assert region_shape(region) == (*held[:-1], cols), f"{target.name} {region=}"
    if not target.dest.numel():
        return
    form = integer_form(source.tensors, target.name, spec.shape)
    if form is not None:
        _load_integers(source, target, spec, form, region)
        return
    stored = DTYPES[source.tensors[target.name].dtype]
    if stored == FP8:
        _load_fp8(source, target, region)
    elif stored == target.dest.dtype and _is_plain_memory(target.dest):
        source.read(target.name, region, _memory(target.dest))
    else:
        for rows, part in _row_blocks(region, stored.itemsize):
            target.dest[rows].copy_(_read(source, target.name, part, stored))
    if target.must_be_finite and target.dest.dtype != FP8:
        _check_finite(source, target.name, target.dest)


def _check_finite(source: Source, name: str, values: Tensor) -> None:
    """Raise CheckpointError if a tensor has NaN or infinity.

    Most matrices are not checked: an infinity in them leads to infinite or NaN logits, which fail
    the request.
    """
    if not values.isfinite().all():
        raise CheckpointError(
            f"{source.file_of(name)}: tensor {name} has values that are NaN or infinite; "
            "fetch or export it again"
        )


def _load_fp8(source: Source, target: Target, region: Region) -> None:
    """Load FP8 rows with the scales of their blocks, or dequantize them to the target's dtype."""
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
        stored = _read(source, target.name, part, FP8)
        offset = part[0][0] % BLOCK
        weight = weight_dequant(stored, scale[first:last], target.dest.dtype, offset, col_offset)
        target.dest[rows].copy_(weight)


def _load_integers(
    source: Source, target: Target, spec: TensorSpec, form: IntegerForm, region: Region
) -> None:
    """Load integer rows with their scales, or dequantize them to the target's dtype."""
    # AWQ stores columns of W as rows, so a block of its rows would read everything.
    check_stated_shape(source, target.name, spec.shape, form)
    blocks = [(slice(None), region)] if form.layout is Layout.AWQ else _row_blocks(region, 4)
    for rows, part in blocks:
        integers = read_integers(source, target.name, spec.shape, form, part)
        scale = torch.from_numpy(integers.scale_Fg)
        _check_finite(source, form.scale_name(target.name), scale)
        if target.scale is None:
            target.dest[rows].copy_(torch.from_numpy(integers.values()))
            continue
        whole_groups = integers.scale_Fg.shape[1] == 1 or not integers.offset
        assert whole_groups, f"{target.name} {region=}"
        q_FD = integers.q_FD
        if integers.zero_Fg is not None:
            assert target.zero is not None, target.name
            target.zero[rows].copy_(torch.from_numpy(integers.zero_Fg))
            q_FD = q_FD - np.int8(8)  # `pack` adds it
        held = pack(q_FD, 4) if target.dest.dtype == torch.uint8 else np.ascontiguousarray(q_FD)
        target.dest[rows].copy_(torch.from_numpy(held))
        target.scale[rows].copy_(scale)


def _row_blocks(region: Region, itemsize: int) -> Iterable[tuple[slice, Region]]:
    """Split a region into runs of rows of at most `_BUFFER_BYTES` (at least one row)."""
    start, stop = region[0]
    other_dims = region[1:]
    row_bytes = itemsize * int(np.prod(region_shape(other_dims), dtype=np.int64))
    step = max(1, _BUFFER_BYTES // row_bytes)
    for row in range(start, stop, step):
        row_stop = min(row + step, stop)
        yield slice(row - start, row_stop - start), ((row, row_stop), *other_dims)


def _read(source: Source, name: str, region: Region, dtype: torch.dtype) -> Tensor:
    """Return a region of a stored tensor as a CPU tensor."""
    out = torch.empty(region_shape(region), dtype=dtype)
    source.read(name, region, _memory(out))
    return out


def _is_plain_memory(tensor: Tensor) -> bool:
    """Return True if a file can be read straight into the tensor."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.stride(-1) == 1


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor."""
    return memoryview(tensor.view(torch.uint8).numpy().data).cast("B")
