"""Execute a conversion plan: any checkpoint to any layout, in one pass and bounded memory.

Workers read tensors in bounded row blocks, cast them if the plan says so, and write each slice to
its offset in the output files; the files of all ranks are written in parallel. Digests are computed
on the fly. Files have temporary names until all of them are complete and on disk. Only then is a
replaced checkpoint removed, and the new files are renamed, the manifest (or the index of a Hugging
Face directory) last. A kill at any moment leaves either the old checkpoint complete, or a directory
that is recognized as incomplete and that the same command completes, with the same bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv3.checkpoint.blocks import BlockReader
from dsv3.checkpoint.identity import model_digest
from dsv3.checkpoint.index import IndexDigests, index_json
from dsv3.checkpoint.jobs import Job
from dsv3.checkpoint.journal import ConversionJournal, JournalRecord
from dsv3.checkpoint.manifest import FileRecord, Manifest, Shard, TensorRecord
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.side_files import write_content
from dsv3.checkpoint.target import OutputDirectory, Survey
from dsv3.checkpoint.workers import run_jobs
from dsv3.checkpoint.writer import Digests, OutputFiles, TensorWriter
from dsv3.config import ParallelConfig
from dsv3.errors import CheckpointError, os_errors_as
from dsv3.files import sync_folder

Progress = Callable[[int], None]

_COMPLETE = "(the new files are complete, as *.partial; give the same command again)"


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """The result of a conversion.

    Attributes:
        written: bytes of tensors written by this run.
        resumed: bytes of tensors written by earlier runs.
    """

    written: int
    resumed: int


def check(target: OutputDirectory) -> Survey:
    """Check that a conversion may write to its directory; change nothing.

    Raises:
        CheckpointError: a file is in the way, or the disk is too small.
    """
    record = target.read_record()
    survey = target.survey(record)
    target.check_space(record)
    return survey


def convert(
    source: Source,
    plan: Plan,
    folder: Path,
    workers: int,
    progress: Progress = lambda _: None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> ConversionResult:
    """Write the files of a plan into a folder; resume an interrupted run.

    Args:
        source: the open checkpoint that the plan was made for.
        plan: the files to write.
        folder: output directory; created if it does not exist.
        workers: number of threads, each with a few buffers of some MiB.
        progress: called with the bytes of each finished tensor, from this thread.
        overwrite: replace an existing checkpoint.
        inputs: files that are read in addition to the source; they are not replaced.

    Raises:
        CheckpointError: the folder holds other files, or the disk is too small; a source file is
            damaged or was changed meanwhile; a file cannot be written.
    """
    target = OutputDirectory(folder, source, plan, overwrite, inputs)
    check(target)
    with os_errors_as(CheckpointError, f"{folder}: cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    with ConversionJournal(folder) as journal:
        survey = target.survey(journal.record)  # again: under the lock, no other process writes
        written = 0
        is_written = target.is_written(journal.record)
        if not is_written:
            _begin(target, survey, journal)
        finished = journal.record.finished
        resumed = sum(plan.tensors[name].num_bytes for name in finished)
        progress(resumed)
        if not is_written:
            written = _write(source, target, survey, journal, workers, progress)
        _put_in_place(target, target.survey(journal.record))
        journal.remove()
    return ConversionResult(written, resumed)


@contextmanager
def clean_up_after(target: OutputDirectory) -> Iterator[None]:
    """Remove the leftovers of a finished but killed conversion, if the block raises no error.

    Raises:
        CheckpointError: another conversion is writing here.
    """
    if not target.read_record().plan:
        yield
        return
    with ConversionJournal(target.folder) as journal:
        yield
        if journal.record.plan == target.plan.id:
            _remove_partials(target, journal.record)
            journal.remove()


def _begin(target: OutputDirectory, survey: Survey, journal: ConversionJournal) -> None:
    """Write the names of the output files to the journal; resume the earlier run if possible."""
    plan = target.plan
    record = journal.record
    names = target.names(survey)
    with OutputFiles(target.folder, plan.files) as files:
        if record.finished and record.fits(plan) and files.reusable():
            journal.resume(names, survey.replaces)
        else:
            journal.begin(plan.id, names, survey.replaces)
            _remove_partials(target, record)


def _remove_partials(target: OutputDirectory, record: JournalRecord) -> None:
    for name in record.names:
        target.partial(name).unlink(missing_ok=True)


def _write(
    source: Source,
    target: OutputDirectory,
    survey: Survey,
    journal: ConversionJournal,
    workers: int,
    progress: Progress,
) -> int:
    """Write all files under temporary names; return the bytes of tensors written."""
    plan = target.plan
    finished = journal.record.finished
    written = 0
    with OutputFiles(target.folder, plan.files) as files:
        files.open(reuse=bool(finished))
        for name, digests in _write_tensors(source, plan, files, workers, dict(finished)):
            size = plan.tensors[name].num_bytes
            journal.add(name, digests, size, files)
            written += size
            progress(size)
        journal.flush(files)
        if source.is_changed():
            raise CheckpointError(f"{source.path}: was changed while it was read; convert again")
        last = _last_file(plan, files, finished)
    with os_errors_as(CheckpointError, f"{target.folder}: cannot be written"):
        for name, content in {**survey.sides, target.last: last}.items():
            target.partial(name).unlink(missing_ok=True)  # left by a run that was stopped here
            target.partial(name).parent.mkdir(exist_ok=True)
            write_content(target.partial(name), content)
    _sync_folders(target, survey)
    journal.end_writing()
    return written


def _last_file(plan: Plan, files: OutputFiles, finished: Mapping[str, Digests]) -> bytes:
    """Return the index or manifest; for a manifest, sign the files with its digest."""
    if plan.layout is None:
        return _index(plan, finished).encode()
    manifest = _manifest(plan, plan.layout, finished)
    files.sign(manifest.model_digest)
    files.sync()
    return manifest.to_json().encode()


def _put_in_place(target: OutputDirectory, survey: Survey) -> None:
    """Remove replaced files and rename the new ones; no content is written."""
    names = target.names(survey)
    for name in survey.replaces:
        path = target.folder / name
        # Without a temporary file, the file is new: an earlier run was stopped after its rename.
        if name not in names or target.partial(name).exists():
            with os_errors_as(CheckpointError, f"{path}: cannot be replaced {_COMPLETE}"):
                path.unlink(missing_ok=True)
    with os_errors_as(CheckpointError, f"{target.folder}: cannot be changed {_COMPLETE}"):
        for name in names:
            if name == target.last:
                _sync_folders(target, survey)
            if target.partial(name).exists():
                target.partial(name).replace(target.folder / name)
        sync_folder(target.folder)


def _sync_folders(target: OutputDirectory, survey: Survey) -> None:
    for folder in {target.partial(name).parent for name in target.names(survey)}:
        sync_folder(folder)


def _write_tensors(
    source: Source, plan: Plan, files: OutputFiles, workers: int, finished: Mapping[str, Digests]
) -> Iterator[tuple[str, Digests]]:
    """Run the unfinished jobs; yield each output tensor with its digests."""
    reader = BlockReader(source, plan)

    def work(job: Job) -> dict[str, Digests]:
        writers = {name: TensorWriter(plan.tensors[name], files) for name in job.outputs}
        for name, row, block in reader.blocks(job):
            writers[name].put(row, block)
        return {name: writer.digests() for name, writer in writers.items()}

    jobs = [job for job in plan.jobs if not finished.keys() >= set(job.outputs)]
    for results in run_jobs(jobs, work, workers):
        yield from results.items()


def _index(plan: Plan, finished: Mapping[str, Digests]) -> str:
    digests = {name: finished[name][0] for name in plan.tensors}
    kinds = ((name, out.dtype, out.shape, digests[name]) for name, out in plan.tensors.items())
    files = {
        plan.stored_name(name): plan.files[out.slices[0].file].name
        for name, out in plan.tensors.items()
    }
    total_size = sum(output.num_bytes for output in plan.tensors.values())
    return index_json(files, total_size, IndexDigests(digests, model_digest(kinds)))


def _manifest(plan: Plan, layout: ParallelConfig, finished: Mapping[str, Digests]) -> Manifest:
    tensors = {
        name: TensorRecord(
            output.dtype,
            output.shape,
            finished[name][0],
            tuple(
                Shard(part.file, part.region, digest)
                for part, digest in zip(output.slices, finished[name][1:], strict=True)
            ),
        )
        for name, output in plan.tensors.items()
    }
    whole = model_digest((name, r.dtype, r.shape, r.digest) for name, r in tensors.items())
    records = tuple(FileRecord(file.name, file.num_bytes) for file in plan.files)
    return Manifest(layout, records, tensors, whole)
