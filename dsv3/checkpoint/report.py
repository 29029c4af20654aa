"""Description of a conversion plan, for `--dry-run`."""

from collections import Counter
from collections.abc import Iterator

from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.names import weight_name
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.region import region_shape, whole
from dsv3.checkpoint.safetensors_file import tensor_bytes
from dsv3.checkpoint.sharding import FP8_DTYPE, tensor_specs

_TYPES = {Cast.BF16: "BF16", Cast.FP8: "FP8", Cast.INTEGERS: "integers"}


def in_units(num_bytes: float) -> str:
    """Return a number of bytes in decimal units, as used for disks and published checkpoints."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def describe(source: Source, plan: Plan, needed: int, free: int) -> Iterator[str]:
    """Yield the lines that `--dry-run` prints."""
    read = _tensors(len(source.tensors), source.num_bytes)
    yield f"from: {source.path}: {source.config.model_type}, {read}"
    kinds = Counter(output.dtype for output in plan.tensors.values())
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(kinds.items()))
    tensors = _tensors(len(plan.tensors), plan.num_bytes)
    yield f"to:   {tensors} in {len(plan.files)} files ({dtypes})"
    if plan.layout is not None and plan.layout.dp > 1:
        yield f"for:  tp={plan.layout.tp} x dp={plan.layout.dp}, experts over all ranks"
    for file in plan.files:
        yield f"      {file.name}: {_tensors(len(file.offsets), file.num_bytes)}"
    yield from _shared(plan)
    yield from _drafting(source, plan)
    for cast in (Cast.BF16, Cast.FP8, Cast.INTEGERS):
        names = [job.name for job in plan.jobs if job.cast is cast]
        if names:
            yield f"cast to {_TYPES[cast]}: {len(names)} weights ({names[0]}, ...)"
    if plan.absent:
        yield f"absent from the source: {len(plan.absent)} tensors ({plan.absent[0]}, ...)"
    yield f"disk: {in_units(needed)} needed, {in_units(free)} free"


def _drafting(source: Source, plan: Plan) -> Iterator[str]:
    """Yield a line about the weights of MTP layers."""
    specs = tensor_specs(source.config)
    sizes = [
        info.num_bytes
        for name, info in source.tensors.items()
        if (spec := specs.get(weight_name(name) or name)) is not None and spec.mtp
    ]
    if not sizes:
        return
    is_kept = any(spec.mtp and spec.name in plan.tensors for spec in specs.values())
    fate = "kept (--no-mtp leaves them out)" if is_kept else "left out"
    yield f"mtp:  layers that draft tokens, {_tensors(len(sizes), sum(sizes))}: {fate}"


def _shared(plan: Plan) -> Iterator[str]:
    """Yield lines about replicated tensors, and about slices that begin inside an FP8 block."""
    cut: list[str] = []
    copies: dict[str, list[str]] = {"on every rank": [], "in every group": []}
    extra: Counter[str] = Counter()
    for name, output in plan.tensors.items():
        sizes = [tensor_bytes(output.dtype, region_shape(part.region)) for part in output.slices]
        is_whole = output.slices[0].region == whole(output.shape)
        if len(sizes) > 1 and (is_whole or (plan.layout is not None and plan.layout.dp > 1)):
            place = "on every rank" if is_whole else "in every group"
            copies[place].append(name)
            extra[place] += sum(sizes) - output.num_bytes
        starts = (start for part in output.slices for start, _ in part.region)
        if output.dtype == FP8_DTYPE and any(start % 128 for start in starts):
            cut.append(name)
    for place, names in copies.items():
        if names:
            yield (
                f"replicated {place}: {len(names)} tensors, {in_units(extra[place])} beyond one "
                f"copy ({names[0]}, ...)"
            )
    if cut:
        yield (
            f"slices that begin inside a 128-block: {len(cut)} FP8 weights ({cut[0]}, ...); rows "
            "are kept as they are, with all scales that cover them"
        )


def _tensors(count: int, num_bytes: int) -> str:
    return f"{count} tensors, {in_units(num_bytes)}"
