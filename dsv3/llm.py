"""The Python library: a model for user scripts, with torchrun or on one rank.

All ranks run the same script and so make the same calls in the same order. Rank 0 reads the
arguments and gets the results; the other ranks take part and get empty results.
"""

import inspect
import logging
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
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
from dsv3.errors import ConfigError, RequestError
from dsv3.request import Completion, Request, SamplingParams
from dsv3.setting_names import argument
from dsv3.settings import EngineConfig
from dsv3.text.chat import AnyFormat, ChatFormat, UnusableFormat
from dsv3.text.llm_format import (
    chat_requests,
    check_conversation_id,
    name_prompt,
    prompt_requests,
    stream_pieces,
    stream_requests,
)
from dsv3.text.messages import Message
from dsv3.text.text_request import TextRequest, encode_prompt, token_requests
from dsv3.text.thoughts import (
    TextPiece,
    ThoughtStream,
    begins_in_thought,
    split_answer,
)

log = logging.getLogger(__name__)

# Token ids may also be arrays and tensors, whose rows are prompts.
Prompt = str | Sequence[int]
Messages = Sequence[Message]  # {"role": ..., "content": ...}
OneParams = SamplingParams | Mapping[str, Any] | None
Params = OneParams | Iterable[OneParams]


class LLM(AbstractContextManager["LLM"]):
    """A model on all ranks of the world, ready to answer.

    In a job of several ranks there is one model at a time: `close` it before you make the next one.
    If a rank dies or hangs there, the others end with one line of error and exit code 3, without
    cleaning up (`os._exit`): a thread that waits for another rank cannot be freed.

    Signal handlers, threads, environment and other settings of the process stay as they are.
    KeyboardInterrupt may be raised anywhere: after one within a step the model takes no further
    call, but can be closed. On several ranks it ends the others too, with exit code 130.

    Args:
        path: a checkpoint directory, or a string `owner/name[@revision]` with a repository of the
            Hugging Face hub (default: the demo model).
        config: the model's configuration if the directory has none: a file, or a preset's name.
        tp: tensor-parallel ranks; 0 is the number of ranks / dp.
        dp: data-parallel groups, which answer different prompts.
        device: "auto" (CUDA if present), "cpu" or "cuda".
        rank_timeout: seconds after which a hanging rank ends the program on all ranks.
        chat_template: file with a Jinja template to use instead of the checkpoint's own.
        settings: fields of `EngineConfig`, such as `max_seq_len` or `kv_cache_size`.

    Attributes:
        is_main: True on rank 0, which gets the results.

    Raises:
        ConfigError, CheckpointError: the model, the settings and the world are not compatible.
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
            joined = join_world(
                device,
                tp,
                dp,
                seconds,
                common,
                one_shot=engine_config.one_shot,
                cpu_exchange=engine_config.cpu_exchange,
            )
            mesh = stack.enter_context(joined)
            folder = locate_checkpoint(given, mesh)
            self._chat: AnyFormat | None = None
            with collective_errors(mesh, "reading the configuration"):
                model = None if config is None else load_model_config(config)
                if mesh.layout.rank == 0:
                    self._chat = _chat_format(folder, model, template)
            self._started: Started = start(folder, engine_config, mesh, model)
            self._stack = stack.pop_all()
        self._session = Session(self._started)
        # For scripts without `close()`: torch must be shut down before the interpreter exits.
        self._forgotten = weakref.finalize(self._session, self._stack.close)
        self._num_requests = 0
        self.is_main = self._started.engine is not None

    def __enter__(self) -> Self:
        """Return the model; `close` is called at the end of the block."""
        self._session.check_open("`with`")
        return self

    def __exit__(self, *raised: Any) -> None:
        error = raised[1]
        if error is None or self._session.is_closed:
            self.close()
            return
        if self._started.mesh.world.size > 1 and _is_of_script(error):
            traceback.print_exception(error)  # ends the job: the other ranks may be in any call
        self._session.abandon()
        self._forgotten.detach()
        self._stack.__exit__(*raised)
        self._free()

    def close(self) -> None:
        """Leave the other ranks and free the memory; write cached pages to a disk cache.

        Every later call except `close` raises `Dsv3Error`.
        """
        if self._session.is_closed:
            return
        if self._session.is_interrupted:
            self.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
            return
        self._session.close()
        with self._started.mesh.watchdog.task("writing the experts' loads"):
            self._started.runner.finish()
        self._forgotten.detach()
        self._stack.close()
        self._free()

    def _free(self) -> None:
        """Release weights and cache, since the script may keep this object."""
        is_cuda = self._started.mesh.device.type == "cuda"
        del self._started
        if is_cuda:
            torch.cuda.empty_cache()

    def generate(
        self, prompts: Prompt | Iterable[Prompt] | None, params: Params = None
    ) -> list[Completion]:
        """Continue prompts, which are strings or lists of token ids, in one batch.

        Args:
            prompts: one prompt or several.
            params: `SamplingParams` or a dict of their names, for all prompts or one for each
                (default: greedy answers of at most 200 tokens).

        Returns:
            The completions in the order of the prompts, with the `n` answers to a prompt next to
            each other; an empty list on other ranks than 0. A completion with infinite or NaN
            logits has `finish_reason` "error", and a warning is logged.

        Raises:
            RequestError: on every rank, if a prompt is invalid; then no prompt is answered.
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
        """Answer conversations in the model's chat format; otherwise like `generate`.

        Args:
            messages: one conversation or several.
            params: parameters for all conversations, or one for each.
            thinking: let the model think first, or not; if its chat format has no switch for it, a
                warning is logged. The thought is `reasoning` of the completion and not part of its
                `text`; stop strings end only the text.
            conversation_id: name of the conversation, for `drop_conversation`.
            system: text of a system message to put first; the messages must not begin with one.
        """
        make_requests = partial(chat_requests, messages, params, thinking, conversation_id, system)
        return self._complete("chat()", make_requests)

    def drop_conversation(self, conversation_id: str) -> None:
        """Drop the cached prefixes that only this conversation has used."""
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
        """Answer one prompt or conversation in pieces of text; other ranks than 0 get no pieces.

        All pieces together are the whole text. In a conversation's answer with a thought, the
        pieces of the thought and its marks have `is_thought` set.

        Several streams may be open at once and be read in any order, with other calls in between.
        An answer whose iterator is dropped, for example by leaving a loop over it, is stopped at
        the next call. On other ranks, reading a stream returns when rank 0 has read one to its end,
        or makes its next call.

        Raises:
            RequestError: on every rank, if the prompt is invalid.
            Dsv3Error: the model's logits are infinite or NaN, or the model is closed.
        """

        def make_requests() -> list[TextRequest]:
            requests = stream_requests(prompt, params, thinking, conversation_id, system)
            count = sum(request.params.n for request in requests)
            if count != 1:
                raise RequestError(f"stream() gives one answer, not {count}: use streams()")
            return requests

        pieces = self._pieces(_flat(self._submit("stream()", make_requests)), is_only=True)
        return pieces if isinstance(pieces, NoOutputs) else (piece for _, piece in pieces)

    def streams(
        self,
        prompts: Prompt | Messages | Iterable[Prompt | Messages] | None,
        params: Params = None,
        thinking: bool | None = None,
        conversation_id: str | None = None,
        system: str | None = None,
    ) -> Iterator[tuple[int, TextPiece]]:
        """Answer several prompts or conversations in one batch; yield their text as it comes.

        Otherwise like `stream`. An answer with infinite or NaN logits ends, and a warning is
        logged.

        Yields:
            the number of the answer, in the order of `generate`, and its new text.
        """
        make_requests = partial(stream_requests, prompts, params, thinking, conversation_id, system)
        return self._pieces(_flat(self._submit("streams()", make_requests)), is_only=False)

    def _complete(
        self, call: str, make_requests: Callable[[], list[TextRequest]]
    ) -> list[Completion]:
        groups = self._submit(call, make_requests)
        done = self._session.run(_flat(groups))
        for i, group in enumerate(groups):
            for request in group:
                completion = done[request.request_id]
                self._split(request, completion)
                if completion.error:
                    log.warning("prompts[%d]: %s", i, completion.error)
        return [done[request.request_id] for request in _flat(groups)]

    def _split(self, request: Request, completion: Completion) -> None:
        """Separate the thought from the answer of a conversation."""
        if request.is_chat and (engine := self._started.engine) is not None:
            inside = begins_in_thought(engine.tokenizer, request.prompt_ids)
            split = split_answer(completion.text, inside)
            completion.reasoning = split.reasoning
            completion.text = split.content

    def _submit(
        self, call: str, make_requests: Callable[[], list[TextRequest]]
    ) -> list[list[Request]]:
        """Add requests to the engine of rank 0; if one is invalid, raise on all ranks.

        Returns:
            for each prompt, the requests of its answers; an empty list on other ranks.
        """
        self._session.begin(call)
        groups: list[list[Request]] = []
        with (
            self._session.exchange(),
            collective_errors(self._started.mesh, "reading the prompts", is_fatal=False),
        ):
            if self._started.engine is not None:
                requests = make_requests()
                try:
                    for i, request in enumerate(requests):
                        with name_prompt(request, i, len(requests)):
                            groups.append(self._add(request, self._started.engine))
                except BaseException:
                    self._session.drop([request.request_id for request in _flat(groups)])
                    raise
        return groups

    def _add(self, text_request: TextRequest, engine: Engine) -> list[Request]:
        """Add the requests of the answers to one prompt to the engine."""
        self._num_requests += 1
        ids = encode_prompt(text_request, engine.tokenizer, self._chat)
        name = f"llm-{self._num_requests}"
        requests = token_requests(text_request, ids, name, engine)
        self._session.add(requests)
        return requests

    def _pieces(self, requests: list[Request], is_only: bool) -> Iterator[tuple[int, TextPiece]]:
        """Return an iterator of answer numbers and new text; an error of the only answer raises."""
        outputs = self._session.stream(requests)
        if isinstance(outputs, NoOutputs):
            return outputs
        numbers = {request.request_id: i for i, request in enumerate(requests)}
        thoughts = {r.request_id: self._thoughts(r) for r in requests if r.is_chat}
        return stream_pieces(outputs, numbers, thoughts, is_only)

    def _thoughts(self, request: Request) -> ThoughtStream:
        assert self._started.engine is not None
        tokenizer = self._started.engine.tokenizer
        return ThoughtStream(begins_in_thought(tokenizer, request.prompt_ids))


