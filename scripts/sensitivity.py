"""Measure the loss of quantizing each projection of each layer, one at a time.

    python scripts/sensitivity.py --ckpt-path DIR --tokens TEXTS.npz --json F.json --plot F.png
    torchrun --nproc-per-node 8 scripts/sensitivity.py --ckpt-path DIR --tokens T.npz --json F.json

The loss is the mean KL divergence of the model's output from that without quantization, in nats per
token of the texts (`tokens` and `offsets`, as launch/quality.py reads them). All ranks run the
runner that serves requests. The JSON file is written after every measurement; a run with the same
model and file goes on where the last one ended. `convert.py --to mixed` reads it.
"""

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsv3.checkpoint.integer_values import quantize_rows
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.mixed import KINDS, fitting, sites
from dsv3.checkpoint.quantize import from_bf16
from dsv3.checkpoint.reader import Source
from dsv3.checkpoint.region import whole as whole_region
from dsv3.checkpoint.sharding import shard_region, tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig
from dsv3.config_integers import IntegerKind
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.start import Started, identify, start
from dsv3.engine.step_plan import StepPlan
from dsv3.errors import ConfigError
from dsv3.files import Format, NamedFile, check_output, write_output
from dsv3.parallel.weights import Target
from dsv3.read_files import read_mapping
from program import Parser, add_engine_flags, engine_config, join_ranks, run_program

_JSON = Format("the results of sensitivity.py", re.compile(rb'\{\s*"sensitivity":'))
_PLOT = Format(
    "a picture that matplotlib drew", re.compile(rb"(?is)(\x89PNG|<\?xml|%!PS).*matplotlib")
)


Losses = dict[str, dict[str, float]]
"""Nats per token by site and kind."""


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


@contextmanager
def quantized(
    started: Started, source: Source, names: set[str], kind: IntegerKind
) -> Iterator[None]:
    """Quantize this rank's part of some weights; restore them after the block.

    A scale may cover columns of several ranks, so each rank rounds the whole weight.
    """
    specs = tensor_specs(started.config)
    kept = []
    with torch.inference_mode():
        for target in started.runner.model.targets():
            if target.name in names and target.dest.numel():
                kept.append((target.dest, target.dest.clone()))
                spec = specs[target.name]
                # A copy of another rank's expert (`--redundant-experts`) is whole.
                region = shard_region(spec, started.mesh.layout) or whole_region(spec.shape)
                whole = torch.empty(spec.shape)
                load_weights(source, [Target(target.name, whole)], ParallelConfig())
                (first, last), (left, right) = region
                target.dest.copy_(rounded(whole, kind)[first:last, left:right])
    yield
    with torch.inference_mode():
        for weight, values in kept:
            weight.copy_(values)


def rounded(weight: Tensor, kind: IntegerKind) -> Tensor:
    """Return the values that a float32 weight has after rounding to integers."""
    x = weight.numpy()
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


def divergence(want: list[Tensor], output: Output) -> float:
    """Return the mean KL divergence of the output from `want`."""
    sums = [
        (p.exp() * (p - q)).sum(-1).double().sum().item()
        for p, q in zip(want, output.log_probs(), strict=True)
    ]
    return max(0.0, sum(sums) / sum(len(p) for p in want))


def measure(
    started: Started, source: Source, output: Output, file: Path, setting: dict[str, object]
) -> dict[str, dict[str, float]]:
    """Measure the losses that the file lacks; write it after each."""
    rank = started.mesh.layout.rank
    named = NamedFile("--json", file)
    results: Losses = {}
    if file.exists():
        data = read_mapping(file)
        if any(data.get(name) != value for name, value in setting.items()):
            raise ConfigError(
                f"--json={file}: measured with another model or other flags; remove it"
            )
        results = data["sensitivity"]
    weights = {
        site: {spec.name for spec in specs}
        for site, specs in sites(started.config).items()
        if not specs[0].mtp
    }
    todo = [(s, k) for s in weights for k in KINDS if k not in results.get(s, {})]
    want = list(output.log_probs())
    for site, name in tqdm(todo, "measure", disable=rank > 0 or None):
        with quantized(started, source, weights[site], KINDS[name]):
            loss = divergence(want, output)
        results.setdefault(site, {})[name] = loss
        if rank == 0:
            text = json.dumps({"sensitivity": results} | setting, indent=1)
            write_output(named, _JSON, text + "\n")
    return results


def draw(results: Losses, file: Path) -> None:
    """Write the heat map: layers x projections, for each kind."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    plots = importlib.import_module("matplotlib.pyplot")
    layers = sorted({int(site.split()[0]) for site in results})
    projections = list(dict.fromkeys(site.split()[1] for site in results))
    figure, axes = plots.subplots(
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
    picture = BytesIO()
    figure.tight_layout()
    figure.savefig(picture, format=file.suffix[1:] or "png", dpi=80)
    write_output(NamedFile("--plot", file), _PLOT, picture.getvalue())


def main() -> int:
    """Measure, write and draw according to the flags."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", required=True, help="texts, npz (see launch/quality.py)")
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    parser.add_argument("--plot", type=Path, help="file for the heat map (PNG, SVG, PDF)")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a text (default: 512)")
    parser.add_argument("--most", type=int, default=8192, help="tokens of all texts together")
    add_engine_flags(parser)
    args = parser.parse_args()
    check_output(NamedFile("--json", args.json), _JSON)
    if args.plot:
        check_output(NamedFile("--plot", args.plot), _PLOT)
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    texts = read_texts(args.tokens, args.longest, args.most)
    with join_ranks("cpu" if args.device == "auto" else args.device) as mesh:
        settings = engine_config(args)
        path = locate_checkpoint(args.ckpt_path, mesh)
        started = start(path, settings, mesh)
        if mesh.layout.dp > 1:
            raise ConfigError("--dp: the output is measured in one group; leave it out")
        setting: dict[str, object] = {
            "model": identify(path, settings, mesh, None),
            "texts": [len(text) for text in texts],
        }
        with open_source(path) as source:
            results = measure(started, source, Output(started, texts), args.json, setting)
        if args.plot and mesh.layout.rank == 0:
            draw(results, args.plot)
    return 0


if __name__ == "__main__":
    run_program(main)
