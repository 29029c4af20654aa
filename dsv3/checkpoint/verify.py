"""Verify a finished checkpoint against the source of its conversion, or against its digests.

The result is read like any other checkpoint, without the plan's knowledge of slices.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from dsv3.checkpoint.blocks import BLOCK_BYTES, BlockReader
from dsv3.checkpoint.check import check_tensors
from dsv3.checkpoint.digest import Digest
from dsv3.checkpoint.directory import INDEX
from dsv3.checkpoint.hub_cache import blob_digest
from dsv3.checkpoint.identity import model_digest
from dsv3.checkpoint.index import IndexDigests, read_digests
from dsv3.checkpoint.jobs import Job
from dsv3.checkpoint.manifest import MANIFEST, read_manifest
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.reader import Piece, Source, TensorInfo
from dsv3.checkpoint.region import whole
from dsv3.checkpoint.workers import run_jobs
from dsv3.errors import CheckpointError
from dsv3.read_files import open_regular

Progress = Callable[[int], None]


def verify_against(
    source: Source, plan: Plan, result: Source, workers: int, progress: Progress = lambda _: None
) -> None:
    """Check that `result` is the conversion of `source` by `plan`, bit for bit, with all replicas.

    Raises:
        CheckpointError: names the file and tensor that differ.
    """
    check_kinds(plan, result)
    reader = BlockReader(source, plan)

    def work(job: Job) -> int:
        for name, row, block in reader.blocks(job):
            info = result.tensors[name]
            rows = whole(info.shape)
            if len(rows) == 2:
                rows = ((row, row + len(block)), rows[1])
            stored = np.frombuffer(result.read(name, rows), np.uint8)
            if not np.array_equal(stored, block.reshape(-1)):
                raise CheckpointError(
                    f"{result.file_of(name)}: tensor {name} differs from {source.path} in rows "
                    f"{row} to {row + len(block)}"
                )
        return sum(_check_pieces(result, result.tensors[name]) for name in job.outputs)

    for size in run_jobs(plan.jobs, work, workers):
        progress(size)


def verify_digests(source: Source, workers: int, progress: Progress = lambda _: None) -> str:
    """Compare every byte of a directory's weights with the digests stored with it.

    Returns:
        the source of the digests: the manifest or index of a conversion, or the hub.

    Raises:
        CheckpointError: there are no digests, or a file does not match them.
    """
    if (source.path / MANIFEST).is_file():
        for size in run_jobs(source.tensors.values(), partial(_check_pieces, source), workers):
            progress(size)
        return "its manifest"
    digests = read_digests(source.path / INDEX) if (source.path / INDEX).is_file() else None
    if digests is not None:
        _verify_index(source, digests, workers, progress)
        return "its index"
    blobs = _blobs(source)
    if not blobs:
        check_tensors(source)
        raise CheckpointError(
            f"{source.path}: complete, with the right names, types and shapes, but without digests "
            "to compare the bytes with; directories that convert.py has written hold them"
        )
    for size in run_jobs(blobs.items(), _check_blob, workers):
        progress(size)
    return "the hub"


def _verify_index(source: Source, digests: IndexDigests, workers: int, progress: Progress) -> None:
    """Compare a Hugging Face directory with the digests in its index."""
    found = source.tensors
    index = source.path / INDEX
    known = [
        (name, info.dtype, info.shape, digests.tensors.get(name, ""))
        for name, info in found.items()
    ]
    if found.keys() != digests.tensors.keys() or model_digest(known) != digests.model_digest:
        raise CheckpointError(f"{source.path}: not the tensors that {index} was written for")

    def work(info: TensorInfo) -> int:
        _check_piece(source, info, info.pieces[0], digests.tensors[info.name], INDEX)
        return info.num_bytes

    for size in run_jobs(found.values(), work, workers):
        progress(size)


def _blobs(source: Source) -> Mapping[Path, str]:
    """Return the SHA-256 of each weight file of a hub snapshot; empty if one is unknown."""
    files = {piece.file for info in source.tensors.values() for piece in info.pieces}
    digests = {file: blob_digest(file) for file in sorted(files)}
    return digests if all(digests.values()) else {}


def _check_blob(blob: tuple[Path, str]) -> int:
    file, wanted = blob
    digest = hashlib.sha256()
    size = 0
    with open(open_regular(file, CheckpointError), "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    if digest.hexdigest() != wanted:
        raise CheckpointError(
            f"{file}: does not match its digest on the hub; remove {file.resolve()}, then download "
            "it again"
        )
    return size


def check_kinds(plan: Plan, result: Source) -> None:
    """Raise CheckpointError unless a checkpoint has the layout and the tensors of a plan."""
    layout = read_manifest(result.path).layout if (result.path / MANIFEST).is_file() else None
    if layout != plan.layout:
        kinds = ["Hugging Face" if it is None else str(it) for it in (layout, plan.layout)]
        raise CheckpointError(
            f"{result.path}: holds a conversion for {kinds[0]}, not for {kinds[1]}; give "
            "--overwrite to replace it"
        )
    have = {name: (info.dtype, info.shape) for name, info in result.tensors.items()}
    want = {name: (output.dtype, output.shape) for name, output in plan.tensors.items()}
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise CheckpointError(
                f"{result.path}: holds another checkpoint (tensor {name} is {have.get(name)}, "
                f"wanted {want.get(name)}); give --overwrite to replace it"
            )


def _check_pieces(result: Source, info: TensorInfo) -> int:
    """Check each stored copy or slice against its digest, if it has one; return its bytes."""
    for piece in info.pieces if info.digest else ():
        _check_piece(result, info, piece, piece.digest, MANIFEST)
    return info.num_bytes


def _check_piece(
    source: Source, info: TensorInfo, piece: Piece, wanted: str, listed_in: str
) -> None:
    digest = Digest()
    for block in source.stream(info, piece, BLOCK_BYTES):
        digest.update(block)
    digest.check(wanted, piece.file, info.name, listed_in)
