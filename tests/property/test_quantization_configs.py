"""Whatever is wrong with a `quantization_config`, the answer is one line, and never a traceback."""

import copy
import json
import string
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.side_files import side_files
from dsv3.checkpoint.source import open_source
from dsv3.config import IntegerConfig, QuantizationConfig
from dsv3.config_files import DEMO
from dsv3.config_quantization import Quantization, read_quantization
from dsv3.errors import ConfigError
from tests.integer_files import FORMS, mixed_kinds_by_hand, quantization

Path_ = tuple[str | int, ...]
FP8 = json.loads((DEMO / "config.json").read_text())["quantization_config"]
NAMES = (*FORMS, "fp8", "mixed")
# Values of the fields, in wrong places, and others.
WORDS = (
    *("group", "channel", "block", "tensor", "float", "int", "static", "weight", "compressed"),
    *("pack-quantized", "float-quantized", "mixed-precision", "awq", "fp8", "compressed-tensors"),
    *("Linear", "re:(", "e4m3", "ue8m0", "dynamic", "a\nb", "\x1b[2J", "", "128x128"),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from((0, -1, 1, 4, 8, 32, 128, 10**30, 0.5, float("nan"), float("inf"), 128.0))
    | st.sampled_from(WORDS)
    | st.text(string.printable, max_size=5)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3)
    ),
    max_leaves=6,
)


def written_by_us() -> dict[str, Any]:
    """Return the config of int8, int4 and FP8 in one checkpoint."""
    with open_source(DEMO) as source:
        plan = make_plan(source, None, Cast.MIXED, integers=mixed_kinds_by_hand(source))
        text = side_files(source.path, plan)["config.json"]
    assert isinstance(text, bytes)
    config: dict[str, Any] = json.loads(text)["quantization_config"]
    assert len(config["config_groups"]) == 4
    return config


@pytest.fixture(scope="module")
def configs() -> dict[str, dict[str, Any]]:
    return {name: quantization(name) for name in FORMS} | {"fp8": FP8, "mixed": written_by_us()}


def places(data: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every value inside."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def read(data: dict[str, Any], tensors_decide: bool) -> Quantization | str:
    """Return the quantization, or the error's line."""
    try:
        return read_quantization({"quantization_config": data}, "config.json", tensors_decide)
    except ConfigError as error:
        return str(error)


def test_they_are_read_as_they_are(configs: dict[str, dict[str, Any]]) -> None:
    for name, config in configs.items():
        found = read(config, False)
        assert isinstance(found, Quantization) and not found.warning, name
        assert (found.config is not None) == (name in ("fp8", "mixed"))
        assert (found.integers is not None) == (name != "fp8")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.data(), st.booleans())
def test_any_value_anywhere(
    configs: dict[str, dict[str, Any]], name: str, data: st.DataObject, tensors_decide: bool
) -> None:
    config = copy.deepcopy(configs[name])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(places(config), key=str)))
        inside: Any = config
        for key in path[:-1]:
            inside = inside[key]
        if data.draw(st.booleans()) and isinstance(inside, dict):
            del inside[path[-1]]
        else:
            inside[path[-1]] = data.draw(VALUES)
        if not config:
            break
    found = read(config, tensors_decide)
    if isinstance(found, str):
        assert found.startswith("config.json: ") and len(found.splitlines()) == 1, found
        assert found.isprintable() and len(found) < 600, found
        return
    assert isinstance(found.config, QuantizationConfig | None)
    assert isinstance(found.integers, IntegerConfig | None)
    assert len(found.warning.splitlines()) <= 1 and not (found.warning and not tensors_decide)
    for kind in () if found.integers is None else found.integers.kinds:
        assert kind.bits in (4, 8) and kind.group >= 0 and type(kind.group) is int
