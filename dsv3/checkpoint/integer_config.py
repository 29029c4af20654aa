"""The `quantization_config` of a checkpoint with integer weights, as other programs read it.

vLLM, SGLang and transformers look each module up by its name: in `ignore` first, then in the
`targets` of the groups. Names are given as patterns over all layers or all experts where these
agree.

Source: compressed-tensors 0.20, quant_scheme.py (FP8_BLOCK).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from dsv3.checkpoint.integers import IntegerForm, Layout, integer_form
from dsv3.checkpoint.names import weight_name
from dsv3.checkpoint.plan import Plan
from dsv3.checkpoint.reader import TensorInfo
from dsv3.checkpoint.sharding import BLOCK, FP8_DTYPE, tensor_specs
from dsv3.checkpoint.stored_quantization import stated_kind
from dsv3.config_integers import IntegerKind

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_NOT_A_MODULE = (".embed_tokens.weight", "norm.weight", ".e_score_correction_bias", ".bias")

Schemes = dict[str, IntegerKind | None]
"""The quantized modules with their kinds of integers; None for FP8 in blocks."""


def integer_config(plan: Plan) -> dict[str, Any]:
    """Return the `quantization_config` that describes the quantized weights of a plan."""
    integers = plan.config.integers
    assert integers is not None
    specs = tensor_specs(plan.config)
    schemes: Schemes = {}
    layouts: set[Layout] = set()
    for weight, form in _forms(plan):
        schemes[_module(weight)] = stated_kind(form, specs[weight].shape[1], integers.kinds)
        layouts.add(form.layout)
    if Layout.AWQ in layouts:
        return _awq_config(integers.kinds[0], _ignored(plan, schemes), schemes)
    fp8 = [_module(name) for name, out in plan.tensors.items() if out.dtype == FP8_DTYPE]
    schemes |= dict.fromkeys(fp8)
    form_of_integers = "int-quantized" if layouts == {Layout.PLAIN} else "pack-quantized"
    ignored = _ignored(plan, schemes)
    return {
        "config_groups": _groups(schemes, ignored, form_of_integers),
        "format": "mixed-precision" if fp8 else form_of_integers,
        "global_compression_ratio": None,
        "ignore": list(_patterns(ignored, schemes)),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | _scale_fmt(plan)


def _ignored(plan: Plan, schemes: Schemes) -> list[str]:
    """Return the modules with a matrix that is not quantized."""
    return [
        _module(name)
        for name, output in plan.tensors.items()
        if len(output.shape) == 2
        and weight_name(name) is None
        and not name.endswith(_NOT_A_MODULE)
        and _module(name) not in schemes
    ]


def _groups(schemes: Schemes, ignored: list[str], form_of_integers: str) -> dict[str, Any]:
    """Return the groups of modules of one kind.

    transformers reads all routed experts by the first group with a pattern of "experts", and
    "shared_experts" is one, so the group of the routed experts comes first.
    """
    routed = [kind for module, kind in schemes.items() if ".experts." in module]
    groups: dict[str, Any] = {}
    kinds = list(dict.fromkeys([*routed, *schemes.values()]))
    for number, kind in enumerate(kinds):
        modules = [module for module, own in schemes.items() if own == kind]
        others = [*ignored, *(module for module, own in schemes.items() if own != kind)]
        groups[f"group_{number}"] = {
            "input_activations": _FP8_ACTIVATIONS if kind is None else None,
            "output_activations": None,
            "targets": ["Linear"] if len(kinds) == 1 else list(_patterns(modules, others)),
            "weights": _FP8_WEIGHTS if kind is None else _weights(kind),
        }
        if None in kinds:
            groups[f"group_{number}"]["format"] = (
                "float-quantized" if kind is None else form_of_integers
            )
    return groups


def _scale_fmt(plan: Plan) -> dict[str, str]:
    """Return our own field: the scales of activations are powers of two, too."""
    quantization = plan.config.quantization
    scale_fmt = None if quantization is None else quantization.scale_fmt
    return {} if scale_fmt is None else {"scale_fmt": scale_fmt}


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
    return _scheme(
        group_size=kind.group or None,
        num_bits=kind.bits,
        observer="minmax",
        strategy="group" if kind.group else "channel",
        type="int",
    )


def _scheme(**given: object) -> dict[str, Any]:
    """Return how numbers are quantized, with all fields of compressed-tensors."""
    other: dict[str, Any] = {"actorder": None, "block_structure": None, "dynamic": False}
    other |= {"group_size": None, "observer_kwargs": {}, "symmetric": True}
    return dict(sorted((other | given).items()))


_FP8_WEIGHTS = _scheme(
    block_structure=[BLOCK, BLOCK], num_bits=8, observer="minmax", strategy="block", type="float"
)
_FP8_ACTIVATIONS = _scheme(
    dynamic=True, group_size=BLOCK, num_bits=8, observer=None, strategy="group", type="float"
)


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
