"""Formats of integer weights that benchmarks give to random weights."""

import torch

from dsv3.checkpoint.jobs import may_be_integers
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ModelConfig
from dsv3.config_integers import IntegerKind
from dsv3.parallel.weight_format import KeptIntegers

INTEGERS = {
    "int8": KeptIntegers(IntegerKind(8, 0), torch.bfloat16),
    "int4": KeptIntegers(IntegerKind(4, 32), torch.bfloat16),
}


def integer_names(config: ModelConfig, weights: str, on_cpu: bool) -> dict[str, KeptIntegers]:
    """Return the weights that `convert.py --to int8|int4` writes as integers; none for others.

    Args:
        config: the model.
        weights: format of the weights.
        on_cpu: scales are held as products on CPUs need them.
    """
    kind = INTEGERS.get(weights)
    if kind is None:
        return {}
    if on_cpu:
        kind = kind._replace(scale=torch.float32)
    specs = tensor_specs(config).values()
    return {s.name: kind for s in specs if may_be_integers(s) and s.shape[1] % 32 == 0}
