"""The engine of rank 0: requests in, tokens out, one step at a time.

`add` queues a request; `step` plans, runs on all ranks and commits. The other ranks run
`follow`, which executes plans until rank 0 stops them.
"""

import logging
import time
from collections.abc import Sequence as Ordered
from contextlib import AbstractContextManager

from dsv3.cache.pool import CachePool
from dsv3.cache.tiers import Tiers
from dsv3.config import ModelConfig
from dsv3.engine.commit import Committer, LaunchedStep
from dsv3.engine.drafting import Drafting
from dsv3.engine.grammars import Grammars
from dsv3.engine.groups import (
    PageStates,
    choose_group,
    page_states,
    rebalance_waiting,
    update_gauges,
)
from dsv3.engine.metrics import Metrics
from dsv3.engine.plan_writer import write_plans
from dsv3.engine.request_check import check_request, check_room
from dsv3.engine.runner import Runner
from dsv3.engine.scheduled import ScheduledSeq, ScheduledStep
from dsv3.engine.scheduler import Scheduler
from dsv3.engine.sequence import Sequence
from dsv3.engine.speculation import NO_DRAFTS, Speculation
from dsv3.engine.step_plan import PlanChannel, StepPlan
from dsv3.errors import ConfigError, RequestError
from dsv3.request import Request, RequestOutput, SamplingParams
from dsv3.settings import EngineConfig
from dsv3.text.detokenize import TextStream
from dsv3.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Seconds for writing the cache to disk at the end, and at an end by a signal.
_SAVE_SECONDS = 60.0
HASTY_SAVE_SECONDS = 4.0


