"""Formats of random weights, as checkpoints in these formats store them."""

import torch

from dsv3.checkpoint.jobs import may_be_integers
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.config import ModelConfig
from dsv3.config_integers import IntegerKind
from dsv3.parallel.weight_format import KeptIntegers, WeightFormat

INTEGERS = {
    "int8": KeptIntegers(IntegerKind(8, 0), torch.bfloat16),
    "int4": KeptIntegers(IntegerKind(4, 32), torch.bfloat16),
}


def random_format(config: ModelConfig, weights: str, device: torch.device) -> WeightFormat:
    """Return the format of a model with random weights.

    Args:
        config: the model.
        weights: "fp8", "int8", "int4", "bf16" or "fp32".
        device: holds the weights; on a CPU as its products need them.
    """
    specs = tensor_specs(config)
    on_cpu = device.type == "cpu"
    is_fp8 = weights == "fp8"
    fp8_names = (name for name, spec in specs.items() if is_fp8 and spec.quantizable)
    keeps_routers = weights != "fp32" and not on_cpu
    routers = (name for name in specs if keeps_routers and name.endswith(".mlp.gate.weight"))
    scale_fmt = config.quantization.scale_fmt if config.quantization else None
    return WeightFormat(
        torch.float32 if weights == "fp32" else torch.bfloat16,
        device,
        fp8_names=frozenset(fp8_names),
        fp8_products=is_fp8 and not on_cpu,
        ue8m0=is_fp8 and scale_fmt == "ue8m0",
        bf16_vectors=frozenset(routers),
        integers=integer_names(config, weights, on_cpu),
        cpu_products=on_cpu,
    )


def integer_names(config: ModelConfig, weights: str, on_cpu: bool) -> dict[str, KeptIntegers]:
    """Return the weights that `convert.py --to int8|int4` writes as integers; none for others.

    Args:
        config: the model.
        weights: format of the weights.
        on_cpu: scales are float32, as products on CPUs need them.
    """
    kind = INTEGERS.get(weights)
    if kind is None:
        return {}
    if on_cpu:
        kind = kind._replace(scale=torch.float32)
    specs = tensor_specs(config).values()
    return {s.name: kind for s in specs if may_be_integers(s) and s.shape[1] % 32 == 0}
