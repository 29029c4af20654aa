"""The peer: Hugging Face transformers' `generate`, with the same weights in float32."""

import importlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchlib.contest import RunResult
from benchlib.workload import BenchRequest
from dsv3.checkpoint.load import load_weights
from dsv3.checkpoint.sharding import tensor_specs
from dsv3.checkpoint.source import open_source
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.config_files import hf_config_dict
from dsv3.errors import ConfigError
from dsv3.parallel.weights import Target


class TransformersPeer:
    """Static batches: left-padded to one length, run until the longest answer is complete.

    Args:
        path: a checkpoint directory; weights become float32, FP8 weights are dequantized.
        batch: number of requests of a batch.
        config: the model's config, for a directory without config.json.
    """

    name = "transformers"

    def __init__(self, path: Path, batch: int, config: ModelConfig | None = None) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("--peer=transformers: it is not installed; pip install transformers")
        transformers = importlib.import_module("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._batch = batch
        with tempfile.TemporaryDirectory() as folder:
            _write_float32(path, Path(folder), config)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32
            ).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def reset(self) -> None:
        """Do nothing; no state is kept between runs."""

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        """Answer the requests batch by batch."""
        result = RunResult()
        cpu_start = time.process_time()
        start = time.perf_counter()
        for first in range(0, len(requests), self._batch):
            self._run_batch(requests[first : first + self._batch], start, result)
        result.seconds = time.perf_counter() - start
        result.cpu_seconds = time.process_time() - cpu_start
        return result

    @torch.inference_mode()
    def _run_batch(self, requests: Sequence[BenchRequest], start: float, result: RunResult) -> None:
        longest = max(len(request.prompt_ids) for request in requests)
        padding = [longest - len(request.prompt_ids) for request in requests]
        rows = [
            [0] * pad + request.prompt_ids for request, pad in zip(requests, padding, strict=True)
        ]
        mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
        clock = _Clock()
        answer = self._model.generate(
            torch.tensor(rows),
            attention_mask=mask.long(),
            max_new_tokens=max(request.num_tokens for request in requests),
            do_sample=False,
            streamer=clock,
        )
        times = [moment - start for moment in clock.moments[1:]]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        for request, row in zip(requests, answer[:, longest:].tolist(), strict=True):
            result.first_token.append(times[0])
            result.between_tokens += gaps[: request.num_tokens - 1]
            result.answers.append(row[: request.num_tokens])


class _Clock:
    """A streamer that records the time of each call: one for the prompt, then one per step."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, _: Any) -> None:
        """Record the current time."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing; transformers calls this after the last token."""


def _write_float32(path: Path, folder: Path, config: ModelConfig | None) -> None:
    """Write the model without MTP layers as a float32 checkpoint."""
    with open_source(path, config) as source:
        specs = [spec for spec in tensor_specs(source.config).values() if not spec.mtp]
        tensors = {spec.name: torch.empty(spec.shape) for spec in specs}
        targets = (Target(name, tensor) for name, tensor in tensors.items())
        load_weights(source, targets, ParallelConfig())
        plain = replace(source.config, quantization=None, num_nextn_predict_layers=0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config_dict(plain)))