class Engine:
    """Continuous batching over all ranks. Lives on rank 0.

    Args:
        config: the model.
        settings: limits of a step.
        runner: this rank's model and cache.
        cache: the cache, for its geometry and size.
        channel: carries plans to the other ranks.
        tokenizer: None serves token ids only.
        max_seq_len: longest context a request may reach.
        tiers: the lower cache tiers of each data-parallel group; None keeps nothing outside the
            device.
        speculation: how tokens are drafted.

    Attributes:
        tokenizer: of the model, or None.
        vocab_size: logits of a row.
        max_seq_len: longest context of a request that the cache has room for, in tokens.
        max_running: most sequences that run at once, in all groups.
        metrics: counts and times so far.
        grammars: compiled grammars of answers.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: EngineConfig,
        runner: Runner,
        cache: CachePool,
        channel: PlanChannel,
        tokenizer: Tokenizer | None,
        max_seq_len: int,
        tiers: Ordered[Tiers | None] = (None,),
        speculation: Speculation = NO_DRAFTS,
    ) -> None:
        self.tokenizer = tokenizer
        self._context_limit = max_seq_len
        self.vocab_size = config.vocab_size
        self.max_running = settings.max_running * len(tiers)
        self.metrics = Metrics()
        self._settings = settings
        self._runner = runner
        self._layout = cache.layout
        self._channel = channel
        eos_ids = frozenset(config.eos_token_ids)
        if not eos_ids and tokenizer is not None and tokenizer.eos_id is not None:
            # DeepSeek's own config files do not name the end token.
            eos_ids = frozenset({tokenizer.eos_id})
        self.grammars = Grammars(tokenizer, config.vocab_size, sorted(eos_ids))
        is_only = len(tiers) == 1
        self._speculation = speculation
        self._drafting = Drafting(speculation, settings.speculative_adaptive, self.metrics)
        self._schedulers = [
            Scheduler(
                config,
                cache.layout,
                cache.num_pages,
                settings,
                each,
                self.metrics,
                is_only,
                speculation,
            )
            for each in tiers
        ]
        self._pipelined = settings.is_pipelined(cache.device.type)
        self._in_flight: LaunchedStep | None = None
        self._is_stepping = self._is_prewarming = False
        self._sequences: dict[str, Sequence] = {}
        self._committer = Committer(
            self._sequences, self._schedulers, self._drafting, self.metrics, eos_ids
        )
        self._num_added = self._num_launched = 0
        self.max_seq_len = min(max_seq_len, self._room)

    @property
    def cache_tokens(self) -> int:
        """Positions the caches of all groups hold."""
        num_pages = sum(scheduler.pages.num_pages for scheduler in self._schedulers)
        return num_pages * self._layout.page_size

    @property
    def _room(self) -> int:
        """Positions that one group has for requests."""
        num_pages = min(scheduler.num_usable_pages for scheduler in self._schedulers)
        return num_pages * self._layout.page_size

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._sequences)

    @property
    def computes_prompts(self) -> bool:
        """True if `step` is likely to compute a prompt or part of one, or to wait for its end."""
        in_flight = [] if self._in_flight is None else self._in_flight.parts
        is_waiting = any(part.num_known > 1 for part in in_flight)
        return is_waiting or any(scheduler.computes_prompts for scheduler in self._schedulers)

    def has_work(self) -> bool:
        """Return True if a step would do anything."""
        return bool(self._sequences) or self._in_flight is not None

    def add(self, request: Request, group: int | None = None) -> None:
        """Queue a request, in a given group or in the one with the least cost.

        Raises:
            RequestError: it can never be served; the message names the reason and a remedy.
        """
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id!r} is already in progress")
        check_request(request, self.vocab_size, self._context_limit)
        params = request.params
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this checkpoint has none")
        check_room(request, self._room, self._settings.named("kv_cache_size"))
        stream = None
        if self.tokenizer is not None:
            prompt_ids = request.prompt_ids
            is_chat = request.is_chat
            stream = TextStream(self.tokenizer, prompt_ids, params.stop, is_chat, request.has_tools)
        constraint = self.grammars.constraint(request)
        seq = Sequence(request, self._num_added, time.monotonic(), stream, constraint=constraint)
        self._num_added += 1
        if request.deadline is not None:
            seq.expires = seq.added_at + request.deadline
        self._sequences[request.request_id] = seq
        seq.group = choose_group(self._schedulers, seq) if group is None else group
        self._schedulers[seq.group].add(seq)

    def update_gauges(self) -> None:
        """Bring the gauges of the metrics up to date, as every step does."""
        update_gauges(self._schedulers, self.metrics)

    def page_states(self) -> list[PageStates]:
        """Return the states of each group's pages; any thread may ask."""
        return [page_states(scheduler) for scheduler in self._schedulers]

    def cancel(self, request_id: str) -> None:
        """Drop a request without an answer; unknown ids are ignored."""
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self._schedulers[seq.group].remove(seq)

    def prewarm(self, prompts: list[list[int]]) -> int:
        """Compute prompts before the first request, in every group, and keep them cached.

        Returns:
            their tokens, in one group.

        Raises:
            RequestError: one cannot be served.
            ConfigError: the logits of one are not finite, or they leave too little of the cache.
        """
        if any(scheduler.tree is None for scheduler in self._schedulers):
            raise ConfigError("--prewarm keeps prefixes for reuse; drop --no-prefix-reuse")
        all_room = self._room
        params = SamplingParams(max_tokens=0)
        names = {}
        self._is_prewarming = True
        for group in range(len(self._schedulers)):
            for number, ids in enumerate(prompts, 1):
                name = f"prewarm-{group}-{number}"
                names[name] = f"--prewarm, prompt {number}"
                self.add(Request(request_id=name, prompt_ids=ids, params=params), group)
        while self.has_work():
            for output in self.step():
                if output.completion is not None and output.completion.error:
                    raise ConfigError(f"{names[output.request_id]}: {output.completion.error}")
        self._is_prewarming = False
        total = min(scheduler.pin(prompts) for scheduler in self._schedulers)
        if 2 * self._room < all_room:
            raise ConfigError(
                f"--prewarm pins {all_room - self._room} of {all_room} cached tokens, more than "
                "half; raise --kv-cache-size"
            )
        self.max_seq_len = min(self.max_seq_len, self._room)
        return total

    def drop_conversation(self, conversation_id: str) -> None:
        """Forget the cached prefixes that only this conversation has used."""
        for scheduler in self._schedulers:
            if scheduler.tree is not None:
                scheduler.tree.drop_conversation(conversation_id)

    def step(self) -> list[RequestOutput]:
        """Run one step on all ranks; return the outputs, request by request.

        Where steps run asynchronously (CUDA), this launches a step and returns the results of the
        previous one: planning, sending and detokenizing overlap with the device's work.
        """
        with self._channel.watchdog.step():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        begin = time.monotonic()
        self._is_stepping = True
        outputs = self._expire(begin)
        steps = self._schedule()
        plans = self._write_plans(steps) if steps else []
        planned_at = time.monotonic()
        launched = self._launch(steps, plans) if steps else None
        if self._pipelined:
            launched, self._in_flight = self._in_flight, launched
        if launched is not None and launched.parts:
            result = launched.result.to_host()
            received_at = time.monotonic()
            outputs += self._committer.commit(launched, result, received_at)
            self._measure(launched.parts, begin, planned_at, received_at)
        self._is_stepping = False
        return outputs

    def task(self, name: str) -> AbstractContextManager[None]:
        """Watchdog over work of this rank outside of steps: one that never ends, ends the job."""
        return self._channel.watchdog.task(name)

    def pause(self) -> None:
        """Let the other ranks return from `follow`."""
        self._channel.send(None)

    def stop(self, save_seconds: float | None = None) -> None:
        """Save the cache to disk, if there is one, and let the others return from `follow`.

        After a failed step nothing is saved: the other ranks may be anywhere, or gone.

        Args:
            save_seconds: time for saving; None allows a minute, or seconds after a signal.
        """
        if save_seconds is None:
            is_asked = self._channel.watchdog.end_signal
            save_seconds = HASTY_SAVE_SECONDS if is_asked else _SAVE_SECONDS
        if not self._is_stepping:
            with self._channel.watchdog.task("saving the cache"):
                self._save(time.monotonic() + save_seconds)
        self.pause()

    def _save(self, deadline: float) -> None:
        for group, scheduler in enumerate(self._schedulers):
            for moves in scheduler.save():
                if moves:
                    steps = [ScheduledStep() for _ in self._schedulers]
                    steps[group].moves = moves
                    self._launch(steps, self._write_plans(steps))
                if time.monotonic() > deadline:
                    log.warning("the disk is slow: not all of the cache is saved")
                    break
        update_gauges(self._schedulers, self.metrics)

    def _expire(self, now: float) -> list[RequestOutput]:
        expired = [s for s in self._sequences.values() if s.expires and s.expires <= now]
        return [self._committer.expire(seq, now) for seq in expired]

    def _schedule(self) -> list[ScheduledStep]:
        """Return the next step's work, one part for each group; empty if there is nothing to do."""
        steps = [scheduler.schedule() for scheduler in self._schedulers]
        if not self._is_prewarming:
            rebalance_waiting(self._schedulers)
        if not any(step.seqs or step.moves for step in steps):
            return []
        self._num_launched += any(step.seqs for step in steps)
        return steps

    def _write_plans(self, steps: list[ScheduledStep]) -> list[StepPlan]:
        self._drafting.begin_step(max(len(step.seqs) for step in steps))
        num_drafts = self._drafting.num_drafts
        return write_plans(steps, self._num_launched, self._speculation, num_drafts)

    def _launch(self, steps: list[ScheduledStep], plans: list[StepPlan]) -> LaunchedStep:
        """Start a step on all ranks."""
        self._channel.send(plans)
        result = self._runner.run(plans)
        if result.fetched:  # only a single group has a disk cache
            tiers = self._schedulers[0].tiers
            assert tiers is not None
            tiers.confirm_fetched(result.fetched)
        parts = [part for step in steps for part in step.seqs]
        return LaunchedStep(self._num_launched, parts, result.send())

    def _measure(
        self, parts: list[ScheduledSeq], begin: float, planned_at: float, received_at: float
    ) -> None:
        """Record the time of a step, and the state after it."""
        m = self.metrics
        now = time.monotonic()
        m.steps += 1
        m.run_seconds += now - begin
        # Without sending the plan, running it and waiting for the results.
        m.host_seconds.observe(planned_at - begin + now - received_at)
        m.sent_bytes = self._runner.sent_bytes
        m.step_sequences.observe(len(parts))
        m.step_tokens.observe(sum(part.num_tokens for part in parts))
        update_gauges(self._schedulers, m)
        self._drafting.measure(parts, now - begin)


def follow(runner: Runner, channel: PlanChannel) -> None:
    """Execute rank 0's plans until it stops; the whole life of every other rank."""
    while (plans := channel.receive()) is not None:
        with channel.watchdog.step():
            runner.run(plans)
