"""Read the tensors of a conversion as streams of bounded row blocks, and cast them."""

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dsv3.checkpoint.digest import Digest
from dsv3.checkpoint.fp8_values import (
    BF16_INFINITY,
    F32,
    dequantize,
    from_bf16,
    quantize,
    to_bf16,
)
from dsv3.checkpoint.integer_values import (
    IntegerRows,
    check_stated_shape,
    pack,
    quantize_rows,
    read_integers,
)
from dsv3.checkpoint.integers import IntegerForm, Layout
from dsv3.checkpoint.jobs import Cast, Job
from dsv3.checkpoint.manifest import MANIFEST
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.safetensors_file import DTYPE_BYTES
from dsv3.checkpoint.scales import read_scales
from dsv3.checkpoint.sharding import BLOCK, FP8_DTYPE, tensor_specs
from dsv3.errors import CheckpointError

# A block is read, digested and written while it is in a core's L2 cache, usually 1 MiB or more.
# Blocks of 2 MiB take 1.5 times as long.
BLOCK_BYTES = 512 << 10
Bytes = npt.NDArray[np.uint8]


class BlockReader:
    """Reader of the tensors of conversion jobs, with one buffer per thread."""

    def __init__(self, source: Source, plan: Plan) -> None:
        self._source = source
        self._specs = tensor_specs(source.config)
        quantization = plan.config.quantization
        self._scale_fmt = quantization.scale_fmt if quantization else None
        self._local = threading.local()

    def blocks(self, job: Job) -> Iterator[tuple[str, int, Bytes]]:
        """Yield (output name, first row, [rows, bytes per row]), the rows of each output in order.

        A block is valid until the next one is requested.
        """
        if job.cast is Cast.NONE:
            yield from ((job.name, row, block) for row, block in self._rows(job.name, 1))
        elif job.cast is Cast.BF16 and job.stored is None:
            for row, out_FD in self._dequantized(job.name):
                yield job.name, row, out_FD.view(np.uint8)
        elif job.cast is Cast.BF16:
            for row, x_FD in self._values(job):
                yield job.name, row, to_bf16(x_FD).view(np.uint8)
        elif job.cast is Cast.FP8:
            weight, scale = job.outputs
            for row, x_FD in self._values(job):
                w_FD, scale_fd = quantize(x_FD, self._scale_fmt)
                yield weight, row, w_FD
                yield scale, row // BLOCK, scale_fd.view(np.uint8)
        else:
            yield from self._integers(job)

    def _integers(self, job: Job) -> Iterator[tuple[str, int, Bytes]]:
        assert job.form is not None
        packed, scale, shape = job.outputs
        if job.is_repacked:
            assert job.stored is not None
            for row, integers in self._integer_rows(job, job.stored):
                yield packed, row, pack(integers.q_FD, job.form.kind.bits)
            for row, block in self._rows(job.stored.scale_name(job.name), 1):
                yield scale, row, block
            yield shape, 0, self._shape(job)
            return
        for row, x_FD in self._values(job):
            q_FD, scale_Fg = quantize_rows(x_FD, job.form.kind.bits, job.form.kind.group)
            yield packed, row, pack(q_FD, job.form.kind.bits)
            yield scale, row, scale_Fg.view(np.uint8)
        yield shape, 0, self._shape(job)

    def _shape(self, job: Job) -> Bytes:
        return np.array([self._specs[job.name].shape], "<i8").view(np.uint8)

    def _values(self, job: Job) -> Iterator[tuple[int, F32]]:
        """Yield (first row, values) of a weight; blocks have a multiple of 128 rows."""
        if job.stored is not None:
            for row, integers in self._integer_rows(job, job.stored):
                x_FD = integers.values()
                self._check_finite(job.stored.scale_name(job.name), np.isfinite(x_FD))
                yield row, x_FD
            return
        dtype = self._source.tensors[job.name].dtype
        if dtype == FP8_DTYPE:
            yield from ((row, from_bf16(out_FD)) for row, out_FD in self._dequantized(job.name))
            return
        for row, block in self._rows(job.name, BLOCK):
            if dtype == "BF16":
                x_FD = from_bf16(block.view(np.uint16))
            else:
                x_FD = block.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)
            self._check_finite(job.name, np.isfinite(x_FD))
            yield row, x_FD

    def _integer_rows(self, job: Job, stored: IntegerForm) -> Iterator[tuple[int, IntegerRows]]:
        """Yield (first row, integers) of a stored integer weight; digests are checked first."""
        check_stated_shape(self._source, job.name, self._specs[job.name].shape, stored)
        for name in stored.names(job.name):
            if self._source.tensors[name].digest:
                for _ in self._rows(name, 1):  # checks the digest
                    pass
        rows, cols = self._specs[job.name].shape
        count = max(1, BLOCK_BYTES // (cols * BLOCK)) * BLOCK
        if stored.layout is Layout.AWQ:
            count = rows  # it stores columns as rows, so that a few rows take reading everything
        for row in range(0, rows, count):
            region = ((row, min(row + count, rows)), (0, cols))
            integers = read_integers(
                self._source, job.name, self._specs[job.name].shape, stored, region
            )
            self._check_finite(stored.scale_name(job.name), np.isfinite(integers.scale_Fg))
            yield row, integers

    def _dequantized(self, name: str) -> Iterator[tuple[int, npt.NDArray[np.uint16]]]:
        """Yield (first row, BF16 values) of an FP8 weight."""
        scale = scale_name(name)
        for row, w_FD in self._rows(name, BLOCK):
            first = row // BLOCK
            last = -(-(row + len(w_FD)) // BLOCK)
            cols = (0, self._source.tensors[scale].shape[1])
            scale_fd = read_scales(self._source, name, ((first, last), cols))
            out_FD = dequantize(w_FD, scale_fd)
            self._check_finite(name, (out_FD & BF16_INFINITY) != BF16_INFINITY)
            yield row, out_FD

    def _check_finite(self, name: str, is_finite: npt.NDArray[np.bool_]) -> None:
        """Raise CheckpointError for NaN and infinity, which a cast cannot represent."""
        if not is_finite.all():
            raise CheckpointError(
                f"{self._source.file_of(name)}: tensor {name} cannot be cast: it has values that "
                "are NaN or infinite; fetch or export it again"
            )

    def _rows(self, name: str, step: int) -> Iterator[tuple[int, Bytes]]:
        """Yield (first row, block) of a stored tensor; blocks have a multiple of `step` rows.

        If the source has a digest of the tensor, it is checked after the last block.
        """
        info = self._source.tensors[name]
        rows, cols = info.shape if len(info.shape) == 2 else (1, *info.shape)
        width = cols * DTYPE_BYTES[info.dtype]
        count = max(step, BLOCK_BYTES // width // step * step)
        digest = Digest()
        for row in range(0, rows, count):
            stop = min(row + count, rows)
            block = self._memory((stop - row) * width).reshape(stop - row, width)
            region = ((row, stop), (0, cols))
            self._source.read(name, region[-len(info.shape) :], block.data)
            if info.digest:
                digest.update(block.data.cast("B"))
            yield row, block
        if info.digest:
            digest.check(info.digest, self._source.file_of(name), name, MANIFEST)

    def _memory(self, num_bytes: int) -> Bytes:
        """Return memory for one block; the thread's buffer grows for tensors with longer rows."""
        buffer: Bytes | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._local.buffer = np.empty(max(num_bytes, BLOCK_BYTES), np.uint8)
        return buffer[:num_bytes]
