"""The MTP layer's drafts, and answers with drafts.

The layer is written here again, in float32, around one of transformers' decoder layers.
"""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dsv3 import LLM
from dsv3.config_files import DEMO
from dsv3.engine import drafts
from dsv3.engine.sampler import Choice
from dsv3.request import SamplingParams
from tests.oracle.families import Oracle
from tests.oracle.run import answers, start_alone

MAKE = Callable[[str], Oracle]
EPS = 1e-6
NGRAM = {"speculative_method": "ngram"}


@pytest.fixture(scope="module")
def made(oracle: MAKE) -> Oracle:
    return oracle("v3.2-long")


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


class PlainMTP:
    """The MTP layer of a checkpoint, applied to whole texts without a cache."""

    def __init__(self, made: Oracle) -> None:
        self.main = made.model
        self.weights: dict[str, Tensor] = {}
        for file in sorted(made.path.glob("*.safetensors")):
            self.weights |= {name: x.float() for name, x in load_file(file).items()}
        self.prefix = "model.layers.3."
        self.layer = copy.deepcopy(self.main.model.layers[2])
        own = {n: x for n, x in self.weights.items() if n.startswith(self.prefix)}
        state = self.layer.state_dict()
        for name in state:
            if f"{self.prefix}{name}" in own:
                state[name] = own[f"{self.prefix}{name}"]
        for kind in ("gate_up_proj", "down_proj"):
            fused = f"mlp.experts.{kind}"
            parts = kind.replace("gate_up_proj", "gate_proj up_proj").split()
            experts = range(len(state[fused]))
            state[fused] = torch.stack(
                [
                    torch.cat([own[f"{self.prefix}mlp.experts.{e}.{p}.weight"] for p in parts])
                    for e in experts
                ]
            )
        self.layer.load_state_dict(state)
        self.layer.self_attn.layer_idx = 2

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[f"{self.prefix}{name}.weight"]

    @torch.inference_mode()
    def drafts(self, text: list[int], count: int) -> list[Tensor]:
        """Return the logits of the drafts after a text, whose last token is the newest one."""
        ids = torch.tensor(text)
        hidden = self.main.model(ids[None, :-1], use_cache=False).last_hidden_state[0]
        logits: list[Tensor] = []
        nexts = ids[1:]
        while True:
            out = self.apply(hidden, nexts)
            logits.append(out[-1] @ self.weights["lm_head.weight"].T)
            if len(logits) == count:
                return logits
            hidden = torch.cat((hidden, out[-1:]))
            nexts = torch.cat((nexts, logits[-1].argmax(keepdim=True)))

    def apply(self, hidden: Tensor, nexts: Tensor) -> Tensor:
        """Return the normalized output at every position."""
        embedded = F.embedding(nexts, self.weights["model.embed_tokens.weight"])
        joined = torch.cat((norm(embedded, self["enorm"]), norm(hidden, self["hnorm"])), -1)
        x = (joined @ self["eh_proj"].T)[None]
        length = len(nexts)
        position = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        out = self.layer(
            x,
            attention_mask=mask,
            position_ids=position,
            position_embeddings=self.main.model.rotary_emb(x, position),
        )
        out = out[0] if isinstance(out, tuple) else out
        return norm(out[0], self["shared_head.norm"])


