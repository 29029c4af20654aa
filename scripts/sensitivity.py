"""Measure the loss of quantizing each projection of each layer, one at a time.

    python scripts/sensitivity.py --ckpt-path DIR --tokens TEXTS.npz --json F.json --plot F.png
    torchrun --nproc-per-node 8 scripts/sensitivity.py --ckpt-path DIR --tokens T.npz --json F.json

The loss is the mean KL divergence of the model's output from that without quantization, in nats per
token of the texts (`tokens` and `offsets`, as launch/quality.py reads them). All ranks run the
runner that serves requests. Rank 0 writes the JSON file after every measurement; a run with the
same model and file measures only the losses that are missing. `convert.py --to mixed` reads it.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsv3.checkpoint.fp8_values import from_bf16
from dsv3.checkpoint.integer_values import quantize_rows
from dsv3.checkpoint.mixed import KINDS, Losses, fitting, read_losses, sites
from dsv3.checkpoint.sharding import Split, TensorSpec, tensor_specs
from dsv3.config import split_range
from dsv3.config_files import load_model_config
from dsv3.config_integers import IntegerKind
from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.mesh import Mesh, before_joining
from dsv3.engine.agreement import gather_texts
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.start import Started, identify, start
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import ConfigError
from dsv3.files import Format, NamedFile, check_output, write_output
from dsv3.read_files import read_mapping
from picture import check_picture, pyplot, write_picture
from program import (
    Parser,
    add_engine_flags,
    engine_config,
    join_engine_ranks,
    run_program,
    set_up_logging,
)

_JSON = Format("the results of sensitivity.py", re.compile(rb'\{\s*"sensitivity":'))


class Output:
    """The model's output for a few texts, all positions, on every rank."""

    def __init__(self, started: Started, texts: list[np.ndarray]) -> None:
        self._runner = started.runner
        self._tp = started.mesh.tp
        self._vocab = started.config.vocab_size
        self._plans = [self._plan(text) for text in texts]

    def _plan(self, tokens: np.ndarray) -> StepPlan:
        pages = self._runner.cache.layout.pages_for(len(tokens))
        if pages >= self._runner.cache.num_pages:
            raise ConfigError(
                f"a text of {len(tokens)} tokens does not fit the cache; see --longest"
            )
        tables = np.arange(1, 1 + pages, dtype=np.int32)[None]
        return StepPlan.greedy(tokens.astype(np.int32), np.zeros(1, np.int32), tables)

    def log_probs(self) -> Iterator[Tensor]:
        """Yield the log-probabilities of each text, [tokens, vocabulary]."""
        caught: list[Tensor] = []
        hook = self._runner.model.register_forward_hook(lambda *call: caught.append(call[2]))
        with torch.inference_mode():
            for plan in self._plans:
                self._runner.run([plan])
                parts = self._tp.all_gather(self._runner.model.logits(caught.pop()))
                logits = torch.cat(list(parts), -1)[:, : self._vocab]
                yield logits.log_softmax(-1)
        hook.remove()


@dataclass(frozen=True)
class Weight:
    """This rank's part of a weight.

    Attributes:
        spec: of the whole weight.
        part: view of the parameter.
    """

    spec: TensorSpec
    part: Tensor


