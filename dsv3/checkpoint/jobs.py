"""The jobs of a conversion: each reads one weight or stored tensor, and casts it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from dsv3.checkpoint.integers import IntegerForm, Layout, integer_form
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.reader import Source, TensorInfo
from dsv3.checkpoint.sharding import (
    FP8_DTYPE,
    TensorSpec,
    scale_shape,
    tensor_specs,
)
from dsv3.config_integers import IntegerKind

_COMPARED_BYTES = 4 << 20
_COPIES = {
    ".embed_tokens.weight": "model.embed_tokens.weight",
    ".shared_head.head.weight": "lm_head.weight",
}


class TensorType(NamedTuple):
    """Type and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


TensorTypes = dict[str, TensorType]
"""Of each output tensor, in canonical order."""


class Cast(Enum):
    """The type that weights are cast to; NONE keeps the stored type, MIXED keeps FP8."""

    NONE = "none"
    BF16 = "bf16"
    FP8 = "fp8"
    INTEGERS = "integers"
    MIXED = "mixed"

    @property
    def of_jobs(self) -> "Cast":
        """The type that weights are cast to one by one."""
        return Cast.INTEGERS if self is Cast.MIXED else self


@dataclass(frozen=True, slots=True)
class Job:
    """One weight or stored tensor to read, and the output tensors it becomes.

    Attributes:
        name: of the weight or the tensor.
        cast: type to cast to.
        outputs: names of the output tensors.
        stored: form of a stored integer weight that is cast.
        form: of the integers to write.
    """

    name: str
    cast: Cast
    outputs: tuple[str, ...]
    stored: IntegerForm | None = None
    form: IntegerForm | None = None

    @property
    def is_repacked(self) -> bool:
        """True if the stored integers and scales are written as they are, in another layout."""
        if self.stored is None or self.form is None or self.stored.layout is not Layout.PLAIN:
            return False
        return self.stored.kind == self.form.kind


def may_be_integers(spec: TensorSpec) -> bool:
    """Return True if conversions to integers include a weight.

    `kv_b_proj` is absorbed into queries and outputs, so its products are not of a packed matrix.
    """
    return spec.quantizable and not spec.name.endswith(".kv_b_proj.weight")


def uniform_kinds(source: Source, bits: int, group: int) -> dict[str, IntegerKind]:
    """Return the same kind for all weights that may be integers and whose rows are whole groups.

    Args:
        source: the checkpoint.
        bits: 4 or 8.
        group: columns that share a scale; 0 for a whole row.
    """
    return {
        spec.name: IntegerKind(bits, group)
        for spec in tensor_specs(source.config).values()
        if may_be_integers(spec) and spec.shape[1] % (group or 8) == 0
    }


def make_jobs(
    source: Source, cast: Cast, integers: Mapping[str, IntegerKind], keeps_mtp: bool = True
) -> Iterator[Job]:
    """Yield the jobs in canonical order, the other tensors of a weight after it.

    Args:
        source: a checked checkpoint.
        cast: BF16 and FP8 apply to all quantized weights and to all that may be FP8; INTEGERS and
            MIXED to the weights in `integers`. Other weights of integers become BF16, and those of
            FP8 do with INTEGERS.
        integers: kinds of the weights to cast to integers.
        keeps_mtp: include the layers that draft tokens.
    """
    originals = copies(source) if cast.of_jobs is Cast.INTEGERS else {}
    left_out = {name for name, original in originals.items() if _is_equal(source, name, original)}
    for spec in tensor_specs(source.config).values():
        stored = integer_form(source.tensors, spec.name, spec.shape)
        if stored is None and spec.name not in source.tensors:
            continue
        if spec.name in left_out or (spec.mtp and not keeps_mtp):
            continue
        is_fp8 = stored is None and source.tensors[spec.name].dtype == FP8_DTYPE
        kind = integers.get(spec.name)
        form = None if kind is None else _form(kind, spec)
        if form is not None and form != stored:
            yield Job(spec.name, Cast.INTEGERS, form.names(spec.name), stored, form)
        elif form is None and _becomes_bf16(cast, is_fp8, stored is not None):
            yield Job(spec.name, Cast.BF16, (spec.name,), stored)
        elif spec.quantizable and not is_fp8 and cast is Cast.FP8:
            yield Job(spec.name, Cast.FP8, (spec.name, scale_name(spec.name)), stored)
        else:
            names = (spec.name, scale_name(spec.name)) if is_fp8 else (spec.name,)
            for name in names if stored is None else stored.names(spec.name):
                yield Job(name, Cast.NONE, (name,))


def _becomes_bf16(cast: Cast, is_fp8: bool, is_integer: bool) -> bool:
    """Return True if a weight that is not cast to integers becomes BF16."""
    if cast is Cast.MIXED:
        return is_integer
    return cast in (Cast.BF16, Cast.INTEGERS) and (is_fp8 or is_integer)


def _form(kind: IntegerKind, spec: TensorSpec) -> IntegerForm:
    return IntegerForm(IntegerKind(kind.bits, kind.group or spec.shape[1]), Layout.PACKED)


def output_types(source: Source, jobs: tuple[Job, ...]) -> TensorTypes:
    """Return type and shape of every output tensor, in canonical order."""
    specs = tensor_specs(source.config)
    types: TensorTypes = {}
    for job in jobs:
        if job.cast is Cast.NONE:
            info = source.tensors[job.name]
            types[job.name] = TensorType(info.dtype, info.shape)
        elif job.form is not None:
            written = job.form.types(specs[job.name].shape)
            for name, (dtypes, shape) in zip(job.outputs, written, strict=True):
                types[name] = TensorType(dtypes[0], shape)
            if job.is_repacked:
                assert job.stored is not None
                scale = source.tensors[job.stored.scale_name(job.name)]
                types[job.outputs[1]] = TensorType(scale.dtype, scale.shape)
        else:
            shape = specs[job.name].shape
            types[job.name] = TensorType("BF16" if job.cast is Cast.BF16 else FP8_DTYPE, shape)
            if job.cast is Cast.FP8:
                types[job.outputs[1]] = TensorType("F32", scale_shape(shape))
    return types


def first_tensor(source: Source, job: Job) -> TensorInfo:
    """Return the stored tensor that a job reads first."""
    name = job.name if job.stored is None else job.stored.names(job.name)[0]
    return source.tensors[name]


def copies(source: Source) -> dict[str, str]:
    """Return the stored copies of embedding and head in MTP layers, and the originals."""
    return {
        spec.name: original
        for spec in tensor_specs(source.config).values()
        for end, original in _COPIES.items()
        if spec.mtp and spec.name.endswith(end)
        if spec.name in source.tensors and original in source.tensors
    }


def _is_equal(source: Source, name: str, original: str) -> bool:
    """Return True if a copy has the bytes of its original.

    Nothing reads the copies: drafts use the model's own. They are a tenth of a small model's bytes.
    """
    info = source.tensors[name]
    other = source.tensors[original]
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return False
    rows, cols = info.shape
    step = max(1, _COMPARED_BYTES // max(1, info.num_bytes // rows))
    regions = (((row, min(row + step, rows)), (0, cols)) for row in range(0, rows, step))
    return all(source.read(name, r) == source.read(original, r) for r in regions)
