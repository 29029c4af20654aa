"""Compare the time of convert.py with `cp -r` of the same bytes, both with sync, in one run.

    python scripts/bench_convert.py --folder /data/bench [--model-parallel 8] [--rounds 3]

The program writes a checkpoint with DeepSeek-V3's tensor shapes (one dense and one MoE layer of 48
experts, FP8, 3.4 GB, in files of --file-gb) and removes it afterwards; it needs three times that
disk space. `--reference FILE` also measures DeepSeek's own convert.py.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.safetensors_file import make_header, tensor_bytes
from dsv3.checkpoint.sharding import scale_shape, tensor_specs
from dsv3.checkpoint.source import INDEX
from dsv3.config import ModelConfig
from dsv3.config_files import hf_config_dict, load_model_config

CONVERT = Path(__file__).resolve().parents[1] / "launch" / "convert.py"
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype and shape, as `make_header` takes them


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One run of a command: its seconds, those of the sync after it, and its peak bytes."""

    command: float
    sync: float
    peak: int

    @property
    def seconds(self) -> float:
        """Seconds of the command and the sync."""
        return self.command + self.sync


def synthetic_config(experts: int) -> ModelConfig:
    """Return DeepSeek-V3 with two layers, fewer experts and a smaller vocabulary."""
    return dataclasses.replace(
        load_model_config("v3-671b"),
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=experts,
        vocab_size=16384,
        num_nextn_predict_layers=0,
    )


def tensors_of(config: ModelConfig) -> Iterator[Tensor]:
    """Yield all tensors, with the types of the published checkpoint."""
    for spec in tensor_specs(config).values():
        if spec.quantizable:
            yield spec.name, "F8_E4M3", spec.shape
            yield scale_name(spec.name), "F32", scale_shape(spec.shape)
        else:
            bias = spec.name.endswith("e_score_correction_bias")
            yield spec.name, "F32" if bias else "BF16", spec.shape


def write_checkpoint(folder: Path, config: ModelConfig, file_bytes: float) -> int:
    """Write the checkpoint with random bytes; return its size."""
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors_of(config):
        if sum(tensor_bytes(*t[1:]) for t in groups[-1]) > file_bytes:
            groups.append([])
        groups[-1].append(tensor)
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 120, 1 << 20, np.uint8).tobytes()
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, _ = make_header(group)
        left = sum(tensor_bytes(*t[1:]) for t in group)
        with (folder / name).open("wb") as file:
            file.write(header)
            while left:
                left -= file.write(noise[: min(left, len(noise))])
        weight_map |= {t[0]: name for t in group}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config_dict(config)))
    return sum(file.stat().st_size for file in folder.iterdir())


def timed(command: list[str]) -> Run:
    """Run a command, then sync."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit {process.returncode}: {errors.strip()}")
    end = time.monotonic()
    os.sync()
    return Run(end - start, time.monotonic() - end, usage.ru_maxrss * 1024)


def commands_to_compare(
    args: argparse.Namespace, source: Path, target: Path
) -> dict[str, list[str]]:
    """Return the commands to compare, `cp -r` first."""
    flags = ["--hf-ckpt-path", str(source), "--save-path", str(target)]
    flags += ["--model-parallel", str(args.model_parallel), "--n-experts", str(args.experts)]
    commands = {
        "cp -r": ["cp", "-r", str(source), str(target)],
        "convert.py": [sys.executable, str(CONVERT), *flags],
    }
    if args.workers:
        commands["convert.py"] += ["--workers", str(args.workers)]
    if args.reference:
        commands["reference"] = [sys.executable, str(args.reference), *flags]
    return commands


def main() -> None:
    """Run all commands alternately for several rounds; print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="new directory; removed afterwards"
    )
    parser.add_argument("--model-parallel", type=int, default=8)
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--file-gb", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--reference", type=Path, metavar="FILE", help="DeepSeek's convert.py")
    args = parser.parse_args()
    source = args.folder / "source"
    target = args.folder / "target"
    if args.folder.exists():  # the directory is removed at the end with all its contents
        sys.exit(f"--folder={args.folder} is there already; name a new one on the disk to measure")
    try:
        start = time.monotonic()
        size = write_checkpoint(source, synthetic_config(args.experts), args.file_gb * 1e9)
        os.sync()
        print(f"{size / 1e9:.2f} GB written in {time.monotonic() - start:.1f} s")
        compare(commands_to_compare(args, source, target), target, size, args.rounds)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def compare(commands: dict[str, list[str]], target: Path, size: int, rounds: int) -> None:
    """Print a line for each command."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(timed(command))
            shutil.rmtree(target)
            os.sync()
    base = statistics.median(run.seconds for run in runs["cp -r"])
    print("            seconds  run + sync   GB/s   x cp -r   peak MiB")
    for name, results in runs.items():
        middle = sorted(results, key=lambda run: run.seconds)[len(results) // 2]
        peak = max(run.peak for run in results)
        total = statistics.median(run.seconds for run in results)
        print(
            f"{name:11} {total:7.2f}  {middle.command:5.2f} {middle.sync:5.2f} "
            f"{size / 1e9 / total:7.2f} {base / total:8.2f} {peak / 2**20:10.0f}"
        )


if __name__ == "__main__":
    main()
