"""Map the tensor names of a directory to Hugging Face's names."""

from collections.abc import Iterable, Iterator, Mapping

from dsv3.checkpoint.fused import split_experts
from dsv3.checkpoint.names import (
    fp8_scale_name,
    from_deepseek,
    is_rotary_table,
    is_vision,
    plain_name,
    weight_name,
)
from dsv3.checkpoint.reader import Piece, TensorInfo
from dsv3.checkpoint.region import whole
from dsv3.checkpoint.sharding import Split, TensorSpec, tensor_specs
from dsv3.checkpoint.stored import StoredTensor
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def hugging_face_tensors(
    stored: Iterable[StoredTensor], config: ModelConfig
) -> dict[str, TensorInfo]:
    """Return the model's tensors by name, without those of an image encoder.

    Raises:
        CheckpointError: a tensor is stored twice, or fused experts contradict the config.
    """
    stored = list(stored)
    integers = _integer_weights(stored)
    tensors: dict[str, TensorInfo] = {}
    origin: dict[str, StoredTensor] = {}
    for one in stored:
        for info in _presented(one, config, integers):
            other = origin.setdefault(info.name, one)
            if other is not one:
                raise CheckpointError(
                    f"{one.file}: tensor {info.name} is stored twice, as {other.name} and as "
                    f"{one.name}" + ("" if other.file == one.file else f" (in {other.file})")
                )
            tensors[info.name] = info
    if config.tie_word_embeddings and HEAD in tensors and EMBED not in tensors:
        head = tensors.pop(HEAD)
        tensors[EMBED] = TensorInfo(EMBED, head.dtype, head.shape, head.pieces)
    return tensors


def _integer_weights(stored: Iterable[StoredTensor]) -> frozenset[str]:
    """Return the weights stored as integers by compressed-tensors, whose scales keep their names.

    FP8 weights have scales of the same spelling, which become `weight_scale_inv`.
    """
    ends = (".weight_packed", ".weight_shape")
    packed = (one.name.rpartition("_")[0] for one in stored if one.name.endswith(ends))
    plain = (one.name for one in stored if one.entry.dtype == "I8" and one.name.endswith(".weight"))
    return frozenset([*packed, *plain])


def _presented(
    one: StoredTensor, config: ModelConfig, integers: frozenset[str]
) -> Iterator[TensorInfo]:
    if is_rotary_table(one.name) or is_vision(one.name):
        return
    name = plain_name(one.name)
    if weight_name(one.name) not in integers:
        name = fp8_scale_name(name)
    is_fused = False
    for info in split_experts(one, name, config):
        is_fused = True
        yield info
    if not is_fused:
        piece = Piece(one.file, one.entry.offset, whole(one.entry.shape))
        yield TensorInfo(name, one.entry.dtype, one.entry.shape, (piece,))


def deepseek_tensors(stored: Iterable[StoredTensor], config: ModelConfig) -> dict[str, TensorInfo]:
    """Return the tensors of DeepSeek's rank files, whose slices lie end to end in rank order.

    Raises:
        CheckpointError: the files are not those of DeepSeek's converter.
    """
    specs = tensor_specs(config)
    slices: dict[str, list[StoredTensor]] = {}
    for one in stored:
        if one.name.startswith(("model.", "lm_head.")):
            raise CheckpointError(
                f"{one.file.parent}: an unfinished conversion (no manifest.json); run convert.py "
                "again"
            )
        slices.setdefault(from_deepseek(one.name), []).append(one)
    return {name: _join(name, specs, parts) for name, parts in slices.items()}


def _join(name: str, specs: Mapping[str, TensorSpec], parts: list[StoredTensor]) -> TensorInfo:
    """Return one tensor made of the slices in the rank files."""
    spec = specs.get(name) or specs.get(weight_name(name) or "")
    first = parts[0].entry
    _check_alike(name, parts, spec)
    if spec is None or spec.split not in (Split.ROWS, Split.COLS):
        pieces = tuple(Piece(one.file, one.entry.offset, whole(one.entry.shape)) for one in parts)
        return TensorInfo(name, first.dtype, first.shape, pieces)
    dim = 0 if spec.split is Split.ROWS else 1
    joined = []
    start = 0
    for one in parts:
        region = list(whole(one.entry.shape))
        region[dim] = (start, start + one.entry.shape[dim])
        start = region[dim][1]
        joined.append(Piece(one.file, one.entry.offset, tuple(region)))
    shape = (*first.shape[:dim], start, *first.shape[dim + 1 :])
    return TensorInfo(name, first.dtype, shape, tuple(joined))


def _check_alike(name: str, parts: list[StoredTensor], spec: TensorSpec | None) -> None:
    """Raise CheckpointError unless the slices of a tensor have one dtype and can be joined."""
    dim = {Split.ROWS: 0, Split.COLS: 1}.get(spec.split) if spec is not None else None
    first = parts[0].entry
    kinds = {
        (one.entry.dtype, len(one.entry.shape), *_other_dims(one.entry.shape, dim)) for one in parts
    }
    if len(kinds) > 1 or (dim is not None and len(first.shape) != 2):
        shapes = ", ".join(f"{one.entry.dtype} {list(one.entry.shape)}" for one in parts)
        raise CheckpointError(
            f"{parts[0].file.parent}: the rank files do not fit together: tensor {name} is {shapes}"
        )


def _other_dims(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    return shape if dim is None else shape[:dim] + shape[dim + 1 :]
