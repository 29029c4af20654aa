"""Compare the load of the busiest rank before and after experts are balanced over the ranks.

    torchrun --nproc-per-node 8 launch/generate.py ... --record-expert-load LOADS
    python launch/bench.py balance --load LOADS --ranks 8 --redundant-experts 8 --save PLACEMENT
    torchrun --nproc-per-node 8 launch/generate.py ... --expert-placement PLACEMENT

Without --load: synthetic loads; the popularity of a layer's experts follows Zipf's law.
"""

import argparse
from pathlib import Path

import numpy as np

from benchlib.flags import at_least
from benchlib.report import Report
from dsv3.config_files import DEMO, load_model_config
from dsv3.errors import ConfigError
from dsv3.files import NamedFile, check_output
from dsv3.parallel.expert_placement import Placement, layers_format, read_layers


def run(args: argparse.Namespace) -> Report:
    """Compare equal ranges of experts with balanced ones."""
    if args.save:
        check_output(NamedFile("--save", args.save), layers_format(["num_experts", "num_ranks"]))
    config = load_model_config(args.config or DEMO)
    contiguous = Placement.contiguous(config, args.ranks)
    if args.load:
        (experts,), loads = read_layers(args.load, ("num_experts",))
        if experts != contiguous.num_experts or loads.keys() != contiguous.layers.keys():
            raise ConfigError(f"{args.load}: loads of another model; give its --config")
    else:
        rng = np.random.default_rng(args.seed)
        popularity = 1e6 / np.arange(1, 1 + contiguous.num_experts) ** args.skew
        loads = {layer: rng.permutation(popularity).astype(np.int64) for layer in contiguous.layers}
    label = "busiest rank's load / mean"
    report = Report("balance", x_label="experts", y_label=label, is_computed=True)
    with_copies = Placement.contiguous(config, args.ranks, args.redundant_experts)
    balanced = with_copies.rebalanced(loads, config.n_group, args.nodes)
    moved = sum(int((balanced.layers[i] != with_copies.layers[i]).sum()) for i in loads)
    for name, placement in (("in equal ranges", contiguous), ("balanced", balanced)):
        layers = [placement.imbalance({layer: load}) for layer, load in loads.items()]
        report.rows.append(
            {
                "experts": name,
                "experts a rank": placement.physical_per_rank,
                "max/mean load": placement.imbalance(loads),
                "best layer": min(layers),
                "worst layer": max(layers),
                "moved experts": moved if placement is balanced else None,
            }
        )
        report.series[name] = ([name], [report.rows[-1]["max/mean load"]])
    if args.save:
        balanced.write(args.save)
    flags = ("load", "ranks", "nodes", "redundant_experts", "skew", "seed")
    values = {name: getattr(args, name) for name in flags}
    report.setting = {name: str(value) for name, value in values.items() if value is not None}
    return report


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    add = parser.add_argument
    add("--load", type=Path, help="a file that --record-expert-load has written")
    add("--config", help="model to place (default: the demo model)")
    add("--skew", type=float, default=1.0, help="Zipf exponent of synthetic loads")
    add("--seed", type=int, default=0, help="of synthetic loads (default: 0)")
    add("--ranks", type=at_least(1), default=8, help="number of ranks")
    text = "number of hosts; each expert group stays on one"
    add("--nodes", type=at_least(1), default=1, help=text)
    text = "extra copies in a layer (default: 0)"
    add("--redundant-experts", type=int, default=0, help=text)
    add("--save", type=Path, help="file to write the placement to")
