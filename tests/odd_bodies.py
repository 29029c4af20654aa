"""Bodies of requests that are almost right."""

import copy
import json
import random
from typing import Any


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 0.5, 10**30, 2**31, 2**63, 1e308, float("nan")),
    *("", "x", "\ud800", "\x00", "<｜User｜>", "</think>", "x" * 300, "9" * 5000),
    *("auto", "none", "required", "text", "json_object", "user", "tool", "\r\n\r\ndata: {}"),
    *([], {}, [[]], [None], [{}], {"": {}}, {"type": "text"}, ["a"] * 200, [1.5], {"\ud800": 1}),
    *(nested(20), nested(90)),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return each container in a value with each of its keys."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        container = left.pop()
        if isinstance(container, dict | list):
            keys = range(len(container)) if isinstance(container, list) else container
            found += [(container, key) for key in keys]
            left += [container[key] for key in keys]
    return found


def mutated(body: dict[str, Any], draw: random.Random) -> bytes:
    """Return a body with one to three values replaced, dropped, added or wrapped, or torn."""
    body = copy.deepcopy(body)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        container, key = draw.choice(places(body) or [(body, "model")])
        match draw.choice(("replace", "replace", "drop", "add", "wrap")):
            case "drop" if key in container or isinstance(container, list):
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw.choice(("zz", "stream", "type", "n", "strict"))] = draw.choice(ODD)
            case "wrap" if isinstance(container, list):
                container[key] = [container[key]]
            case _:
                container[key] = copy.deepcopy(draw.choice(ODD))
    data = json.dumps(body).encode()
    if draw.random() < 0.1:
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return data[: draw.randint(0, len(data))] if draw.random() < 0.05 else data
