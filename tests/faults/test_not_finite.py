"""NaN and infinity: a row whose logits are not finite fails by itself, and is never answered.

A token whose embedding is infinite stands for a weight or an activation that overflows.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3 import LLM, SamplingParams
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.jobs import Cast
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.plan import make_plan
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ParallelConfig, QuantizationConfig
from dsv3.errors import CheckpointError, Dsv3Error
from dsv3.parallel.weight_format import WeightFormat
from dsv3.parallel.weights import Matrix, Vector
from tests.checkpoint_files import FP8, TINY, Tensors, random_tensors, write_hf
from tests.forked import run_forked
from tests.programs import GENERATE

BAD_TOKEN, OVERFLOW = 330, "the model's logits are not finite"
EMBEDDING = "model.embed_tokens.weight"
INFINITY = {"BF16": b"\x80\x7f", "F32": b"\0\0\x80\x7f"}
NAN = {"BF16": b"\xc0\xff", "F32": b"\0\0\xc0\x7f", "F8_E4M3": b"\xff"}
FAILED = {"overflow", "late overflow"}
PROMPTS = {
    "plain": [3, 4, 5],
    "overflow": [3, 4, BAD_TOKEN],
    "long": [9] * 70,
    "late overflow": [9] * 70 + [BAD_TOKEN, 11],
}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "scored": {"logprobs": 2, "echo": True},
    "twice": {"n": 2, "temperature": 1.0, "seed": 4},
    "computed only": {"max_tokens": 0},
}


def spoiled(tensors: Tensors, name: str, value: dict[str, bytes], at: int = 0) -> Tensors:
    """Return the tensors with one value of one of them replaced."""
    dtype, shape, data = tensors[name]
    bad = value[dtype]
    data = data[: at * len(bad)] + bad + data[(at + 1) * len(bad) :]
    return tensors | {name: (dtype, shape, data)}


def write(folder: Path, tensors: Tensors, quantization: QuantizationConfig | None = None) -> Path:
    """Write a checkpoint that takes token ids only."""
    path = write_hf(folder, dataclasses.replace(TINY, quantization=quantization), tensors)
    (path / "tokenizer.json").unlink()
    return path


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    at = BAD_TOKEN * TINY.hidden_size
    return write(folder, spoiled(random_tensors(TINY), EMBEDDING, INFINITY, at))


def responses(path: Path, folder: Path, num_ranks: int, *flags: str) -> dict[str, Any]:
    """Answer every prompt in every way; return the responses, and "stderr" and "code"."""
    rows, out = folder / "rows.jsonl", folder / "out.jsonl"
    common = {"max_tokens": 5, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
    with rows.open("w") as file:
        for kind, more in KINDS.items():
            for name, prompt in PROMPTS.items():
                body = {"prompt": prompt, **common, **more}
                row = {"custom_id": f"{name}, {kind}", "url": "/v1/completions", "body": body}
                file.write(json.dumps(row) + "\n")
    job = ["--ckpt-path", str(path), "--input-file", str(rows), "--output-file", str(out)]
    sizes = ["--kv-cache-size", "2048tok", "--max-batch-tokens", "80", "--max-running", "8"]
    done = run_forked([GENERATE, *job, *sizes, "--strict", *flags], num_ranks=num_ranks)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    got = {line["custom_id"]: line["response"] for line in lines}
    assert len(got) == len(lines) == len(KINDS) * len(PROMPTS)
    return {"stderr": done.stderr, "code": done.returncode, **got}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The responses where nothing overflows."""
    folder = tmp_path_factory.mktemp("finite")
    path = write(folder / "model", random_tensors(TINY))
    got = responses(path, folder, 1)
    assert got["code"] == 0
    return got


def tokens(response: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in response["body"]["choices"]]


@pytest.mark.parametrize(
    ("num_ranks", "flags"),
    [
        (1, ()),
        (1, ("--attn-impl", "naive", "--pipeline-depth", "1")),
        (2, ("--attn-impl", "absorb")),
        (2, ("--dp", "2", "--moe-dispatch", "alltoall")),
    ],
)
def test_a_row_that_overflows_fails_and_harms_no_other(
    overflowing: Path,
    right: dict[str, Any],
    tmp_path: Path,
    num_ranks: int,
    flags: tuple[str, ...],
) -> None:
    got = responses(overflowing, tmp_path, num_ranks, *flags)
    assert "20 rows: 10 answered, 10 failed" in got["stderr"]
    for kind in KINDS:
        for name in PROMPTS:
            response, wanted = got[f"{name}, {kind}"], right[f"{name}, {kind}"]
            assert not any(BAD_TOKEN in ids for ids in tokens(wanted))
            if name in FAILED:
                assert response["status_code"] == 500
                assert OVERFLOW in response["body"]["error"]["message"]
            else:
                assert tokens(response) == tokens(wanted), (name, kind)


def test_debug_names_step_and_layer(overflowing: Path, tmp_path: Path) -> None:
    got = responses(overflowing, tmp_path, 1, "--debug")
    message = got["overflow, greedy"]["body"]["error"]["message"]
    assert f"{OVERFLOW} (step 1, from layer 0 on)" in message


