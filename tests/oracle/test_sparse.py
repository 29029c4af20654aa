"""Sparse attention agrees with transformers: logits, and the positions that every layer selects."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.errors import ConfigError
from dsv3.model import indexer
from dsv3.request import SamplingParams
from dsv3_kernels import PageTables, candidate_positions, select_slots
from tests.oracle.families import Oracle
from tests.oracle.run import all_logits, answers, start_alone

MAKE = Callable[[str], Oracle]
TOLERANCE = 1e-4
TOPK = 40
# Up to five pages; the first prompt never has more than TOPK keys.
LENGTHS = (30, 41, 130, 300)
# Of all positions that several layers and queries choose, those that a rounding may change.
NEAR_TIES = 0.002


@pytest.fixture(scope="module")
def made(oracle: MAKE) -> Oracle:
    made = oracle("v3.2-long")
    torch.manual_seed(1)
    return replace(made, prompts=[torch.randint(2, 331, (n,)).tolist() for n in LENGTHS])


def error(oracle: Oracle, text: list[int], ours: Tensor) -> Tensor:
    """Return the largest error of each position's logits, in units of their spread."""
    want = oracle.logits(text)
    return (ours - want).abs().amax(-1) / want.std()


def with_config(made: Oracle, folder: Path, **values: Any) -> Path:
    """Return a copy of the checkpoint with other values in its config.json."""
    shutil.copytree(made.path, folder / "changed")
    config = folder / "changed" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return folder / "changed"


@pytest.mark.parametrize("chunk", [1, 7, 64, 400])
@pytest.mark.parametrize(
    ("attn_impl", "limit"), [("auto", None), ("auto", 1), ("absorb", None), ("naive", None)]
)
def test_logits(made: Oracle, attn_impl: str, limit: int | None, chunk: int) -> None:
    """Prompts of all lengths together, whole, in chunks and token by token."""
    prompts = made.prompts if chunk > 1 else made.prompts[:3]
    started = start_alone(made.path, attn_impl=attn_impl)
    for text, ours in zip(prompts, all_logits(started, prompts, chunk, limit), strict=True):
        assert error(made, text, ours).max() < TOLERANCE, f"prompt of {len(text)} tokens"


def test_greedy_answers(made: Oracle) -> None:
    """In small steps of several requests, with a prefix in common, beyond index_topk."""
    prompts = [made.prompts[2], made.prompts[2][:100] + made.prompts[3][:100], made.prompts[1]]
    started = start_alone(made.path, max_batch_tokens=40, max_running=2)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for prompt, done in zip(prompts, answers(started, prompts, params), strict=True):
        want = made.logits([*prompt, *done.token_ids])[len(prompt) - 1 : -1]
        assert done.token_ids == want.argmax(-1).tolist(), f"prompt of {len(prompt)} tokens"


def theirs(made: Oracle, text: list[int]) -> list[Tensor]:
    """Return what each layer of transformers' model selects, [L, L] bool."""
    chosen: list[Tensor] = []

    def record(_: object, __: object, index_BLK: Tensor) -> None:
        mask = torch.zeros(len(text), len(text), dtype=torch.bool)
        chosen.append(mask.scatter_(1, index_BLK[0].long(), True).tril())

    hooks = [
        module.register_forward_hook(record)
        for name, module in made.model.named_modules()
        if name.endswith(".indexer")
    ]
    made.logits(text)
    for hook in hooks:
        hook.remove()
    return chosen


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The selections of dsv3's layers while the fixture is in use, each [T, K] positions."""
    found: list[Tensor] = []

    def record(candidate_PTK: Tensor, k: int, tables: PageTables) -> PageTables:
        assert len(candidate_PTK) == 1
        found.append(candidate_positions(candidate_PTK[0]))
        return select_slots(candidate_PTK, k, tables)

    monkeypatch.setattr(indexer, "select_slots", record)
    return found


def as_masks(selected: list[Tensor], num_layers: int, length: int) -> list[Tensor]:
    """Return the selections of the last queries of a prompt in each layer, [queries, length]."""
    masks = []
    for layer in range(num_layers):
        rows = [
            torch.zeros(len(position_TK), length + 1, dtype=torch.bool).scatter_(1, position_TK, 1)
            for position_TK in (
                part.where(part >= 0, length) for part in selected[layer::num_layers]
            )
        ]
        masks.append(torch.cat(rows)[:, :length])
    return masks


@pytest.mark.parametrize("chunk", [1, 64, 400])
def test_selected_positions(made: Oracle, selected: list[Tensor], chunk: int) -> None:
    text = made.prompts[2]
    all_logits(start_alone(made.path), [text], chunk)
    want = theirs(made, text)
    for ours, layer in zip(as_masks(selected, 3, len(text)), want, strict=True):
        last = layer[-len(ours) :]
        assert torch.equal(ours.sum(1), last.sum(1)) and len(ours) >= len(text) - TOPK - chunk
        assert ours.sum(1).max() == TOPK
        assert (ours != last).sum() <= NEAR_TIES * last.sum()


def test_indexer_rope_is_half_split(made: Oracle, tmp_path: Path, selected: list[Tensor]) -> None:
    """The interleaved layout, as in MLA, selects others; short prompts do not show it."""
    text = made.prompts[2]
    path = with_config(made, tmp_path, indexer_rope_interleave=True)
    (ours,) = all_logits(start_alone(path), [text], 400)
    errors = error(made, text, ours)
    assert errors[:TOPK].max() < TOLERANCE and errors[TOPK:].max() > 100 * TOLERANCE
    for mine, layer in zip(as_masks(selected, 3, len(text)), theirs(made, text), strict=True):
        assert (mine != layer).sum() > 0.05 * layer.sum()


def test_all_positions_are_dense_attention(made: Oracle, tmp_path: Path) -> None:
    """Up to index_topk keys attention is dense, whichever form the step takes."""
    text = made.prompts[2][:60]
    (sparse,) = all_logits(start_alone(made.path), [text], 400)
    path = with_config(made, tmp_path, index_topk=512)
    for attn_impl in ("auto", "absorb", "naive"):
        (dense,) = all_logits(start_alone(path, attn_impl=attn_impl), [text], 400)
        difference = (dense - sparse).abs().amax(-1) / dense.std()
        assert difference[:TOPK].max() < TOLERANCE < difference[TOPK:].max()


@pytest.mark.parametrize("attn_impl", ["auto", "naive"])
def test_index_keys_in_fp8(made: Oracle, selected: list[Tensor], attn_impl: str) -> None:
    """They change few selections; the keys of dense steps are there for the sparse ones."""
    text = made.prompts[3]
    started = start_alone(made.path, index_dtype="fp8", attn_impl=attn_impl)
    layer = started.cache.layer(0)
    assert layer.index is not None and layer.index.is_fp8
    all_logits(started, [text], 7, limit=1)
    found = as_masks(selected, 3, len(text))
    # In a random model, other selections of one layer change those of the next ones.
    for ours, exact, share in zip(found, theirs(made, text), (0.05, 0.2, 0.4), strict=True):
        last = exact[-len(ours) :]
        assert torch.equal(ours.sum(1), last.sum(1))
        assert 0 < (ours & ~last).sum() < share * last.sum()


def test_the_disk_cache_refuses_heads_with_index_keys(oracle: MAKE, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attn_impl=naive"):
        start_alone(
            oracle("v3.2-long").path,
            attn_impl="naive",
            kv_disk_cache=f"{tmp_path}:1MiB",
            kv_host_cache="1MiB",
        )
