"""The plan of a conversion: every output file to the byte, and the place of each tensor in it.

A plan follows from names, types and shapes alone; no tensor is read to make one.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.jobs import (
    Cast,
    Job,
    TensorTypes,
    copies,
    first_tensor,
    make_jobs,
    output_types,
)
from dsv3.checkpoint.manifest import DIGEST_KEY, rank_file
from dsv3.checkpoint.names import compressed_name
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.region import Region, region_shape, whole
from dsv3.checkpoint.safetensors_file import make_header, tensor_bytes
from dsv3.checkpoint.sharding import FP8_DTYPE, tensor_region, tensor_specs
from dsv3.config import ModelConfig, ParallelConfig, QuantizationConfig
from dsv3.config_integers import IntegerConfig, IntegerKind
from dsv3.errors import ConfigError

HF_FILE_BYTES = 5_000_000_000  # the size at which Hugging Face splits files
_NO_DIGEST = "0" * 64
_LARGE = 64 << 20
# Weights that a cast needs at least one of.
_CASTABLE = {
    Cast.BF16: "FP8 or integer weights",
    Cast.FP8: "weights that are not FP8 already",
    Cast.INTEGERS: "weights to be cast to these integers",
    Cast.MIXED: "weights to be cast to integers within this budget",
}


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """One slice of an output tensor: the index of its file, its region, its offset in the file."""

    file: int
    region: Region
    offset: int


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write and its slices, one per file that holds a part of the tensor."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[OutputSlice, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write: its header (`prefix`), and the offset of each tensor's slice.

    The header has the names of `Plan.stored_name`, `offsets` has ours.
    """

    name: str
    prefix: bytes
    offsets: Mapping[str, int]
    num_bytes: int

    def signed(self, model_digest: str) -> bytes:
        """Return the header with the model's digest in place of zeros (rank files hold one)."""
        return self.prefix.replace(_NO_DIGEST.encode(), model_digest.encode(), 1)


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `layout` is None for a Hugging Face directory.

    Attributes:
        config: of the model as it will be stored.
        absent: optional weights that the source does not hold.
        id: changes if any output byte would change, or if a source file is replaced.
    """

    layout: ParallelConfig | None
    config: ModelConfig
    files: tuple[OutputFile, ...]
    tensors: Mapping[str, Output]
    jobs: tuple[Job, ...]
    absent: tuple[str, ...]
    id: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all output files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors, each counted once."""
        return sum(output.num_bytes for output in self.tensors.values())

    @property
    def is_cast(self) -> bool:
        """True if any weight changes its type."""
        return any(job.cast is not Cast.NONE for job in self.jobs)

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in the output files."""
        return _spelling(self.layout, self.config)(name)


def make_plan(
    source: Source,
    layout: ParallelConfig | None,
    cast: Cast = Cast.NONE,
    scale_fmt: str | None = None,
    keeps_mtp: bool = True,
    integers: Mapping[str, IntegerKind] | None = None,
) -> Plan:
    """Plan a conversion.

    Args:
        source: an open checkpoint; it is checked against its config first.
        layout: the ranks to write files for (its own `rank` is ignored); None writes a Hugging
            Face directory.
        cast: quantized weights to BF16, all weights that FP8 checkpoints quantize to FP8, or those
            in `integers` to integers and the others to BF16 or to their own type (MIXED).
        scale_fmt: "ue8m0" makes the scales of a cast to FP8 powers of two.
        keeps_mtp: also write the layers that draft tokens, if the source has any.
        integers: the weights to cast to integers, and the kind of each.

    Raises:
        CheckpointError: a tensor is missing, unknown or misshapen.
        ConfigError: the layout does not fit the model, or there is nothing to cast.
    """
    if layout is not None:
        layout.check(source.config)
    absent = check_tensors(source)
    jobs = tuple(make_jobs(source, cast, integers or {}, keeps_mtp))
    if cast is not Cast.NONE and not any(job.cast is cast.of_jobs for job in jobs):
        raise ConfigError(f"{source.path}: has no {_CASTABLE[cast]}; nothing to cast")
    types = output_types(source, jobs)
    config = _output_config(source, cast, scale_fmt, integers or {}, types)
    if layout is None:
        files, tensors = _lay_out(types, _hf_files(types), {}, _spelling(layout, config))
    else:
        contents = _rank_files(source, layout, types)
        files, tensors = _lay_out(types, contents, {DIGEST_KEY: _NO_DIGEST})
    written = {output for job in jobs for output in job.outputs}
    return Plan(
        layout=layout,
        config=config,
        files=files,
        tensors=tensors,
        jobs=_reading_order(source, jobs, tensors),
        absent=(*absent, *_left_out(source, written)),
        id=_plan_id(source, config, files),
    )


def _output_config(
    source: Source,
    cast: Cast,
    scale_fmt: str | None,
    integers: Mapping[str, IntegerKind],
    types: TensorTypes,
) -> ModelConfig:
    """Return the config of the model as it will be stored."""
    if cast is Cast.NONE:
        return source.config
    kept = None
    if cast.of_jobs is Cast.INTEGERS:
        distinct = tuple(dict.fromkeys(integers.values()))
        kept = IntegerConfig(method="compressed-tensors", kinds=distinct)
    quantization = QuantizationConfig(scale_fmt=scale_fmt) if cast is Cast.FP8 else None
    if cast is Cast.MIXED and any(each.dtype == FP8_DTYPE for each in types.values()):
        quantization = source.config.quantization
    return dataclasses.replace(source.config, quantization=quantization, integers=kept)


def _spelling(layout: ParallelConfig | None, config: ModelConfig) -> Callable[[str], str]:
    """Return the function that gives tensors their names in files.

    A Hugging Face directory with FP8 beside integers is one of compressed-tensors, which has its
    own name for block scales.
    """
    method = None if config.integers is None else config.integers.method
    is_mixed = method == "compressed-tensors" and config.quantization is not None
    return compressed_name if layout is None and is_mixed else str


def _left_out(source: Source, written: set[str]) -> Iterator[str]:
    """Yield the stored copies of embedding and head that are not written, of layers that are."""
    for name in copies(source):
        layer = ".".join(name.split(".")[:3])
        if name not in written and f"{layer}.eh_proj.weight" in written:
            yield name


Files = Iterator[tuple[str, dict[str, Region]]]  # file names, and the region of each tensor in it


def _rank_files(source: Source, layout: ParallelConfig, types: TensorTypes) -> Files:
    specs = tensor_specs(source.config)
    for rank in range(layout.world_size):
        place = dataclasses.replace(layout, rank=rank)
        regions = {n: tensor_region(specs, n, each.shape, place) for n, each in types.items()}
        present = {name: region for name, region in regions.items() if region is not None}
        yield rank_file(rank, layout.world_size), present


def _hf_files(types: TensorTypes) -> Files:
    groups: list[dict[str, Region]] = [{}]
    num_free = HF_FILE_BYTES
    for name, (dtype, shape) in types.items():
        size = tensor_bytes(dtype, shape)
        if groups[-1] and size > num_free:
            groups.append({})
            num_free = HF_FILE_BYTES
        groups[-1][name] = whole(shape)
        num_free -= size
    for index, group in enumerate(groups, 1):
        yield f"model-{index:05d}-of-{len(groups):05d}.safetensors", group


def _lay_out(
    types: TensorTypes,
    contents: Files,
    metadata: Mapping[str, str],
    spell: Callable[[str], str] = str,
) -> tuple[tuple[OutputFile, ...], dict[str, Output]]:
    """Return the files with their headers, and the slices of each tensor.

    `spell` gives tensors their names in the files.
    """
    files: list[OutputFile] = []
    slices: dict[str, list[OutputSlice]] = {name: [] for name in types}
    for index, (file, regions) in enumerate(contents):
        names = {spell(name): name for name in regions}
        parts = [
            (spelled, types[n].dtype, region_shape(regions[n])) for spelled, n in names.items()
        ]
        prefix, starts = make_header(parts, metadata)
        offsets = {names[spelled]: start for spelled, start in starts.items()}
        size = len(prefix) + sum(tensor_bytes(dtype, shape) for _, dtype, shape in parts)
        files.append(OutputFile(file, prefix, offsets, size))
        for name, offset in offsets.items():
            slices[name].append(OutputSlice(index, regions[name], offset))
    return tuple(files), {
        name: Output(each.dtype, each.shape, tuple(slices[name])) for name, each in types.items()
    }


def _reading_order(
    source: Source, jobs: tuple[Job, ...], tensors: Mapping[str, Output]
) -> tuple[Job, ...]:
    """Return jobs with the largest tensors first, the others in the order they have on disk.

    The largest go first because one worker handles a whole tensor. Tensors for different files
    alternate, because workers that write to the same file wait for each other.
    """

    def key(job: Job) -> tuple[int, str, int]:
        info = first_tensor(source, job)
        large = info.num_bytes if info.num_bytes >= _LARGE else 0
        return -large, str(info.pieces[0].file), info.pieces[0].offset

    by_file: dict[int, list[Job]] = {}
    for job in sorted(jobs, key=key):
        slices = tensors[job.outputs[0]].slices
        by_file.setdefault(slices[0].file if len(slices) == 1 else -1, []).append(job)
    turns = zip_longest(*by_file.values())
    return tuple(job for turn in turns for job in turn if job is not None)


def _plan_id(source: Source, config: ModelConfig, files: tuple[OutputFile, ...]) -> str:
    total = hashlib.sha256(f"{config}\n".encode())
    for path, version in source.versions.items():
        assert version is not None, f"{path=}"  # a source has all files
        total.update(f"{path.name} {version.size} {version.changed_ns}\n".encode())
    for file in files:
        total.update(file.name.encode() + file.prefix)
    return total.hexdigest()
