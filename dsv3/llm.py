"""The library: a model for a script of the user's own, under torchrun or alone.

Every rank runs the same script and so makes the same calls in the same order; rank 0 reads the
arguments and gets the results, the other ranks help and get empty ones.
"""

import logging
import signal
import sys
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from dsv3.checkpoint.source import check_stored_form, declared_config
from dsv3.engine.config import EngineConfig
from dsv3.engine.engine import Engine, follow
from dsv3.engine.locate import locate_checkpoint
from dsv3.engine.start import Started, start
from dsv3.errors import Dsv3Error, Interrupted, RequestError
from dsv3.parallel.failure_report import is_lost
from dsv3.parallel.mesh import before_joining, join_world
from dsv3.parallel.together import fail_together
from dsv3.request import Completion, Request, RequestOutput, SamplingParams
from dsv3.text.chat import AnyFormat, ChatFormat, UnusableFormat
from dsv3.text.text_request import TextRequest, encode_prompt, token_requests
from dsv3.text.thoughts import (
    Piece,
    TextPiece,
    ThoughtStream,
    begins_in_thought,
    split_answer,
)

log = logging.getLogger(__name__)

Prompt = str | list[int]
Messages = list[dict[str, Any]]  # {"role": ..., "content": ...}
Params = SamplingParams | Sequence[SamplingParams] | None
_ONE_FOR_ALL = (SamplingParams, NoneType)


class LLM(AbstractContextManager["LLM"]):
    """A model on all ranks of the world, ready to answer.

    Args:
        path: a checkpoint directory, or a text `owner/name[@revision]` that names a repository of
            the Hugging Face hub; the demo model if left out.
        tp: tensor-parallel ranks; 0 takes all that dp leaves.
        dp: data-parallel groups of them, which answer different prompts.
        device: "auto" (CUDA where present), "cpu" or "cuda".
        rank_timeout: seconds after which a rank that hangs ends the program on all.
        chat_template: file with a Jinja template that takes the place of the checkpoint's own.
        settings: fields of `EngineConfig`, such as `max_seq_len` or `kv_cache_size`.

    Raises:
        ConfigError, CheckpointError: the model, the settings and the world do not fit together.
        RankError: another rank failed.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        tp: int = 0,
        dp: int = 1,
        device: str = "auto",
        rank_timeout: float = 60.0,
        chat_template: str | Path | None = None,
        **settings: Any,
    ) -> None:
        with before_joining():
            config = EngineConfig(**settings)
        with ExitStack() as stack:
            common = EngineConfig.common(asdict(config)) | {"rank_timeout": str(rank_timeout)}
            mesh = stack.enter_context(join_world(device, tp, dp, rank_timeout, common))
            path = locate_checkpoint(path, mesh)
            self._chat: AnyFormat | None = None
            with fail_together(mesh, "reading the chat template"):
                if mesh.layout.rank == 0:
                    self._chat = _chat_format(path, chat_template)
            self._started: Started = start(path, config, mesh)
            self._stack = stack.pop_all()
        # For scripts that forget `close()`: torch must not be left to the end of the interpreter.
        self._forgotten = weakref.finalize(self, self._stack.close)
        self._outputs: Generator[RequestOutput, None, None] | None = None
        self._num_requests = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which gets the results."""
        return self._started.engine is not None

    def __exit__(self, *raised: Any) -> None:
        error = raised[1]
        if error is None:
            self.close()
            return
        if self._started.mesh.world.size > 1 and _is_of_script(error):
            traceback.print_exception(error)  # the other ranks may be anywhere: this ends the job
        self._forgotten.detach()
        self._stack.__exit__(*raised)
        if isinstance(error, Interrupted) and error.number == signal.SIGTERM:
            sys.exit(error.exit_code)

    def close(self) -> None:
        """Leave the other ranks; what is cached goes to disk, if there is a disk cache."""
        self._end_stream()
        if self._started.engine is None:
            follow(self._started.runner, self._started.channel)
        else:
            self._started.engine.stop()
        with self._started.mesh.watch.task("writing the experts' loads"):
            self._started.runner.finish()
        self._forgotten.detach()
        self._stack.close()

    def generate(
        self, prompts: Prompt | Sequence[Prompt] | None, params: Params = None
    ) -> list[Completion]:
        """Continue prompts, texts or lists of token ids, all at once.

        Args:
            prompts: one or several.
            params: for all prompts or one for each; left out, they are greedy answers of at most
                200 tokens.

        Returns:
            The completions in the order of the prompts; on other ranks than 0 an empty list. One
            whose logits are not finite ends with `finish_reason` "error", and a warning says so.

        Raises:
            RequestError: on every rank, if a prompt cannot be served; none is then.
        """
        several = _several(prompts, _is_prompt)
        return self._complete([{"prompt": prompt} for prompt in several], params)

    def chat(
        self,
        messages: Messages | Sequence[Messages] | None,
        params: Params = None,
        thinking: bool | None = None,
        conversation_id: str | None = None,
    ) -> list[Completion]:
        """Answer conversations through the model's chat format; else as `generate`.

        Args:
            messages: one conversation or several.
            params: for all or one for each.
            thinking: let the model think first, or not, where its format has a switch for it;
                a warning says where it has none. The thought is `reasoning` of the completion,
                apart from its `text`; stop strings end only the text.
            conversation_id: names the dialogue, for `drop_conversation`.
        """
        several = _several(messages, _is_conversation)
        common = {"thinking": thinking, "conversation_id": conversation_id}
        return self._complete([{"messages": each, **common} for each in several], params)

    def drop_conversation(self, conversation_id: str) -> None:
        """Forget the cached prefixes that only this conversation has used."""
        if self._started.engine is not None:
            self._started.engine.drop_conversation(conversation_id)

    def stream(
        self,
        prompt: Prompt | Messages | None,
        params: SamplingParams | None = None,
        thinking: bool | None = None,
    ) -> Iterator[TextPiece]:
        """Answer one prompt or conversation, piece by piece; other ranks than 0 get no pieces.

        All pieces join to the whole text. Where that is a conversation's answer with a thought,
        the pieces of the thought and its marks have `is_thought` set.

        A loop over the pieces that is left early stops the answer, at the next call.

        Raises:
            Dsv3Error: the model's logits are not finite.
        """
        what = {"messages": prompt, "thinking": thinking}
        asked = what if _is_conversation(prompt) else {"prompt": prompt}
        requests = self._submit([asked], params)
        self._outputs = self._run(requests)
        thoughts = None
        if requests and requests[0].is_chat and (engine := self._started.engine) is not None:
            thoughts = ThoughtStream(begins_in_thought(engine.tokenizer, requests[0].prompt_ids))
        return _texts(self._outputs, thoughts)

    def _complete(self, asked: list[dict[str, Any]], params: Params) -> list[Completion]:
        requests = self._submit(asked, params)
        done: dict[str, Completion] = {}
        for output in self._run(requests):
            if output.completion is not None:
                done[output.request_id] = output.completion
        completions = [self._split(r, done[r.request_id]) for r in requests]
        for i, completion in enumerate(completions):
            if completion.error:
                log.warning("prompts[%d]: %s", i, completion.error)
        return completions

    def _split(self, request: Request, completion: Completion) -> Completion:
        """Tell the thought from the answer, if it is one of a conversation."""
        if request.is_chat and (engine := self._started.engine) is not None:
            inside = begins_in_thought(engine.tokenizer, request.prompt_ids)
            split = split_answer(completion.text, inside)
            completion.reasoning, completion.text = split.reasoning, split.content
        return completion

    def _submit(self, asked: list[dict[str, Any]], params: Params) -> list[Request]:
        """Put requests in line on rank 0; if one cannot be served, all ranks hear of it."""
        self._end_stream()
        requests: list[Request] = []
        engine = self._started.engine
        with fail_together(self._started.mesh, "reading the prompts", is_fatal=False):
            if engine is not None:
                each = [params] * len(asked) if isinstance(params, _ONE_FOR_ALL) else params
                if len(each) != len(asked):
                    raise RequestError(f"{len(each)} params for {len(asked)} prompts")
                try:
                    for what, chosen in zip(asked, each, strict=True):
                        request = self._request(engine, what, chosen)
                        engine.add(request)
                        requests.append(request)
                except Exception as error:
                    for request in requests:
                        engine.cancel(request.request_id)
                    if isinstance(error, RequestError) and len(asked) > 1:
                        raise RequestError(f"prompts[{len(requests)}]: {error}") from None
                    raise
        return requests

    def _request(
        self, engine: Engine, what: dict[str, Any], params: SamplingParams | None
    ) -> Request:
        asked = TextRequest(
            **what, params=params or SamplingParams(), limit_is_default=params is None
        )
        if asked.messages is None and asked.prompt != [] and not _is_prompt(asked.prompt):
            raise RequestError(f"a prompt is a text or token ids, not {asked.prompt!r:.60}")
        self._num_requests += 1
        ids = encode_prompt(asked, engine.tokenizer, self._chat)
        name, limit = f"llm-{self._num_requests}", engine.max_seq_len
        return token_requests(asked, ids, name, limit, engine.vocab_size)[0]

    def _run(self, requests: list[Request]) -> Generator[RequestOutput, None, None]:
        """Run steps on all ranks until the requests are done, or nobody wants more of them."""
        engine = self._started.engine
        if engine is None:
            follow(self._started.runner, self._started.channel)
            return
        unfinished = {request.request_id for request in requests}
        try:
            while unfinished:
                for output in engine.step():
                    if output.completion is not None:
                        unfinished.discard(output.request_id)
                    yield output
        finally:
            for request_id in unfinished:
                engine.cancel(request_id)
            engine.pause()

    def _end_stream(self) -> None:
        """Stop an answer that was not read to its end."""
        if self._outputs is not None:
            next(self._outputs, None)  # one that was never begun could not be ended
            self._outputs.close()
            self._outputs = None


