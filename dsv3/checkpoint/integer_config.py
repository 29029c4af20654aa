"""The `quantization_config` of a checkpoint with integer weights, as other programs read it.

vLLM, SGLang and transformers look each module up by its name: in `ignore` first, then in the
`targets` of the groups. Names are given as patterns over all layers or all experts where these
agree.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from dsv3.checkpoint.integers import IntegerForm, Layout, integer_form
from dsv3.checkpoint.names import weight_name
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.reader import TensorInfo
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.checkpoint.stored_quantization import stated_kind
from dsv3.config_integers import IntegerKind

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_NOT_A_MODULE = (".embed_tokens.weight", "norm.weight", ".e_score_correction_bias", ".bias")


def integer_config(plan: Plan) -> dict[str, Any]:
    """Return the `quantization_config` that describes the integer weights of a plan."""
    integers = plan.config.integers
    assert integers is not None
    by_module: dict[str, IntegerKind] = {}
    layouts: set[Layout] = set()
    for weight, form in _forms(plan):
        by_module[_module(weight)] = stated_kind(
            form, tensor_specs(plan.config)[weight].shape[1], integers.kinds
        )
        layouts.add(form.layout)
    ignored = [
        _module(name)
        for name, output in plan.tensors.items()
        if len(output.shape) == 2
        and weight_name(name) is None
        and not name.endswith(_NOT_A_MODULE)
        and _module(name) not in by_module
    ]
    if Layout.AWQ in layouts:
        return _awq_config(integers.kinds[0], ignored, by_module)
    groups: dict[str, Any] = {}
    for number, kind in enumerate(integers.kinds):
        modules = [module for module, own in by_module.items() if own == kind]
        others = [*ignored, *(module for module, own in by_module.items() if own != kind)]
        is_only = len(integers.kinds) == 1
        groups[f"group_{number}"] = {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"] if is_only else list(_patterns(modules, others)),
            "weights": _weights(kind),
        }
    return {
        "config_groups": groups,
        "format": "int-quantized" if layouts == {Layout.PLAIN} else "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(_patterns(ignored, by_module)),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _forms(plan: Plan) -> Iterator[tuple[str, IntegerForm]]:
    """Yield the weights that a plan stores as integers, and their forms."""
    tensors = {
        name: TensorInfo(name, output.dtype, output.shape, ())
        for name, output in plan.tensors.items()
    }
    for spec in tensor_specs(plan.config).values():
        form = integer_form(tensors, spec.name, spec.shape)
        if form is not None:
            yield spec.name, form


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _patterns(modules: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """Yield names and patterns that match all of `modules` and none of `others`."""
    taken = list(others)
    every = {_NUMBER.sub("#", name) for name in taken}
    experts = {_EXPERT.sub("#", name) for name in taken}
    patterns: dict[str, None] = {}
    for name in modules:
        for wide, number, in_use in ((_NUMBER, "#", every), (_EXPERT, "#", experts)):
            kind = wide.sub(number, name)
            if kind not in in_use and number in kind:
                patterns["re:" + re.escape(kind).replace(r"\#", r"\d+") + "$"] = None
                break
        else:
            patterns[name] = None
    return iter(patterns)


def _weights(kind: IntegerKind) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": kind.group or None,
        "num_bits": kind.bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group" if kind.group else "channel",
        "symmetric": True,
        "type": "int",
    }


def _awq_config(
    kind: IntegerKind, ignored: Iterable[str], modules: Iterable[str]
) -> dict[str, Any]:
    names = list(modules)
    return {
        "bits": kind.bits,
        "group_size": kind.group or -1,
        # Programs ignore a module if its name contains one of these.
        "modules_to_not_convert": [
            name for name in ignored if not any(name in module for module in names)
        ],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
