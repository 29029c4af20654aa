"""The process that runs a chat template. Run as a script; `chat_template.py` is its other side.

A template is a program of a checkpoint's author. Jinja's sandbox keeps it from files and modules,
but not from loops without end or from texts of many gigabytes, which may come about inside of one
operation of C. So it runs here, where the system ends it: by processor time, which does not depend
on what else the machine does, and by memory.

Reads from standard input one JSON line with the template, then one for each rendering with the
template's variables. Answers each of those with one JSON line, `{kind: text}`, of these kinds:
`text` the rendered text; `refused` an error of the template with these variables; `damaged` an
error of the template itself; `exceeded` the limit it has met with.
"""

import json
import resource
import sys
import traceback
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 3  # of one rendering; a conversation of 100,000 tokens takes about 0.01
MEMORY_BYTES = 1 << 30
TEXT_CHARS = 1 << 20  # beyond twice the size of the variables
_OUT_OF_MEMORY = f"more than {MEMORY_BYTES >> 20:,} MiB of memory"


class _Refusal(TemplateError):
    """A template's own error, which it raises by `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model is trained on; here, nothing."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's content, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(content, lineno=line)


def make_environment() -> Environment:
    """Return the environment that templates are written for, that of transformers."""

    def raise_exception(message: str) -> None:
        raise _Refusal(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _compile(source: str) -> Template | str:
    """Return the template, or what is wrong with it."""
    try:
        return make_environment().from_string(source)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "nested too deeply"
    except MemoryError:
        return _OUT_OF_MEMORY
    except Exception as error:  # constants are computed here, and any of them may fail
        return f"{type(error).__name__}: {error}"


def _render(template: Template, variables: bytes) -> dict[str, str]:
    parts, num_chars, most = [], 0, TEXT_CHARS + 2 * len(variables)
    try:
        for part in template.generate(json.loads(variables)):
            parts.append(part)
            num_chars += len(part)
            if num_chars > most:
                return {"exceeded": f"more than {most:,} characters of text"}
        return {"text": "".join(parts)}
    except RecursionError:
        return {"exceeded": "nested too deeply, or calling itself without end"}
    except MemoryError:
        return {"exceeded": _OUT_OF_MEMORY}
    except _Refusal as error:
        return {"refused": str(error)}
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        return {"refused": f"{_line(error)}{error}"}
    except Exception as error:  # whatever else a template makes Python raise
        return {"refused": f"{_line(error)}{type(error).__name__}: {error}"}


def _line(error: Exception) -> str:
    """Return the line of the template in which an error was raised, if that is known."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f"line {lines[-1]}: " if lines else ""


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process, where the system has it."""
    _, most = resource.getrlimit(kind)
    with suppress(ValueError, OSError):
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, most))


def main() -> None:
    """Answer until standard input ends."""
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)  # being ended for processor time would leave a dump
    source: str = json.loads(sys.stdin.buffer.readline())
    template: Template | str | None = None
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, 1 + int(used.ru_utime + used.ru_stime) + CPU_SECONDS)
        template = template or _compile(source)
        answer = {"damaged": template} if isinstance(template, str) else _render(template, line)
        try:
            text = json.dumps(answer)
        except MemoryError:
            text = json.dumps({"exceeded": _OUT_OF_MEMORY})
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