def _chat_format(path: Path, template: str | Path | None) -> AnyFormat:
    """Make the format of conversations and try it; raw prompts need none."""
    check_stored_form(path)
    model_type = declared_config(path, None).model_type
    made = ChatFormat.of_directory(path, model_type, None if template is None else Path(template))
    if isinstance(made, UnusableFormat):
        log.warning("%s: no conversations can be served", made.reason)
    return made


def _is_of_script(error: BaseException) -> bool:
    """Return True if the script itself has failed, not all ranks alike or a connection."""
    is_shared = getattr(error, "is_shared", False)
    return isinstance(error, Exception) and not is_shared and not is_lost(error)


def _texts(outputs: Iterator[RequestOutput], thoughts: ThoughtStream | None) -> Iterator[TextPiece]:
    for output in outputs:
        if thoughts is None:
            pieces = [Piece(answer=output.new_text)]
        else:
            pieces = [thoughts.push(output.new_text)]
            pieces += [] if output.completion is None else [thoughts.finish()]
        for piece in pieces:
            yield from piece.texts()
        if output.completion is not None and output.completion.error:
            raise Dsv3Error(output.completion.error)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or _is_list_of(int, value)


def _is_conversation(value: Any) -> bool:
    return _is_list_of(Mapping, value)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(i, kind) for i in value)


def _several(value: Any, is_one: Callable[[Any], bool]) -> list[Any]:
    """Make a list of one thing or of several; other ranks than 0 may have none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) and not is_one(value) else [value]
