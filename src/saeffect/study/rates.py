"""Measure, in seconds, how fast this machine is at the work of a study.

A model is measured without its weights: blocks of its configuration, filled with constants, take as long as the real
ones. One block and three are measured, to separate the time of a block from that of a pass.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.config import ModelConfig
from saeffect.io import writing
from saeffect.lm.accounting import loading_errors, quiet_transformers
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.lm.loading import load_config, locate_model, resolve_dtype, usable_device
from saeffect.sae.base import SaeConfig
from saeffect.steering.prompt_pass import last_logits, read_prompts
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens

__all__ = ["PROMPT", "DiskRates", "ModelRates", "StageCost", "encode_seconds", "product_rate", "table_speed"]

_BLOCKS = 3
_BATCH = 8  # rows of text at once, as in the stages
_MAX_TOKENS = 1_024
_MIN_SECONDS, _MIN_REPEATS, _MAX_REPEATS = 0.3, 3, 60  # seconds and repetitions of a measurement
_CONSTANT = 0.01  # value of all weights
PROMPT = 10
"""Tokens of a prompt."""
_FILE_BYTES = 64 << 20  # bytes
_MAX_WIDTH = 16_384  # features
_TABLE_SECONDS = 0.063  # of `table_speed`, on the machine where the constants of `plan.py` were measured
_BYTES_PER_WEIGHT = {None: None, "8bit": 1.0, "4bit": 0.56}


class ModelRates:
    """Sizes and speeds of the model of a configuration, on its device and in its dtype.

    Attributes:
        n_layers: Number of blocks; `block` and `head` are the parameters of one, and of the unembedding.
        n_bytes: Bytes of all weights.
        layer: Seconds a token in one block.
        start: Seconds a token in a pass before its blocks: the embedding, masks.
        logits: Seconds a token in the unembedding.
        softmax: Seconds a token for a softmax over the vocabulary and a sum over it, in float32.

    Raises:
        SaeffectError: There is no such model, or transformers does not know it.
    """

    def __init__(self, config: ModelConfig, context_size: int, *, at: str | None = None) -> None:
        self.device = usable_device(config, at=at)
        self.dtype = resolve_dtype(config.dtype, self.device)
        source = locate_model(config, at=at)
        with quiet_transformers(), loading_errors(config, at, source):
            hf_config = load_config(source, config, at)
            self.n_layers = int(hf_config.get_text_config().num_hidden_layers)
            total = _size(_without_weights(hf_config, config, self.dtype))
            short = [
                _without_weights(_shortened(hf_config, n), config, self.dtype)
                for n in sorted({1, min(_BLOCKS, self.n_layers)})
            ]
            self.block = (total - _size(short[0])) // (self.n_layers - 1) if self.n_layers > 1 else total
            self._lms = [LanguageModel(_filled(model, self.device), None, config.path) for model in short]
        self.d_model, self.d_vocab = self._lms[0].d_model, self._lms[0].d_vocab
        self.head = self.d_model * self.d_vocab
        weight_bytes = _BYTES_PER_WEIGHT[config.quantize] or self.dtype.itemsize
        self.n_bytes = round(total * weight_bytes)
        self._read(context_size)

    @torch.inference_mode()
    def _read(self, context_size: int) -> None:
        width = min(context_size, _MAX_TOKENS)
        ids = torch.zeros(max(1, min(_BATCH, _MAX_TOKENS // width)), width, dtype=torch.int64)

        def read(lm: LanguageModel) -> Callable[[], Any]:
            return lambda: capture(lm, f"blocks.{lm.n_layers - 1}.hook_resid_post", ids)

        start, layer = self._by_blocks(read)
        self.start, self.layer = start / ids.numel(), layer / ids.numel()
        x = torch.full((ids.numel(), self.d_model), _CONSTANT, dtype=self.dtype, device=self.device)
        self.logits = self._seconds(lambda: self._lms[0].model.get_output_embeddings()(x)) / len(x)
        scores = torch.zeros(64, self.d_vocab, device=self.device)
        self.softmax = self._seconds(lambda: _probabilities(scores)) / len(scores)

    @functools.cache  # noqa: B019 - a few of them, and as long-lived as the rates
    @torch.inference_mode()
    def step(self, n_rows: int, sampling: Sampling) -> float:
        """Seconds to generate one token in each of `n_rows` rows: all blocks, the unembedding, and sampling."""
        ids = torch.zeros(n_rows, 1, dtype=torch.int64, device=self.device)

        def write(lm: LanguageModel) -> Callable[[], Any]:
            _, cache = read_prompts(lm, "", [[0] * PROMPT] * n_rows, None, room=_MAX_REPEATS)
            return lambda: last_logits(lm, ids, cache)

        start, layer = self._by_blocks(write)
        # As peaked as a real model's: a few tokens hold most of the probability.
        scores = 5 * torch.randn(n_rows, self.d_vocab, device=self.device)
        cells = [NoiseCell(0, str(row), 0) for row in range(n_rows)]
        return start + self.n_layers * layer + self._seconds(lambda: next_tokens(scores.clone(), cells, 0, sampling))

    def description(self) -> str:
        """The model's size, and its speed in reading."""
        seconds = self.n_layers * self.layer + self.logits
        flop, dtype = 2 * (self.n_layers * self.block + self.head) / seconds, str(self.dtype).removeprefix("torch.")
        return (
            f"model of {self.n_layers} blocks, {self.d_model} wide, {self.n_bytes / 1e9:.3g} GB, on {self.device.type}"
            f" in {dtype}: reads {1 / seconds:,.0f} tokens/s ({flop / 1e12:.3g} TFLOP/s)"
        )

    def _by_blocks(self, work: Callable[[LanguageModel], Callable[[], Any]]) -> tuple[float, float]:
        """Seconds of a pass outside its blocks, and of each block."""
        times = []
        for lm in self._lms:
            with fused(lm):
                times.append(self._seconds(work(lm)))
        n_more = self._lms[-1].n_layers - 1
        layer = max(times[-1] - times[0], 0.0) / n_more if n_more else times[0]
        return max(times[0] - layer, 0.0), layer

    def _seconds(self, work: Callable[[], Any]) -> float:
        return _seconds(work, _synchronise(self.device))


