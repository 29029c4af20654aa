"""A stand-in for the model: the cache is a table of numbers, the next token a hash of the text.

It reads every sequence back through its page table before it says what comes next. So a page that
two sequences shared, a token computed twice or never, or a wrong position changes the answer.
"""

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from dsv3.cache.disk_index import DiskIndex
from dsv3.cache.layout import NULL_PAGE, CacheLayout, Plane
from dsv3.cache.pool import CachePool
from dsv3.cache.tiers import PageKey, Tiers
from dsv3.distributed.collectives import SingleRank
from dsv3.engine.adjust import Adjustments
from dsv3.engine.engine import Engine
from dsv3.engine.runner import Runner
from dsv3.engine.speculation import Speculation
from dsv3.engine.step_plan import (
    NO_TARGET,
    PlanChannel,
    StepPlan,
    pack_plans,
    unpack_pages,
    unpack_plans,
)
from dsv3.engine.step_result import StepResult
from dsv3.request import Completion, Request
from dsv3.settings import EngineConfig
from dsv3_kernels import Paging
from tests.checkpoint_files import TINY

CPU = torch.device("cpu")
PENALIZED = 2  # the seed of requests with penalties
EOS = TINY.eos_token_ids[0]


def next_token(tokens: Sequence[int], seed: int) -> int:
    """Return what follows; about one in sixteen is the end token."""
    digest = zlib.crc32(np.array([seed, *tokens], np.int64).tobytes())
    return EOS if digest % 16 == 0 else 2 + (digest >> 4) % (TINY.vocab_size - 2)


def answer(request: Request) -> tuple[list[int], str]:
    """Return the tokens and finish reason that a request must get, whatever else is running."""
    params = request.params
    out: list[int] = []
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    while len(out) < params.max_tokens:
        token = next_token([*request.prompt_ids, *out], params.seed)
        if token in ends:
            return out, "stop"
        out.append(token)
    return out, "length"


