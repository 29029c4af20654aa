"""Rendering of any template ends, with an error of one line if it fails."""

import gc
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dsv3.errors import CheckpointError, RequestError
from dsv3.text.chat_template import ChatTemplate

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "tools": None}
OUT_OF_TIME = "no end within 3 seconds of processor time"
OUT_OF_MEMORY = "more than 1,024 MiB of memory"
NESTED = "nested too deeply, or calling itself without end"
DOUBLING = "{% set s = namespace(x='ab') %}{% for i in range(99) %}{% set s.x = STEP %}{% endfor %}"
FAILS = {
    "endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        OUT_OF_TIME,
    ),
    "endless within one operation": (
        DOUBLING.replace("STEP", "[s.x, s.x]") + "{{ s.x }}",
        OUT_OF_TIME,
    ),
    "long text": ("{{ 'a' * 10 ** 10 }}", OUT_OF_MEMORY),
    "long text of a variable": ("{{ messages[0].content * 10 ** 10 }}", OUT_OF_MEMORY),
    "long text by a filter": ("{{ 'a' | center(10 ** 10) }}", OUT_OF_MEMORY),
    "long text by a format": ("{{ '%10000000000d' | format(1) }}", OUT_OF_MEMORY),
    "long text by a method": ("{{ '{:10000000000}'.format(1) }}", OUT_OF_MEMORY),
    "doubling text": (DOUBLING.replace("STEP", "s.x ~ s.x"), f"{OUT_OF_MEMORY}|{OUT_OF_TIME}"),
    "much text": (
        "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        "more than 1,048,[0-9]{3} characters of text",
    ),
    "macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", NESTED),
    "loop that calls itself": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", NESTED),
    "blocks beyond Python's": ("{% if x %}" * 150 + "{% endif %}" * 150, "IndentationError"),
    "unknown filter": ("one\n{{ 'a' | nosuch }}", "line 2: No filter named 'nosuch'."),
}
NO_TEMPLATES = {
    "syntax": ("one\n{% if %}", ", line 2: Expected an expression, got 'end of statement block'"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ": nested too deeply"),
    "digits": ("{{ " + "9" * 5000 + " }}", ": Exceeds the limit (4300 digits)"),
    "size": ("x" * 300_000, ": more than 262,144 characters"),
}


@pytest.mark.parametrize("kind", FAILS)
@pytest.mark.slow
def test_a_template_without_end_fails_by_name(kind: str) -> None:
    source, reason = FAILS[kind]
    template = ChatTemplate(source, "dir/tokenizer_config.json")
    for _ in range(100):  # at once, from the second time on
        with pytest.raises(CheckpointError) as caught:
            template.render(QUESTION)
        assert re.match(f"dir/tokenizer_config.json: chat template: ({reason})", str(caught.value))


@pytest.mark.parametrize("kind", NO_TEMPLATES)
def test_damage_is_found_without_running_anything(kind: str) -> None:
    source, reason = NO_TEMPLATES[kind]
    with pytest.raises(CheckpointError) as caught:
        ChatTemplate(source, "x.jinja")
    assert str(caught.value).startswith(f"x.jinja: chat template{reason}")


def test_messages_that_are_too_much_harm_no_others() -> None:
    source = "{{ '%%%sd' | format(messages[0].content) | format(1) }}"
    template = ChatTemplate(source, "x.jinja")
    ask = {"messages": [{"content": "5"}]}
    for width, reason in (("9" * 11, OUT_OF_MEMORY), ("9" * 5000, "the chat template refuses")):
        assert template.render(ask) == "    1"
        with pytest.raises(RequestError, match=reason):
            template.render({"messages": [{"content": width}]})
    assert template.render(ask) == "    1"


def test_long_messages_make_long_texts() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].content }}", "x.jinja")
    text = "word " * 500_000
    assert template.render({"messages": [{"content": text}]}) == text + text


def test_any_text_goes_in_and_out_unchanged() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].more | tojson }}", "x.jinja")
    text = "a\x00\x1b\n\r\u2028胡🙂\ud800"
    more = {"b": [1, 2.5, None, True, "ü"], "a": {}}
    got = template.render({"messages": [{"content": text, "more": more}]})
    assert got == text + '{"b": [1, 2.5, null, true, "ü"], "a": {}}'


def test_messages_are_made_of_json_values() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "x.jinja")
    with pytest.raises(RequestError, match="messages must be made of JSON values: Object of type"):
        template.render({"messages": [{"content": object()}]})


def _workers() -> list[int]:
    """Return the processes that this one has started for templates."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_worker = b"template_worker" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and is_worker:
            found.append(int(folder.name))
    return found


def test_a_process_that_is_killed_is_replaced_and_none_is_left_behind() -> None:
    gc.collect()
    others = _workers()
    template = ChatTemplate("hi", "x.jinja")
    assert _workers() == others  # until it is needed
    assert template.render(QUESTION) == "hi"
    (worker,) = set(_workers()) - set(others)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(CheckpointError, match=r"x\.jinja: the process of .* was ended"):
        template.render(QUESTION)
    assert template.render(QUESTION) == "hi"
    del template
    gc.collect()
    assert _workers() == others


def test_threads_get_their_own_texts() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "t")

    def render(number: int) -> str:
        return template.render({"messages": [{"content": str(number)}], "tools": None})

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, range(200))) == [str(number) for number in range(200)]