def test_the_library_says_so(overflowing: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(overflowing, kv_cache_size="512tok", device="cpu") as llm:
        good, bad = llm.generate([PROMPTS["plain"], PROMPTS["overflow"]], params)
        assert good.finish_reason == "length" and len(good.token_ids) == 4 and not good.error
        assert bad.finish_reason == "error" and bad.error.startswith(OVERFLOW)
        assert f"prompts[1]: {OVERFLOW}" in caplog.text
        with pytest.raises(Dsv3Error, match=OVERFLOW):
            list(llm.stream(PROMPTS["overflow"], params))


def test_a_chunk_that_overflows_is_not_reused(overflowing: Path) -> None:
    """Prompts with the same beginning come while a long one is computed chunk by chunk."""
    bad = [9] * 10 + [BAD_TOKEN] + [9] * 150
    prompts = [[9] * 10 + [5, 6], [9] * 9 + [8], [9] * 10, [9] * 70, [9] * 5]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    sizes: dict[str, Any] = {"kv_cache_size": "2048tok", "max_batch_tokens": 64, "max_running": 8}
    with LLM(overflowing, device="cpu", **sizes) as llm:
        wanted = llm.generate(prompts, params)
    with LLM(overflowing, device="cpu", **sizes) as llm:
        first, *others = llm.generate([bad, *prompts], params)
    assert first.error
    assert [one.token_ids for one in others] == [one.token_ids for one in wanted]


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{LAYER}mlp.gate.e_score_correction_bias", NAN),
        (f"{LAYER}post_attention_layernorm.weight", INFINITY),
        ("model.norm.weight", NAN),
        (scale_name(f"{LAYER}mlp.experts.3.up_proj.weight"), INFINITY),
        (scale_name(f"{LAYER}self_attn.o_proj.weight"), NAN),
        (f"{LAYER}mlp.gate.weight", INFINITY),
    ],
)
def test_small_tensors_are_refused_by_name_when_loaded(
    tmp_path: Path, name: str, value: dict[str, bytes]
) -> None:
    config = dataclasses.replace(TINY, quantization=FP8)
    path = write(tmp_path / "model", spoiled(random_tensors(config), name, value), FP8)
    fmt = WeightFormat(torch.float32, torch.device("cpu"))
    spec = {spec.name: spec for spec in tensor_specs(config).values()}[
        name.replace("_scale_inv", "")
    ]
    module = (
        Vector(spec.name, spec.shape, fmt)
        if len(spec.shape) == 1 or spec.name.endswith("mlp.gate.weight")
        else Matrix([[spec.name]], [spec.shape[0]], spec.shape[1], fmt)
    )
    with open_source(path) as source, pytest.raises(CheckpointError) as refused:
        load_weights(source, module.targets(), ParallelConfig())
    file = source.file_of(name)
    assert str(refused.value).startswith(f"{file}: tensor {name} has values that are NaN")


@pytest.mark.parametrize("name", ["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"])
def test_infinities_that_a_softmax_hides_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """A key whose score is -infinity has no weight, as if it were masked."""
    name = f"{LAYER}self_attn.{name}.weight"
    path = write(tmp_path / "model", spoiled(random_tensors(TINY), name, INFINITY))
    with pytest.raises(CheckpointError, match=f"tensor {name} has values that are NaN"):
        LLM(path, kv_cache_size="512tok", device="cpu")


def test_a_prompt_that_overflows_is_not_prewarmed(overflowing: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    bodies = [{"prompt": [3, 4]}, {"prompt": PROMPTS["overflow"]}]
    rows = [
        {"custom_id": f"{i}", "url": "/v1/completions", "body": b} for i, b in enumerate(bodies)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--input-file", str(file), "--prewarm", str(file), "--kv-cache-size", "2048tok"]
    done = run_forked([GENERATE, "--ckpt-path", str(overflowing), *files])
    assert done.returncode == 2
    assert f"error: --prewarm, prompt 2: {OVERFLOW}" in done.stderr


@pytest.mark.parametrize(
    ("cast", "name", "value"),
    [
        (Cast.FP8, f"{LAYER}mlp.experts.3.up_proj.weight", INFINITY),
        (Cast.FP8, f"{LAYER}self_attn.kv_b_proj.weight", NAN),
        (Cast.BF16, f"{LAYER}mlp.experts.3.up_proj.weight", NAN),
        (Cast.BF16, scale_name(f"{LAYER}mlp.experts.3.up_proj.weight"), INFINITY),
    ],
)
def test_a_cast_of_nan_or_infinity_is_refused(
    tmp_path: Path, cast: Cast, name: str, value: dict[str, bytes]
) -> None:
    quantization = FP8 if cast is Cast.BF16 else None
    config = dataclasses.replace(TINY, quantization=quantization)
    path = write(tmp_path / "model", spoiled(random_tensors(config), name, value), quantization)
    weight = name.replace("_scale_inv", "")
    with open_source(path) as source:
        plan = make_plan(source, None, cast)
        with pytest.raises(CheckpointError, match=f"tensor {weight} cannot be cast"):
            convert(source, plan, tmp_path / "out", workers=2)