@dataclass
class StageCost:
    """What a stage takes, summed step by step; its fields are the columns of a plan's table."""

    name: str
    tokens: float = 0.0
    flop: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    seconds: float = 0.0

    def row(self) -> dict[str, str | float]:
        return {"stage": self.name, **{k: float(v) for k, v in vars(self).items() if k != "name"}}

    def read(self, m: ModelRates, tokens: float, layers: int, *, logits: float = 0.0) -> None:
        """Tokens through `layers` blocks; if `logits`, also through the unembedding and that many softmaxes."""
        self.tokens += tokens
        self.flop += 2 * tokens * (layers * m.block + (m.head if logits else 0))
        self.seconds += tokens * (m.start + layers * m.layer + (m.logits + logits * m.softmax if logits else 0))
        self.memory = max(self.memory, m.n_bytes + (8 * 64 * m.d_vocab * 12 if logits else 0))

    def write(self, m: ModelRates, rows: int, tokens: int, sampling: Sampling, *, alike: int = 0) -> None:
        """Generate `rows` texts at once, of `tokens` each; the first `alike` blocks read the prompt only once."""
        self.read(m, rows * PROMPT, m.n_layers - alike)
        self.tokens += rows * tokens
        self.flop += 2 * rows * tokens * (m.n_layers * m.block + m.head)
        self.seconds += tokens * m.step(rows, sampling)
        self.memory = max(self.memory, m.n_bytes + rows * m.d_vocab * 16)

    def encode(self, tokens: float, sae: SaeConfig, seconds: float, times: float = 1.0) -> None:
        """Encode activations `times` times; a decoding counts as an encoding."""
        self.flop += 2 * tokens * times * sae.d_in * sae.d_sae
        self.seconds += tokens * times * seconds


