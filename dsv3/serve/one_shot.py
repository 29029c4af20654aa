"""Answer one prompt: stream the answer to standard output, all else to standard error.

The prompt is a chat message if the model has a chat format; otherwise its text is continued.
"""

import logging
import sys
from dataclasses import dataclass, replace

from dsv3.engine.engine import Engine
from dsv3.errors import CheckpointError, ConfigError, RequestError
from dsv3.request import Completion
from dsv3.serve.batch import BatchSummary
from dsv3.serve.batch_file import MAX_ROW_BYTES
from dsv3.serve.input_file import InputFile
from dsv3.serve.row_form import looks_like_rows
from dsv3.serve.terminal import harmless, write_text
from dsv3.streams import STANDARD
from dsv3.text.chat import AnyFormat, ChatFormat, UnusableFormat
from dsv3.text.defaults import LINE_DEFAULTS, TURN_DEFAULTS, Defaults
from dsv3.text.openai_format import plain_request
from dsv3.text.text_request import TextRequest, encode_prompt, token_requests
from dsv3.text.thoughts import ThoughtStream

log = logging.getLogger(__name__)

_NAME = "prompt"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its source, for messages."""

    text: str
    source: str = "--prompt"

    def __post_init__(self) -> None:
        """Raise ConfigError for a blank prompt."""
        if not self.text.strip():
            raise ConfigError(f"{self.source} is empty")


def read_prompt() -> Prompt:
    """Read the prompt from standard input, to its end.

    Raises:
        ConfigError: the input is a terminal, empty, not text, or has rows of a batch.
    """
    no_input = (
        "nothing to answer: give --prompt TEXT, --interactive or --input-file FILE, or a prompt on "
        "standard input"
    )
    if sys.__stdin__ is None or sys.stdin.isatty():
        raise ConfigError(no_input)
    log.info("reading the prompt from standard input")
    source = InputFile.find(STANDARD, "the prompt on")
    with source.open() as file:
        data = file.read(MAX_ROW_BYTES + 1)
    if not data.strip():
        raise ConfigError(f"{no_input}; it is empty")
    if len(data) > MAX_ROW_BYTES:
        raise source.error(f"longer than {MAX_ROW_BYTES >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise source.error(
            f"line {line}: not UTF-8; convert it first (iconv -f WINDOWS-1252 -t UTF-8, say)"
        ) from None
    if looks_like_rows(text):
        raise source.error("these are rows of a batch; give --input-file - to answer them")
    return Prompt(text.removesuffix("\n").removesuffix("\r"), str(source))


def answer_prompt(
    engine: Engine, prompt: Prompt, chat_format: AnyFormat | None, defaults: Defaults
) -> BatchSummary:
    """Stream the answer to standard output, and its thought to standard error.

    Raises:
        ConfigError: the prompt cannot be answered.
    """
    if isinstance(chat_format, UnusableFormat):
        log.warning("%s: the prompt is continued as a text", chat_format.reason)
    chat = chat_format if isinstance(chat_format, ChatFormat) else None
    request = _request(prompt, chat, defaults)
    try:
        ids = encode_prompt(request, engine.tokenizer, chat)
        token_request = token_requests(request, ids, _NAME, engine)[0]
        engine.add(token_request)
    except (RequestError, CheckpointError) as error:
        raise ConfigError(f"{prompt.source}: {error}") from None
    completion = _stream(engine, ThoughtStream(chat is not None and chat.opens_thought(ids)))
    if completion.error:
        log.error("error: %s: %s", prompt.source, completion.error)
    elif completion.finish_reason == "length":
        log.warning(
            "the answer is cut at %d tokens; --max-new-tokens and --max-seq-len allow more",
            len(completion.token_ids),
        )
    return BatchSummary(
        rows=1,
        failed=int(bool(completion.error)),
        generated_tokens=len(completion.token_ids),
        seconds=engine.metrics.run_seconds,
    )


def _request(prompt: Prompt, chat: ChatFormat | None, defaults: Defaults) -> TextRequest:
    messages = [{"role": "user", "content": prompt.text}]
    if chat is not None:
        return plain_request(messages, _NAME, defaults, TURN_DEFAULTS)
    for flag, is_given in (("--system", defaults.system), ("--thinking", defaults.thinking)):
        if is_given:
            raise ConfigError(f"{flag} needs a chat format, and this model has none")
    request = plain_request(messages, _NAME, defaults, LINE_DEFAULTS)
    return replace(request, messages=None, prompt=prompt.text)


def _stream(engine: Engine, thoughts: ThoughtStream) -> Completion:
    is_terminal = sys.stdout.isatty()
    is_line_ended = True
    while True:
        for output in engine.step():
            all_parts = thoughts.push_output(output)
            thought = "".join(parts.thought for parts in all_parts)
            text = "".join(parts.answer for parts in all_parts)
            if thought:
                sys.stderr.write(harmless(thought))
                sys.stderr.flush()
            if text:
                write_text(sys.stdout, harmless(text) if is_terminal else text)
                is_line_ended = text.endswith("\n")
            if output.completion is not None:
                if not is_line_ended:
                    write_text(sys.stdout, "\n")
                return output.completion
