"""The library: a model for a script of the user's own, under torchrun or alone.

Every rank runs the same script and so makes the same calls in the same order; rank 0 reads the
arguments and gets the results, the other ranks help and get empty ones.
"""

import inspect
import logging
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from dsv3 import arguments
from dsv3.checkpoint.source import check_stored_form, declared_config
from dsv3.config import ModelConfig
from dsv3.config_fields import describe_unknown, shown
from dsv3.config_files import load_model_config
from dsv3.distributed.collective_errors import collective_errors
from dsv3.distributed.failure_report import is_lost
from dsv3.distributed.mesh import before_joining, join_world
from dsv3.engine.engine import Engine
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.session import NoOutputs, Session
from dsv3.engine.start import Started, start
from dsv3.errors import ConfigError, Dsv3Error, Interrupted, RequestError
from dsv3.request import Completion, Request, RequestOutput, SamplingParams
from dsv3.setting_names import argument
from dsv3.settings import EngineConfig
from dsv3.text.chat import AnyFormat, ChatFormat, UnusableFormat
from dsv3.text.library_format import (
    chat_requests,
    check_conversation_id,
    prompt_requests,
    stream_requests,
)
from dsv3.text.messages import Message
from dsv3.text.text_request import TextRequest, encode_prompt, token_requests
from dsv3.text.thoughts import Piece, TextPiece, ThoughtStream, begins_in_thought, split_answer

log = logging.getLogger(__name__)

# Token ids may also be in arrays and tensors, in which several prompts are rows.
Prompt = str | Sequence[int]
Messages = Sequence[Message]  # {"role": ..., "content": ...}
OneParams = SamplingParams | Mapping[str, Any] | None
Params = OneParams | Iterable[OneParams]