def _flat(groups: list[list[Request]]) -> list[Request]:
    return [request for group in groups for request in group]


def _read(name: str, value: Any, as_kind: Callable[[Any], Any], kind: str, default: Any) -> Any:
    """Return an argument converted to its type; None means the default.

    Raises:
        ConfigError: the value has a wrong type.
    """
    try:
        return default if value is None else as_kind(value)
    except ValueError:
        raise ConfigError(f"{name}={shown(value)} must be {kind}") from None


def _engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    known = {field.name for field in fields(EngineConfig)}
    if unknown := [name for name in settings if name not in known]:
        hints = known | set(inspect.signature(LLM).parameters) - {"settings"}
        is_sampling = unknown[0] in {field.name for field in fields(SamplingParams)}
        where = "; give it to SamplingParams" if is_sampling and len(unknown) == 1 else ""
        raise ConfigError(f"LLM: {describe_unknown(unknown, hints, 'argument')}{where}")
    return EngineConfig(**settings)


def _chat_format(path: Path, config: ModelConfig | None, template: Path | None) -> AnyFormat:
    """Return the checkpoint's chat format; warn if it is unusable, since raw prompts need none."""
    check_stored_form(path)
    model_type = declared_config(path, config, argument).model_type
    chat_format = ChatFormat.of_directory(path, model_type, template)
    if isinstance(chat_format, UnusableFormat):
        log.warning("%s: no conversations can be served", chat_format.reason)
    return chat_format


def _is_of_script(error: BaseException) -> bool:
    """Return True if this rank's script failed: not all ranks alike, and not a connection."""
    seen_by_all_ranks = getattr(error, "seen_by_all_ranks", False)
    return isinstance(error, Exception) and not seen_by_all_ranks and not is_lost(error)