class Weights:
    """The weights that may be integers, by site."""

    def __init__(self, started: Started) -> None:
        self._tp = started.mesh.tp
        specs = tensor_specs(started.config)
        found = {
            site: {spec.name for spec in of_site}
            for site, of_site in sites(started.config).items()
            if not of_site[0].mtp
        }
        self._by_site: dict[str, list[Weight]] = {site: [] for site in found}
        for target in started.runner.model.targets():
            site = next((site for site, names in found.items() if target.name in names), None)
            if site is None:
                continue
            if target.scale is not None:
                raise ConfigError(
                    f"{target.name} is stored in {target.dest.dtype}; the loss of quantizing is "
                    "measured from floating point: give --weights auto and --dtype bfloat16"
                )
            self._by_site[site].append(Weight(specs[target.name], target.dest))

    def sites(self) -> list[str]:
        """Return the sites, in the order of the layers."""
        return list(self._by_site)

    @contextmanager
    def quantized(self, site: str, kind: IntegerKind) -> Iterator[None]:
        """Quantize the weights of a site; restore them after the block. A collective."""
        weights = self._by_site[site]
        with torch.inference_mode():
            kept = [weight.part.clone() for weight in weights]
            for weight in weights:
                self._quantize(weight, kind)
        yield
        with torch.inference_mode():
            for weight, values in zip(weights, kept, strict=True):
                weight.part.copy_(values)

    def _quantize(self, weight: Weight, kind: IntegerKind) -> None:
        """Round this rank's part as in a whole weight, whose rows and groups shards may cut."""
        if weight.spec.split is not Split.COLS:
            if weight.part.numel():
                weight.part.copy_(rounded(weight.part, kind))
            return
        cols = weight.spec.shape[1]
        bounds = [
            split_range(cols, self._tp.size, i, weight.spec.unit) for i in range(self._tp.size)
        ]
        padded = weight.part.new_zeros(weight.spec.shape[0], max(b - a for a, b in bounds))
        padded[:, : weight.part.shape[1]] = weight.part
        parts = self._tp.all_gather(padded)
        whole = torch.cat([part[:, : b - a] for part, (a, b) in zip(parts, bounds, strict=True)], 1)
        first, stop = bounds[self._tp.rank]
        weight.part.copy_(rounded(whole, kind)[:, first:stop])


def rounded(weight: Tensor, kind: IntegerKind) -> Tensor:
    """Return the values that a weight has after rounding to integers."""
    x = np.ascontiguousarray(weight.float().cpu().numpy())
    cols = x.shape[1]
    group = fitting(kind, cols).group if cols % 32 == 0 else 0
    q, scale = quantize_rows(x, kind.bits, group or cols)
    return torch.from_numpy(q * from_bf16(scale).repeat(group or cols, 1))


def read_texts(path: str, longest: int, most: int) -> list[np.ndarray]:
    """Return texts, cut to `longest` tokens, until `most` tokens are reached."""
    data = np.load(path)
    bounds = [*data["offsets"].tolist(), len(data["tokens"])]
    texts: list[np.ndarray] = []
    for first, last in pairwise(bounds):
        if sum(map(len, texts)) >= most:
            break
        if last - first > 1:
            texts.append(data["tokens"][first : min(last, first + longest)])
    if not texts:
        raise ConfigError(f"{path}: has no texts of several tokens")
    return texts


def digests(texts: list[np.ndarray]) -> list[str]:
    """Return a short name of each text."""
    return [hashlib.sha256(text.tobytes()).hexdigest()[:16] for text in texts]


def divergence(want: list[Tensor], output: Output) -> float:
    """Return the mean KL divergence of the output from `want`, which is on the CPU."""
    total = 0.0
    for p, q in zip(want, output.log_probs(), strict=True):
        expected = p.to(q.device)
        total += (expected.exp() * (expected - q)).sum(-1).double().sum().item()
    return max(0.0, total / sum(len(p) for p in want))


def read_results(file: Path, setting: dict[str, object], mesh: Mesh) -> Losses:
    """Return the losses measured so far, on every rank as rank 0 reads them. A collective."""
    text = "{}"
    with collective_errors(mesh, "reading the results"):
        if mesh.layout.rank == 0 and file.exists():
            data = read_mapping(file)
            if any(data.get(name) != value for name, value in setting.items()):
                raise ConfigError(
                    f"--json={file}: measured with another model or other flags; remove it"
                )
            text = json.dumps(read_losses(file, is_complete=False))
    results: Losses = json.loads(gather_texts(mesh, text)[0])
    return results