def check_seen(row: Adjustments, text: list[int]) -> None:
    """Check that a plan's penalized tokens are those of the prompt and of the answer so far."""
    fed, (token, uses) = row.fed[0], row.seen_2E.tolist()
    assert len(set(token)) == len(token)
    count = Counter(dict(zip(token, (n // 2 for n in uses), strict=True)))
    count.update([int(row.fed_M[fed])] if fed >= 0 else [])
    prompt_len = len(text) - count.total()
    assert +count == Counter(text[prompt_len:])
    prompt = {t for t, n in zip(token, uses, strict=True) if n % 2}
    assert prompt == set(text[:prompt_len]) or not prompt


class PaperDisk:
    """A disk and its index, on which pages come late and one in four is damaged."""

    damaged = 0.25

    def __init__(self) -> None:
        self.rng = random.Random(0)
        self.files: dict[PageKey, np.ndarray] = {}
        # By host page: the page's name, and how often it is still asked for in vain.
        self.reads: dict[int, tuple[PageKey, int]] = {}
        self.num_bytes = self.num_written = 0

    def __contains__(self, key: PageKey) -> bool:
        return key in self.files

    def accept(self, key: PageKey) -> bool:
        return key not in self.files and self.rng.random() < 0.8

    def touch(self, key: PageKey) -> None:
        assert key in self.files

    def discard(self, key: PageKey) -> None:
        del self.files[key]

    def note_written(self) -> None:
        self.num_written = len(self.files)

    def catch_up(self) -> None:
        pass

    def is_read(self, host_page: int) -> bool:
        return host_page in self.reads and self.rng.random() < 0.5

    def run(self, plan: StepPlan, host: np.ndarray) -> dict[int, bool]:
        """Execute a plan's stores and fetches; return the finished reads, True if successful."""
        for host_page, key in unpack_pages(plan.store):
            self.files[key] = host[host_page].copy()
        for host_page, key in unpack_pages(plan.fetch):
            assert host_page not in self.reads
            self.reads[host_page] = key, self.rng.randrange(3)
            host[host_page] = -2
        finished = {}
        for host_page in plan.confirm_fetched[1:].tolist():
            key, delay = self.reads[host_page]
            self.reads[host_page] = key, delay - 1
            if delay <= 0:
                del self.reads[host_page]
                finished[host_page] = self.rng.random() >= self.damaged
                if finished[host_page]:
                    host[host_page] = self.files[key]
        return finished


class PaperRunner:
    """Executes plans on paper and holds them to their contract."""

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: int,
        settings: EngineConfig,
        num_host_pages: int = 0,
        disk: PaperDisk | None = None,
    ) -> None:
        self.disk = disk
        index = cast(DiskIndex | None, disk)
        self.tiers = Tiers(num_host_pages, layout.page_size, index) if num_host_pages else None
        self.page_size, self.settings = layout.page_size, settings
        self.memory = np.full((num_pages, layout.page_size), -1)
        self.host = np.full((num_host_pages, layout.page_size), -1)
        self.plans: list[StepPlan] = []
        self.last: list[int] = []

    def run(self, plan: StepPlan, width: int) -> StepResult:
        self.plans.append(plan)
        fetched = self.move_pages(plan)
        if not len(plan.token_ids):
            self.last = []
            no_token_M, no_scores = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1 + 2 * width)
            return StepResult(no_token_M, no_scores, fetched=fetched)
        lengths = plan.query_len.tolist()
        assert 0 < sum(lengths) == len(plan.token_ids) <= self.settings.max_batch_tokens
        assert min(lengths) > 0 and lengths == sorted(lengths)
        assert len(lengths) <= self.settings.max_running
        assert len(plan.pages) == plan.page_count.sum()
        assert NULL_PAGE not in plan.pages
        tables = np.split(plan.pages, plan.page_count.cumsum()[:-1])
        texts, row_seq = [], np.repeat(np.arange(len(lengths)), lengths)
        new = np.split(plan.token_ids, plan.query_len.cumsum()[:-1])
        written = set()
        for table, start, tokens in zip(tables, plan.context_len.tolist(), new, strict=True):
            stop = start + len(tokens)
            assert len(set(table.tolist())) == len(table) >= -(-stop // self.page_size)
            for at, token in enumerate(tokens.tolist(), start):
                slot = table[at // self.page_size], at % self.page_size
                assert slot not in written, "two sequences write to one slot"
                written.add(slot)
                self.memory[slot] = token if token >= 0 else self.last[-1 - token]
        for table, start, tokens in zip(tables, plan.context_len.tolist(), new, strict=True):
            stop = start + len(tokens)
            texts.append(self.memory[table].flatten()[:stop].tolist())
        starts = plan.query_len.cumsum() - plan.query_len
        adjust = Adjustments.unpack(plan.adjust, torch.tensor(self.last))
        chosen = []
        for m, row in enumerate(plan.row.tolist()):
            seq = row_seq[row]
            position = int(plan.context_len[seq] + row - starts[seq]) + 1
            assert plan.position[m] == position
            seed = (int(plan.seed_high[m]) << 32) | (int(plan.seed_low[m]) & 0xFFFFFFFF)
            if seed == PENALIZED and plan.target[m] == NO_TARGET:
                assert adjust is not None
                selected = adjust.select(np.array([m]))
                assert selected is not None
                check_seen(selected, texts[seq][:position])
            guess = next_token(texts[seq][:position], seed)
            chosen.append(guess if plan.target[m] == NO_TARGET else int(plan.target[m]))
        self.last = chosen
        scores = torch.zeros(len(chosen), 1 + 2 * width, dtype=torch.float64)
        scores[:, 0] = -torch.from_numpy(plan.position)
        drafts = self.draft(plan, [texts[seq] for seq in row_seq], chosen)
        token_M = torch.tensor(chosen, dtype=torch.int64)
        return StepResult(token_M, scores, drafts, fetched=fetched)

    def draft(
        self, plan: StepPlan, text_of_row: list[list[int]], chosen: list[int]
    ) -> torch.Tensor | None:
        """Draft the right tokens, and now and then a wrong one."""
        if not len(plan.num_drafts):
            assert not len(plan.next_ids) and not len(plan.draft_row)
            return None
        assert len(plan.next_ids) == len(plan.token_ids)
        (count,) = plan.num_drafts.tolist()
        drafts = torch.zeros(len(plan.draft_row), count, dtype=torch.int64)
        rows = zip(plan.draft_row, plan.draft_result, plan.draft_checked, strict=True)
        for n, (row, result, checked) in enumerate(rows):
            assert plan.row[result] == row and plan.next_ids[row] == -1 - result
            accepted = 0
            while (
                accepted < checked
                and plan.token_ids[row + 1 + accepted] == chosen[result + accepted]
            ):
                accepted += 1
            assert (
                plan.next_ids[row : row + checked + 1]
                == -1 - np.arange(result, result + checked + 1)
            ).all()
            position = int(plan.position[result + accepted])
            text = [*text_of_row[row][:position], chosen[result + accepted]]
            seed = (int(plan.seed_high[result]) << 32) | (int(plan.seed_low[result]) & 0xFFFFFFFF)
            for k in range(count):
                drafts[n, k] = next_token(text, seed) + (sum(text) % 4 == 0)
                text.append(int(drafts[n, k]))
        return drafts

    def move_pages(self, plan: StepPlan) -> dict[int, bool]:
        """Offload, copy, restore: each is one whole, so the order within it does not matter."""
        (leaving, kept), (brought, target) = (
            plan.offload.reshape(2, -1),
            plan.restore.reshape(2, -1),
        )
        busy = [] if self.disk is None else [*self.disk.reads]
        busy += [host_page for host_page, _ in unpack_pages(plan.fetch)]
        host_pages = [*kept.tolist(), *set(brought.tolist()), *busy]
        assert len(set(host_pages)) == len(host_pages), (
            "a host page is read and written, or written twice"
        )
        copied_from, copied_to = plan.copies.reshape(2, -1)
        targets = [*copied_to.tolist(), *target.tolist()]
        assert NULL_PAGE not in targets and len(set(targets)) == len(targets)
        fetched = {} if self.disk is None else self.disk.run(plan, self.host)
        self.host[kept] = self.memory[leaving]
        self.memory[copied_to] = self.memory[copied_from]
        self.memory[target] = self.host[brought]
        return fetched


class PaperWorld:
    """Data-parallel groups, each on its own paper; plans take the way of the wire."""

    sent_bytes = 0

    def __init__(self, groups: list[PaperRunner]) -> None:
        self.groups = groups
        self.num_steps = 0

    def drafts(self, by_group: list[torch.Tensor | None]) -> torch.Tensor | None:
        made = [drafts for drafts in by_group if drafts is not None]
        return torch.cat(made) if made else None

    def run(self, plans: list[StepPlan]) -> StepResult:
        self.num_steps += 1
        plans = unpack_plans(pack_plans(plans))
        width = max(0, *(int(plan.top_logprobs.max(initial=0)) for plan in plans))
        results = [group.run(plan, width) for group, plan in zip(self.groups, plans, strict=True)]
        return StepResult(
            torch.cat([r.token_M for r in results]),
            torch.cat([r.scores for r in results if r.scores is not None]),
            self.drafts([r.draft_NK for r in results]),
            fetched=results[0].fetched,  # only a single group has a disk
        )


def paper_engine(num_pages: int, page_size: int = 4, **more: Any) -> tuple[Engine, PaperRunner]:
    """Return an engine of one group, and its runner; see `paper_world`."""
    engine, world = paper_world(1, num_pages, page_size, **more)
    return engine, world.groups[0]


def paper_world(
    num_groups: int,
    num_pages: int,
    page_size: int = 4,
    max_seq_len: int = 10**6,
    num_host_pages: int = 0,
    disk: PaperDisk | None = None,
    num_drafts: int = 0,
    **settings: Any,
) -> tuple[Engine, PaperWorld]:
    """Return an engine over groups of `num_pages` pages and `num_host_pages` of host memory."""
    speculation = Speculation(num_drafts, has_mtp=num_drafts > 0)
    config = EngineConfig(speculative_tokens=num_drafts, **settings)
    layout = CacheLayout((Plane("latent", 1, 1, (0,), "fp32"),), Paging(page_size))
    cache = CachePool(layout, num_pages + 1, CPU, SingleRank())
    groups = [
        PaperRunner(layout, num_pages + 1, config, num_host_pages, disk) for _ in range(num_groups)
    ]
    world = PaperWorld(groups)
    tiers = [group.tiers for group in groups]
    runner = cast(Runner, world)
    channel = PlanChannel(SingleRank())
    engine = Engine(TINY, config, runner, cache, channel, None, max_seq_len, tiers, speculation)
    return engine, world


def finish(engine: Engine, max_steps: int = 10_000) -> dict[str, Completion]:
    """Step until nothing is left; return the answers by request."""
    done: dict[str, Completion] = {}
    for _ in range(max_steps):
        if not engine.has_work():
            return done
        for out in engine.step():
            if out.completion is not None:
                done[out.request_id] = out.completion
    raise AssertionError(f"{engine.num_unfinished} requests still unfinished")
