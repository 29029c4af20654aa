"""Read a finished checkpoint back: against the source it was made from, or its own digests.

Nothing here knows how a conversion cuts tensors: the result is read as any loader reads it.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from dsv3.checkpoint.blocks import BLOCK_BYTES, BlockReader
from dsv3.checkpoint.digest import Digest
from dsv3.checkpoint.manifest import MANIFEST, read_manifest
from dsv3.checkpoint.plan import Job, Plan
from dsv3.checkpoint.reader import Source, TensorInfo
from dsv3.checkpoint.region import whole
from dsv3.checkpoint.workers import run_jobs
from dsv3.errors import CheckpointError

Progress = Callable[[int], None]


def verify_against(
    source: Source, plan: Plan, result: Source, workers: int, progress: Progress = lambda _: None
) -> None:
    """Prove that `result` is what `plan` makes of `source`, bit for bit, replicas included.

    Raises:
        CheckpointError: naming the file and tensor that differ.
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
                    f"{result.where(name)}: tensor {name} differs from {source.path} in rows "
                    f"{row} to {row + len(block)}"
                )
        return sum(_check_pieces(result, result.tensors[name]) for name in job.outputs)

    for size in run_jobs(plan.jobs, work, workers):
        progress(size)


def verify_digests(source: Source, workers: int, progress: Progress = lambda _: None) -> None:
    """Hold every byte of a converted directory to the digests of its manifest.

    Raises:
        CheckpointError: there is no manifest, or a file does not match it.
    """
    if not (source.path / MANIFEST).is_file():
        raise CheckpointError(
            f"{source.path}: has no {MANIFEST}; only directories that convert.py made can be "
            "verified without --save-path"
        )
    for size in run_jobs(source.tensors.values(), partial(_check_pieces, source), workers):
        progress(size)


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
    """Hold each stored copy or slice to its digest, where there are digests."""
    for piece in info.pieces if info.digest else ():
        digest = Digest()
        for block in result.stream(info, piece, BLOCK_BYTES):
            digest.update(block)
        if str(digest) != piece.digest:
            raise CheckpointError(
                f"{piece.file}: tensor {info.name} does not match its digest in {MANIFEST}; "
                "copy or convert the file again"
            )
    return info.num_bytes