def measure(started: Started, output: Output, file: Path, setting: dict[str, object]) -> Losses:
    """Measure the losses that the file lacks; rank 0 writes it after each."""
    rank = started.mesh.layout.rank
    named = NamedFile("--json", file)
    results = read_results(file, setting, started.mesh)
    weights = Weights(started)
    todo = [(s, k) for s in weights.sites() for k in KINDS if k not in results.get(s, {})]
    # On the CPU: the memory plan of the device has no room for texts x vocabulary.
    want = [p.cpu() for p in output.log_probs()] if todo else []
    for site, name in tqdm(todo, "measure", disable=rank > 0 or None):
        with weights.quantized(site, KINDS[name]):
            loss = divergence(want, output)
        results.setdefault(site, {})[name] = loss
        with collective_errors(started.mesh, "writing the results"):
            if rank == 0:
                text = json.dumps({"sensitivity": results} | setting, indent=1)
                write_output(named, _JSON, text + "\n")
    return results


def draw(results: Losses, file: Path) -> None:
    """Write the heat map: layers x projections, for each kind."""
    layers = sorted({int(site.split()[0]) for site in results})
    projections = list(dict.fromkeys(site.split()[1] for site in results))
    figure, axes = pyplot().subplots(
        1, len(KINDS), figsize=(2 + 0.45 * len(projections) * len(KINDS), 3 + 0.2 * len(layers))
    )
    for axis, name in zip(axes, KINDS, strict=True):
        values = np.full((len(layers), len(projections)), np.nan)
        for site, losses in results.items():
            layer, projection = site.split()
            values[layers.index(int(layer)), projections.index(projection)] = losses[name]
        image = axis.imshow(np.log10(np.maximum(values, 1e-12)), aspect="auto", cmap="viridis")
        axis.set_title(name)
        axis.set_xticks(range(len(projections)), projections, rotation=90)
        axis.set_yticks(range(len(layers)), layers)
        axis.set_ylabel("layer")
        figure.colorbar(image, ax=axis, label="log10 of nats per token")
    figure.tight_layout()
    write_picture(figure, file, dpi=80)


def parse_args() -> argparse.Namespace:
    """Return the flags, checked without the other ranks."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", required=True, help="texts, npz (see launch/quality.py)")
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    parser.add_argument("--plot", type=Path, help="file for the heat map (PNG, SVG, PDF)")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a text (default: 512)")
    parser.add_argument("--most", type=int, default=8192, help="tokens of all texts together")
    add_engine_flags(parser)
    args = parser.parse_args()
    if args.dp != 1:
        raise ConfigError(f"--dp={args.dp}: the output is measured in one group; leave it out")
    for name in ("longest", "most"):
        if getattr(args, name) < 2:
            raise ConfigError(f"--{name}={getattr(args, name)} must be at least 2")
    check_output(NamedFile("--json", args.json), _JSON)
    check_picture(args.plot)
    return args


def run(args: argparse.Namespace, mesh: Mesh) -> int:
    """Load the model, measure and draw; called on every rank."""
    settings = engine_config(args)
    path = locate_checkpoint(args.ckpt_path, mesh)
    with collective_errors(mesh, "reading the texts"):
        config = load_model_config(args.config) if args.config else None
        texts = read_texts(args.tokens, args.longest, args.most)
    started = start(path, settings, mesh, config, args.n_experts)
    setting: dict[str, object] = {
        "model": identify(path, settings, mesh, config),
        "texts": digests(texts),
    }
    with collective_errors(mesh, "measuring"):
        results = measure(started, Output(started, texts), args.json, setting)
        if args.plot and mesh.layout.rank == 0:
            draw(results, args.plot)
    return 0


def main() -> int:
    """Measure, write and draw according to the flags."""
    with before_joining():
        args = parse_args()
        set_up_logging(args.debug, args.log_dir)
    with join_engine_ranks(args, "cpu" if args.device == "auto" else args.device) as mesh:
        return run(args, mesh)


if __name__ == "__main__":
    run_program(main)
