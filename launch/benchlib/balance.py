"""The load of the busiest rank before experts are balanced over the ranks, and after.

    torchrun --nproc-per-node 8 launch/generate.py ... --record-expert-load LOADS
    python launch/bench.py balance --load LOADS --ranks 8 --redundant-experts 8 --save PLACEMENT
    torchrun --nproc-per-node 8 launch/generate.py ... --expert-placement PLACEMENT

Without --load: made-up loads, the popularity of a layer's experts after Zipf's law.
"""

import argparse
from pathlib import Path

import numpy as np

from benchlib.flags import add_program_flags, at_least
from benchlib.report import Report, check_report
from dsv3.config_files import DEMO, load_model_config
from dsv3.engine.program import Parser, set_up_logging
from dsv3.errors import ConfigError
from dsv3.files import NamedFile, check_output
from dsv3.parallel.expert_placement import Placement, layers_format, read_layers


def balance(args: argparse.Namespace) -> Report:
    """Compare equal ranges of experts with balanced ones."""
    config = load_model_config(args.config or DEMO)
    first = Placement.contiguous(config, args.ranks)
    if args.load:
        (experts,), loads = read_layers(args.load, ("num_experts",))
        if experts != first.num_experts or loads.keys() != first.layers.keys():
            raise ConfigError(f"{args.load}: it is of another model; give its --config")
    else:
        draw = np.random.default_rng(args.seed)
        popular = 1e6 / np.arange(1, 1 + first.num_experts) ** args.skew
        loads = {layer: draw.permutation(popular).astype(np.int64) for layer in first.layers}
    report = Report("balance", x_label="experts", y_label="busiest rank's load / mean")
    spare = Placement.contiguous(config, args.ranks, args.redundant_experts)
    balanced = spare.rebalanced(loads, config.n_group, args.nodes)
    moved = sum(int((balanced.layers[i] != spare.layers[i]).sum()) for i in loads)
    for name, placement in (("in equal ranges", first), ("balanced", balanced)):
        layers = [placement.imbalance({layer: load}) for layer, load in loads.items()]
        report.rows.append(
            {
                "experts": name,
                "slots a rank": placement.slots_per_rank,
                "max/mean load": placement.imbalance(loads),
                "best layer": min(layers),
                "worst layer": max(layers),
                "moved slots": moved if placement is balanced else None,
            }
        )
        report.series[name] = ([name], [report.rows[-1]["max/mean load"]])
    if args.save:
        balanced.write(args.save)
    what = ("load", "ranks", "nodes", "redundant_experts", "skew", "seed")
    report.setting = {name: str(getattr(args, name)) for name in what}
    return report


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="bench.py balance", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--load", type=Path, help="as --record-expert-load writes it")
    parser.add_argument("--config", help="the model (default: the demo model)")
    parser.add_argument("--skew", type=float, default=1.0, help="without --load: Zipf's exponent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=at_least(1), default=8)
    parser.add_argument(
        "--nodes", type=at_least(1), default=1, help="hosts; a group of experts stays on one"
    )
    parser.add_argument("--redundant-experts", type=int, default=0, help="copies in a layer")
    parser.add_argument("--save", type=Path, help="write the placement here")
    add_program_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Balance, report."""
    args = parse_args(arguments)
    check_report(args, inputs=("--load",), outputs=("--save",))
    if args.save:
        check_output(NamedFile("--save", args.save), layers_format(["num_experts", "num_ranks"]))
    set_up_logging(args.debug)
    report = balance(args)
    report.publish(args.json)
    return 0