@pytest.mark.parametrize("length", [20, 100])
def test_drafts(made: Oracle, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Logits of three drafts, below and above the number of keys that are selected."""
    torch.manual_seed(length)
    prompt = torch.randint(2, 331, (length,)).tolist()
    found: list[Tensor] = []
    usual = drafts.Drafter._choose

    def record(
        self: drafts.Drafter, h_ND: Tensor, choice: Choice | None, position_N: Tensor
    ) -> Tensor:
        found.append(self._model.logits(h_ND))
        return usual(self, h_ND, choice, position_N)

    monkeypatch.setattr(drafts.Drafter, "_choose", record)
    started = start_alone(made.path, speculative_tokens=3, speculative_method="mtp")
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    (done,) = answers(started, [prompt], params)
    want = PlainMTP(made).drafts([*prompt, done.token_ids[0]], 3)
    assert len(found) >= 3
    for ours, theirs in zip(found[:3], want, strict=True):
        assert (ours[0] - theirs).abs().max() < 1e-4 * theirs.std()


@pytest.mark.parametrize("attn_impl", ["auto", "naive"])
def test_further_drafts_keep_the_selection_where_the_config_says_so(
    made: Oracle, tmp_path: Path, attn_impl: str
) -> None:
    """The first draft of a step selects keys, of the last accepted token; all write their own."""
    torch.manual_seed(3)
    prompt = torch.randint(2, 331, (100,)).tolist()
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    tokens, selections, written = [], [], []
    for is_shared in (False, True):
        folder = tmp_path / str(is_shared)
        shutil.copytree(made.path, folder)
        config = json.loads((folder / "config.json").read_text())
        config["index_share_for_mtp_iteration"] = is_shared
        (folder / "config.json").write_text(json.dumps(config))
        started = start_alone(folder, attn_impl=attn_impl, speculative_tokens=3)
        mtp = started.runner.model.mtp
        assert mtp is not None and mtp.layer.self_attn.indexer is not None
        indexer = mtp.layer.self_attn.indexer
        select, write = indexer.select, indexer.write
        with (
            mock.patch.object(indexer, "select", side_effect=select) as selects,
            mock.patch.object(indexer, "write", side_effect=write) as writes,
        ):
            (done,) = answers(started, [prompt], params)
        tokens.append(done.token_ids)
        selections.append(selects.call_count)
        written.append(writes.call_count)
    assert tokens[0] == tokens[1] and written[0] == written[1] == selections[0]
    num_steps = selections[1]
    assert selections[0] == 3 * num_steps - 2  # the last step drafts nothing


DIALOGUE = [
    {"role": "user", "content": "The code of the red box is 48213."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "My name is Anna and I live in Amsterdam."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "What is the code of the red box?"},
]


def test_a_trained_model_accepts_its_drafts() -> None:
    """A wrong hidden state, row or position only shows here: the answers stay the same."""
    found = {}
    for count in (0, 1, 3):
        with LLM(DEMO, speculative_tokens=count, kv_cache_size="2048tok") as llm:
            (done,) = llm.chat(DIALOGUE, SamplingParams(max_tokens=40))
            found[count] = done.token_ids
            engine = llm._started.engine
            assert engine is not None
            metrics = engine.metrics
        if count == 1:
            assert metrics.drafted_tokens > 5
            assert metrics.accepted_tokens >= metrics.drafted_tokens - 1
    assert found[0] == found[1] == found[3] and len(found[0]) > 10


def test_drafts_from_the_text_go_on_beyond_a_long_prompt() -> None:
    """Without the MTP layer's cache no token lacks an entry in it."""
    prompt = [0, 3, 50, 60, 70, 4] * 16 + [0, 3, 50, 60]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    plain = answers(start_alone(DEMO), [prompt], params)
    started = start_alone(DEMO, speculative_tokens=4, **NGRAM)
    found = answers(started, [prompt], params)
    assert found[0].token_ids == plain[0].token_ids
    assert started.engine is not None and started.engine.metrics.drafted_tokens > 10


def test_sampled_answers_are_the_models_own(made: Oracle) -> None:
    """With drafts, tokens are the same for each seed, and their distribution is the model's."""
    torch.manual_seed(0)
    prompt = torch.randint(2, 331, (30,)).tolist()
    found: list[list[list[int]]] = []
    for settings in ({}, {"speculative_tokens": 2}, {"speculative_tokens": 1} | NGRAM):
        started = start_alone(made.path, max_running=16, **settings)
        found.append([])
        for seed in range(400):
            params = SamplingParams(
                max_tokens=3, ignore_eos=True, temperature=1.0, top_k=4, seed=seed
            )
            found[-1] += [done.token_ids for done in answers(started, [prompt], params)]
    assert found[0] == found[1] == found[2]
    first, _ = Counter(tokens[0] for tokens in found[1]).most_common(1)[0]
    second = Counter(tokens[1] for tokens in found[1] if tokens[0] == first)
    top = made.logits([*prompt, first])[-1].topk(4)
    total = second.total()
    expected = dict(
        zip(top.indices.tolist(), (top.values.softmax(0) * total).tolist(), strict=True)
    )
    chi_square = sum((second[token] - n) ** 2 / n for token, n in expected.items())
    assert second.keys() <= expected.keys() and chi_square < 16.27  # 0.1 %, 3 degrees of freedom
