"""Carry out a conversion plan: any checkpoint to any layout, one pass, in bounded memory.

Workers read tensors in bounded row blocks, cast them if asked to, and write each slice to its
place in the output files, all ranks' files side by side. Digests are computed on the way. Files
keep temporary names until all are complete and on disk; the manifest (or the index of a Hugging
Face directory) comes last, so a directory never looks whole before it is. A conversion that was
killed goes on where its journal ends, and the result is the same to the byte.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv3.checkpoint.blocks import BlockReader
from dsv3.checkpoint.digest import file_digest, model_digest
from dsv3.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Record, Shard
from dsv3.checkpoint.plan import Job, Plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.report import in_units
from dsv3.checkpoint.side_files import copy_side_files, write_atomically, write_index
from dsv3.checkpoint.source import INDEX
from dsv3.checkpoint.workers import run_jobs
from dsv3.checkpoint.writer import JOURNAL, PARTIAL, Digests, Journal, OutputFiles, Spreader
from dsv3.config import ParallelConfig
from dsv3.errors import CheckpointError

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Bytes of tensors written by this run, and by the earlier runs it went on from."""

    written: int
    resumed: int


def is_complete(folder: Path) -> bool:
    """Whether a directory holds a finished checkpoint, of whatever kind or content."""
    return (folder / MANIFEST).is_file() or (folder / INDEX).is_file()


def finish(folder: Path) -> None:
    """Remove the journal that a kill after the very last step leaves."""
    (folder / JOURNAL).unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove every checkpoint file, finished or not; other files stay."""
    for name in (MANIFEST, INDEX):  # first, so that what is left does not look whole
        (folder / name).unlink(missing_ok=True)
    for file in _weight_files(folder):
        file.unlink()
    (folder / JOURNAL).unlink(missing_ok=True)


def disk_space(plan: Plan, folder: Path) -> tuple[int, int]:
    """Bytes that a conversion still needs on the disk of its folder, and bytes that are free."""
    there = sum(file.stat().st_blocks * 512 for file in _weight_files(folder))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return max(0, plan.num_bytes - there), shutil.disk_usage(existing).free


def check_space(plan: Plan, folder: Path) -> None:
    """Raise CheckpointError if the disk is too small."""
    needed, free = disk_space(plan, folder)
    if needed > free:
        raise CheckpointError(
            f"{folder}: {in_units(needed)} are needed, the disk has {in_units(free)} free"
        )


def convert(
    source: Source, plan: Plan, folder: Path, workers: int, progress: Progress = lambda _: None
) -> Outcome:
    """Write the files of a plan into a folder, going on where an earlier run was stopped.

    Args:
        source: an open checkpoint, the one the plan was made for.
        plan: what to write.
        folder: where to; it is made if need be.
        workers: threads, each with a few buffers of some MiB.
        progress: told the bytes of each finished tensor, from this thread.

    Raises:
        CheckpointError: the folder holds another checkpoint or the disk is too small; a source
            file is damaged; a file cannot be written.
    """
    check_space(plan, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / JOURNAL).exists():
        _refuse_weights(folder)
    with Journal(folder, plan.fingerprint) as journal, OutputFiles(folder, plan.files) as files:
        finished = journal.read()
        if finished is None:
            _drop_abandoned(folder)
        if finished is None or not files.reusable():
            journal.restart()
            finished = {}
        files.open(reuse=bool(finished))
        resumed = sum(plan.tensors[name].num_bytes for name in finished)
        progress(resumed)
        written = 0
        for name, digests in _write_tensors(source, plan, files, workers, finished):
            size = plan.tensors[name].num_bytes
            journal.add(name, digests, size, files)
            finished[name] = digests
            written += size
            progress(size)
        journal.flush(files)
        copy_side_files(source.path, folder, plan)
        _publish(plan, folder, files, finished)
        journal.path.unlink()
    return Outcome(written, resumed)


def _write_tensors(
    source: Source, plan: Plan, files: OutputFiles, workers: int, finished: Mapping[str, Digests]
) -> Iterator[tuple[str, Digests]]:
    """Do the jobs that are left; yield each output tensor with its digests."""
    reader = BlockReader(source, plan)

    def work(job: Job) -> dict[str, Digests]:
        spread = {name: Spreader(plan.tensors[name], files) for name in job.outputs}
        for name, row, block in reader.blocks(job):
            spread[name].put(row, block)
        return {name: spreader.digests() for name, spreader in spread.items()}

    jobs = [job for job in plan.jobs if not finished.keys() >= set(job.outputs)]
    for results in run_jobs(jobs, work, workers):
        yield from results.items()


def _publish(plan: Plan, folder: Path, files: OutputFiles, finished: Mapping[str, Digests]) -> None:
    """Make a finished conversion visible; the manifest or index comes last."""
    if plan.layout is None:
        files.publish()
        write_index(folder, plan)
        return
    manifest = _manifest(plan, plan.layout, finished)
    files.sign(manifest.model_digest)
    files.sync()
    files.publish()
    write_atomically(folder / MANIFEST, manifest.to_json())


def _manifest(plan: Plan, layout: ParallelConfig, finished: Mapping[str, Digests]) -> Manifest:
    tensors = {
        name: Record(
            output.dtype,
            output.shape,
            finished[name][0],
            tuple(
                Shard(slot.file, slot.region, digest)
                for slot, digest in zip(output.slots, finished[name][1:], strict=True)
            ),
        )
        for name, output in plan.tensors.items()
    }
    whole = model_digest((name, r.dtype, r.shape, r.digest) for name, r in tensors.items())
    held = {(name, s.rank): s.digest for name, r in tensors.items() for s in r.shards}
    records = tuple(
        FileRecord(
            file.name,
            file.num_bytes,
            file_digest(file.signed(whole), (held[name, rank] for name in file.offsets)),
        )
        for rank, file in enumerate(plan.files)
    )
    return Manifest(layout, records, tensors, whole)


def _drop_abandoned(folder: Path) -> None:
    """Remove what an unfinished conversion to another plan has left."""
    for file in folder.glob(f"*.safetensors{PARTIAL}"):
        file.unlink()
    _refuse_weights(folder)


def _refuse_weights(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: holds another checkpoint ({file.name}); choose an empty directory, or "
            "give --overwrite to remove it"
        )


def _weight_files(folder: Path) -> list[Path]:
    """Files of weights, finished or not."""
    return [
        file
        for pattern in ("*.safetensors", f"*.safetensors{PARTIAL}")
        for file in sorted(folder.glob(pattern))
    ]