class LLM(AbstractContextManager["LLM"]):
    """A model on all ranks of the world, ready to answer.

    Args:
        path: a checkpoint directory, or a text `owner/name[@revision]` that names a repository of
            the Hugging Face hub; the demo model if left out.
        config: the model's configuration where the directory has none: a file, or a preset's name.
        tp: tensor-parallel ranks; 0 takes all that dp leaves.
        dp: data-parallel groups of them, which answer different prompts.
        device: "auto" (CUDA where present), "cpu" or "cuda".
        rank_timeout: seconds after which a rank that hangs ends the program on all.
        chat_template: file with a Jinja template that takes the place of the checkpoint's own.
        settings: fields of `EngineConfig`, such as `max_seq_len` or `kv_cache_size`.

    In a job of several ranks there is one model at a time: `close` it before the next one is made.

    Attributes:
        is_main: this is rank 0, which gets the results.

    Raises:
        ConfigError, CheckpointError: the model, the settings and the world do not fit together.
        RankError: another rank failed.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        config: str | Path | None = None,
        tp: int = 0,
        dp: int = 1,
        device: str = "auto",
        rank_timeout: float = 60.0,
        chat_template: str | Path | None = None,
        **settings: Any,
    ) -> None:
        with before_joining():
            given = _read("path", path, arguments.path_or_name, "a path or a name", None)
            config = _read("config", config, arguments.path, "a path or a preset's name", None)
            template = _read("chat_template", chat_template, arguments.path, "a path", None)
            tp = _read("tp", tp, arguments.whole, "a whole number", 0)
            dp = _read("dp", dp, arguments.whole, "a whole number", 1)
            seconds = _read("rank_timeout", rank_timeout, arguments.number, "a number", 60.0)
            device = "auto" if device is None else str(device)  # torch has a type for it
            engine_config = _engine_config(settings)
        with ExitStack() as stack:
            common = EngineConfig.common(asdict(engine_config)) | {"rank_timeout": f"{seconds:g}"}
            mesh = stack.enter_context(join_world(device, tp, dp, seconds, common))
            folder = locate_checkpoint(given, mesh)
            self._chat: AnyFormat | None = None
            with collective_errors(mesh, "reading the configuration"):
                model = None if config is None else load_model_config(config)
                if mesh.layout.rank == 0:
                    self._chat = _chat_format(folder, model, template)
            self._started: Started = start(folder, engine_config, mesh, model)
            self._stack = stack.pop_all()
        self._session = Session(self._started)
        # For scripts that forget `close()`: torch must not be left to the end of the interpreter.
        self._forgotten = weakref.finalize(self._session, self._stack.close)
        self._num_requests = 0
        self.is_main = self._started.engine is not None

    def __enter__(self) -> Self:
        """Return the model; `close` is called at the end."""
        self._session.check_open("`with`")
        return self

    def __exit__(self, *raised: Any) -> None:
        error = raised[1]
        if error is None or self._session.is_closed:
            self.close()
            return
        if self._started.mesh.world.size > 1 and _is_of_script(error):
            traceback.print_exception(error)  # the other ranks may be anywhere: this ends the job
        self._session.abandon()
        self._forgotten.detach()
        self._stack.__exit__(*raised)
        self._free()
        if isinstance(error, Interrupted) and error.number == signal.SIGTERM:
            sys.exit(error.exit_code)

    def close(self) -> None:
        """Leave the other ranks and free the memory; a disk cache gets what is cached.

        Every later call raises `Dsv3Error`, but for `close` itself.
        """
        if self._session.is_closed:
            return
        self._session.close()
        with self._started.mesh.watchdog.task("writing the experts' loads"):
            self._started.runner.finish()
        self._forgotten.detach()
        self._stack.close()
        self._free()

    def _free(self) -> None:
        """Let go of weights and cache, though the script may keep this object."""
        is_cuda = self._started.mesh.device.type == "cuda"
        del self._started
        if is_cuda:
            torch.cuda.empty_cache()

    def generate(
        self, prompts: Prompt | Iterable[Prompt] | None, params: Params = None
    ) -> list[Completion]:
        """Continue prompts, texts or lists of token ids, all at once.

        Args:
            prompts: one or several.
            params: for all prompts or one for each, `SamplingParams` or dicts of their names; left
                out, they are greedy answers of at most 200 tokens.

        Returns:
            The completions in the order of the prompts, the `n` answers to each beside one another;
            on other ranks than 0 an empty list. One whose logits are not finite ends with
            `finish_reason` "error", and a warning says so.

        Raises:
            RequestError: on every rank, if a prompt cannot be served; none is then.
            Dsv3Error: the model is closed.
        """
        return self._complete("generate()", partial(prompt_requests, prompts, params))

    def chat(
        self,
        messages: Message | Messages | Iterable[Messages] | None,
        params: Params = None,
        thinking: bool | None = None,
        conversation_id: str | None = None,
        system: str | None = None,
    ) -> list[Completion]:
        """Answer conversations through the model's chat format; else as `generate`.

        Args:
            messages: one conversation or several.
            params: for all or one for each.
            thinking: let the model think first, or not, where its format has a switch for it;
                a warning says where it has none. The thought is `reasoning` of the completion,
                apart from its `text`; stop strings end only the text.
            conversation_id: names the dialogue, for `drop_conversation`.
            system: text of a system message in front; the messages then begin with none.
        """
        asked = partial(chat_requests, messages, params, thinking, conversation_id, system)
        return self._complete("chat()", asked)

    def drop_conversation(self, conversation_id: str) -> None:
        """Forget the cached prefixes that only this conversation has used."""
        self._session.check_open("drop_conversation()")
        if self._started.engine is not None:
            self._started.engine.drop_conversation(check_conversation_id(conversation_id) or "")

    def stream(
        self,
        prompt: Prompt | Messages | None,
        params: OneParams = None,
        thinking: bool | None = None,
        conversation_id: str | None = None,
        system: str | None = None,
    ) -> Iterator[TextPiece]:
        """Answer one prompt or conversation, piece by piece; other ranks than 0 get no pieces.

        All pieces join to the whole text. Where that is a conversation's answer with a thought,
        the pieces of the thought and its marks have `is_thought` set.

        Several streams may be open at once and read in any order, and other calls made meanwhile.
        An answer whose iterator is dropped, as by leaving a loop over it, is stopped at the next
        call. Other ranks are let go from reading a stream when rank 0 has read one to its end, or
        makes its next call.

        Raises:
            RequestError: on every rank, if the prompt cannot be served.
            Dsv3Error: the model's logits are not finite, or the model is closed.
        """

        def asked() -> list[TextRequest]:
            found = stream_requests(prompt, params, thinking, conversation_id, system)
            count = sum(each.params.n for each in found)
            if count != 1:
                raise RequestError(f"stream() gives one answer, not {count}: use streams()")
            return found

        pieces = self._pieces(_flat(self._submit("stream()", asked)), is_only=True)
        return pieces if isinstance(pieces, NoOutputs) else (piece for _, piece in pieces)

    def streams(
        self,
        prompts: Prompt | Messages | Iterable[Prompt | Messages] | None,
        params: Params = None,
        thinking: bool | None = None,
        conversation_id: str | None = None,
        system: str | None = None,
    ) -> Iterator[tuple[int, TextPiece]]:
        """Answer several prompts or conversations at once; yield pieces as they come.

        Else as `stream`. An answer whose logits are not finite just ends, and a warning says so.

        Yields:
            The number of the answer, in the order in which `generate` returns them, and its new
            text.
        """
        asked = partial(stream_requests, prompts, params, thinking, conversation_id, system)
        return self._pieces(_flat(self._submit("streams()", asked)), is_only=False)

    def _complete(self, call: str, asked: Callable[[], list[TextRequest]]) -> list[Completion]:
        groups = self._submit(call, asked)
        done = self._session.run(_flat(groups))
        for i, group in enumerate(groups):
            for request in group:
                completion = done[request.request_id]
                self._split(request, completion)
                if completion.error:
                    log.warning("prompts[%d]: %s", i, completion.error)
        return [done[request.request_id] for request in _flat(groups)]

    def _split(self, request: Request, completion: Completion) -> None:
        """Tell the thought from the answer, if it is one of a conversation."""
        if request.is_chat and (engine := self._started.engine) is not None:
            inside = begins_in_thought(engine.tokenizer, request.prompt_ids)
            split = split_answer(completion.text, inside)
            completion.reasoning, completion.text = split.reasoning, split.content

    def _submit(self, call: str, asked: Callable[[], list[TextRequest]]) -> list[list[Request]]:
        """Put requests in line on rank 0; if one cannot be served, all ranks hear of it.

        Returns:
            for each prompt, the requests of its answers; nothing on other ranks.
        """
        self._session.begin(call)
        groups: list[list[Request]] = []
        with collective_errors(self._started.mesh, "reading the prompts", is_fatal=False):
            if self._started.engine is not None:
                found = asked()
                try:
                    for i, each in enumerate(found):
                        with _named(each, i, len(found)):
                            groups.append(self._add(each, self._started.engine))
                except BaseException:
                    self._session.drop([request.request_id for request in _flat(groups)])
                    raise
        return groups

    def _add(self, asked: TextRequest, engine: Engine) -> list[Request]:
        """Put the answers to one prompt in line."""
        self._num_requests += 1
        ids = encode_prompt(asked, engine.tokenizer, self._chat)
        name, limit = f"llm-{self._num_requests}", engine.max_seq_len
        requests = token_requests(asked, ids, name, limit, engine.vocab_size)
        self._session.add(requests)
        return requests

    def _pieces(self, requests: list[Request], is_only: bool) -> Iterator[tuple[int, TextPiece]]:
        """Return the numbers of answers and their new text, made as they are read.

        An error of the only answer is raised.
        """
        outputs = self._session.stream(requests)
        if isinstance(outputs, NoOutputs):
            return outputs
        numbers = {request.request_id: i for i, request in enumerate(requests)}
        thoughts = {r.request_id: self._thoughts(r) for r in requests if r.is_chat}
        return _texts(outputs, numbers, thoughts, is_only)

    def _thoughts(self, request: Request) -> ThoughtStream:
        assert self._started.engine is not None
        tokenizer = self._started.engine.tokenizer
        return ThoughtStream(begins_in_thought(tokenizer, request.prompt_ids))


def _texts(
    outputs: Iterator[RequestOutput],
    numbers: Mapping[str, int],
    thoughts: Mapping[str, ThoughtStream],
    is_only: bool,
) -> Iterator[tuple[int, TextPiece]]:
    for output in outputs:
        number, stream = numbers[output.request_id], thoughts.get(output.request_id)
        if stream is None:
            pieces = [Piece(answer=output.new_text)]
        else:
            pieces = [stream.push(output.new_text)]
            pieces += [] if output.completion is None else [stream.finish()]
        for piece in pieces:
            for text in piece.texts():
                yield number, text
        if output.completion is not None and output.completion.error:
            if is_only:
                raise Dsv3Error(output.completion.error)
            log.warning("answer %d: %s", number, output.completion.error)


def _flat(groups: list[list[Request]]) -> list[Request]:
    return [request for group in groups for request in group]


@contextmanager
def _named(asked: TextRequest, number: int, count: int) -> Iterator[None]:
    """Name the prompt in an error about one of several."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        noun = "prompts" if asked.messages is None else "conversations"
        raise RequestError(f"{noun}[{number}]: {error}") from None


