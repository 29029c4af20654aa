"""The process that renders a chat template; a script that `chat_template.py` starts.

A template is a program by the checkpoint's author. Jinja's sandbox denies access to files and
modules, but does not prevent endless loops or texts of many gigabytes, which a single C operation
can produce. So a template is rendered in this process, with limits of CPU time, which does not
depend on the load of the machine, and of memory.

The script reads one JSON line with the template from standard input, then one line with variables
per rendering. It replies to each with one JSON line, `{kind: text}`. The kinds are: `text`, the
rendered text; `refused`, an error of the template with these variables; `damaged`, an error of the
template itself; `exceeded`, the limit that was exceeded.
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
    """An error that a template raises with `raise_exception`."""


class _GenerationTag(Extension):
    """Ignores the tags of `{% generation %}...{% endgeneration %}`, which mark training targets."""

    tags = {"generation"}  # noqa: RUF012  # the type that Jinja declares

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's content in its own scope, as in transformers."""
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(content, lineno=line)


def make_environment() -> Environment:
    """Return the Jinja environment of transformers, for which templates are written."""

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
    """Return the compiled template, or the error."""
    try:
        return make_environment().from_string(source)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "nested too deeply"
    except MemoryError:
        return _OUT_OF_MEMORY
    except Exception as error:  # constants are evaluated here, and any error may occur
        return f"{type(error).__name__}: {error}"


def _render(template: Template, variables: bytes) -> dict[str, str]:
    parts: list[str] = []
    num_chars = 0
    max_chars = TEXT_CHARS + 2 * len(variables)
    try:
        for part in template.generate(json.loads(variables)):
            parts.append(part)
            num_chars += len(part)
            if num_chars > max_chars:
                return {"exceeded": f"more than {max_chars:,} characters of text"}
        return {"text": "".join(parts)}
    except RecursionError:
        return {"exceeded": "nested too deeply, or calling itself without end"}
    except MemoryError:
        return {"exceeded": _OUT_OF_MEMORY}
    except _Refusal as error:
        return {"refused": str(error)}
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        return {"refused": f"{_line(error)}{error}"}
    except Exception as error:  # any other error that a template can cause
        return {"refused": f"{_line(error)}{type(error).__name__}: {error}"}


def _line(error: Exception) -> str:
    """Return the template's line of an error as a prefix; empty if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f"line {lines[-1]}: " if lines else ""


def _limit(kind: int, value: int) -> None:
    """Lower a resource limit of this process, if the system supports it."""
    _, hard_limit = resource.getrlimit(kind)
    with suppress(ValueError, OSError):
        value = value if hard_limit == resource.RLIM_INFINITY else min(value, hard_limit)
        resource.setrlimit(kind, (value, hard_limit))


def main() -> None:
    """Reply to lines until standard input ends."""
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)  # exceeding the CPU limit would write a core dump
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