def _shortened(hf_config: Any, n_layers: int) -> Any:
    short = copy.deepcopy(hf_config)
    text_config = short.get_text_config()
    total = text_config.num_hidden_layers
    for name, value in list(vars(text_config).items()):
        if isinstance(value, list | tuple) and len(value) == total:  # one a block
            setattr(text_config, name, value[:n_layers])
    text_config.num_hidden_layers = n_layers
    return short


def _without_weights(hf_config: Any, config: ModelConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    unquantised = copy.deepcopy(hf_config)
    if hasattr(unquantised, "quantization_config"):
        del unquantised.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(unquantised, dtype=dtype, trust_remote_code=config.trust_remote_code)


def _filled(model: Any, device: torch.device) -> Any:
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(_CONSTANT if tensor.is_floating_point() else 1)
    return model


def _size(model: Any) -> int:
    """Weights of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _probabilities(scores: Tensor) -> Tensor:
    logs = scores - scores.logsumexp(dim=1, keepdim=True)
    return logs.exp().mul_(logs).sum(dim=1)


def _synchronise(device: torch.device) -> Callable[[], Any] | None:
    return torch.cuda.synchronize if device.type == "cuda" else None


def _seconds(work: Callable[[], Any], finish: Callable[[], Any] | None = None) -> float:
    """Shortest time of a piece of work after a warm-up run; other programs can only lengthen it."""
    times: list[float] = []
    while len(times) < _MIN_REPEATS + 1 or (sum(times) < _MIN_SECONDS and len(times) < _MAX_REPEATS):
        start = time.perf_counter()
        work()
        if finish is not None:
            finish()
        times.append(time.perf_counter() - start)
        if times[-1] > 2 and len(times) > 1:
            break
    return min(times[1:])


def encode_seconds(d_in: int, d_sae: int, k: int, device: torch.device | str = "cpu") -> float:
    """Seconds a token that an SAE of this size takes to encode, in float32."""
    width = min(d_sae, _MAX_WIDTH)
    x, W = torch.full((256, d_in), _CONSTANT, device=device), torch.full((d_in, width), _CONSTANT, device=device)
    return _seconds(lambda: (x @ W).relu_().topk(min(k or 1, width)), _synchronise(x.device)) / len(x) * d_sae / width


def product_rate(d_in: int) -> float:
    """FLOP a second of float32 matrix products on the CPU."""
    x, W = torch.full((256, d_in), _CONSTANT), torch.full((d_in, 4_096), _CONSTANT)
    return 2 * x.numel() * W.shape[1] / _seconds(lambda: x @ W)


def table_speed() -> float:
    """Time of some work on tables, relative to the machine where the constants of `plan.py` were measured."""
    values = np.random.default_rng(0).normal(size=400_000)

    def work() -> None:
        table = pd.DataFrame({"feature": np.arange(len(values)) % 5_000, "value": values})
        table.groupby("feature")["value"].agg(["mean", "max"]).sort_values("mean")
        np.sort(values)
        sum(value * value for value in values[:200_000].tolist())

    return _seconds(work) / _TABLE_SECONDS


class DiskRates:
    """Bytes a second that a folder's disk writes, and that are read back (possibly from the page cache) and hashed.

    BadFile if the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        # A file without a name: a killed process leaves nothing behind.
        with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
            data = np.random.default_rng(0).bytes(_FILE_BYTES)
            start = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self.write = _FILE_BYTES / (time.perf_counter() - start)

            def read() -> None:
                file.seek(0)
                hashlib.file_digest(file, "sha256")

            self.read = _FILE_BYTES / _seconds(read)