def _read(name: str, value: Any, as_kind: Callable[[Any], Any], kind: str, default: Any) -> Any:
    """Return an argument read as its kind; None is as if not given.

    Raises:
        ConfigError: it is of another kind.
    """
    try:
        return default if value is None else as_kind(value)
    except ValueError:
        raise ConfigError(f"{name}={shown(value)} must be {kind}") from None


def _engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    known = {field.name for field in fields(EngineConfig)}
    if unknown := [name for name in settings if name not in known]:
        hints = known | set(inspect.signature(LLM).parameters) - {"settings"}
        raise ConfigError(f"LLM: {describe_unknown(unknown, hints, 'argument')}")
    return EngineConfig(**settings)


def _chat_format(path: Path, config: ModelConfig | None, template: Path | None) -> AnyFormat:
    """Make the format of conversations and try it; raw prompts need none."""
    check_stored_form(path)
    made = ChatFormat.of_directory(
        path, declared_config(path, config, argument).model_type, template
    )
    if isinstance(made, UnusableFormat):
        log.warning("%s: no conversations can be served", made.reason)
    return made


def _is_of_script(error: BaseException) -> bool:
    """Return True if the script itself has failed, not all ranks alike or a connection."""
    seen_by_all_ranks = getattr(error, "seen_by_all_ranks", False)
    return isinstance(error, Exception) and not seen_by_all_ranks and not is_lost(error)
