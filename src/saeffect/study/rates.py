"""How fast this machine is at what a study does, by measurements of seconds on the spot.

A model is measured without its weights: a few blocks of its configuration, filled with constants, take as long as those
of the real one.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
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
from saeffect.lm.loading import load_config, locate_model, resolve_device, resolve_dtype
from saeffect.steering.generate import last_logits
from saeffect.steering.sampling import NoiseCell, Sampling, next_tokens

__all__ = ["DiskRates", "ModelRates", "encode_seconds", "product_rate", "table_speed"]

_BLOCKS = 2
_BATCH = 8  # rows of text at once, as where the stages read
_MOST_TOKENS = 1_024
_LEAST, _REPEATS = 0.3, 3  # seconds and repetitions of a measurement
_CONSTANT = 0.01  # of all weights
_PROMPT = 8  # tokens before those that are written
_FILE = 64 << 20  # bytes
_WIDEST = 16_384  # features
_TABLE = 0.063  # seconds that `table_speed` takes where the study's constants were measured
_QUANTISED = {None: None, "8bit": 1.0, "4bit": 0.56}  # bytes a weight


class ModelRates:
    """Sizes and speeds of the model of a configuration, on its device and in its dtype.

    Attributes:
        n_layers: Number of blocks; `block` and `head` are the parameters of one, and of the unembedding.
        n_bytes: Of all weights.
        layer: Seconds that one block takes to read a token.
        logits: Seconds a token that the unembedding takes.
        softmax: Seconds a token for probabilities of all tokens, and a sum over them, in float32.

    Raises:
        SaeffectError: There is no such model, or transformers does not know it.
    """

    def __init__(self, config: ModelConfig, context_size: int, *, at: str | None = None) -> None:
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        place = locate_model(config, at=at)
        with quiet_transformers(), loading_errors(config, at, place):
            saved = load_config(place, config, at)
            self.n_layers = int(saved.get_text_config().num_hidden_layers)
            n = min(_BLOCKS, self.n_layers)
            short = _without_weights(_shortened(saved, n), config, self.dtype)
            few, total = (_size(one) for one in (short, _without_weights(saved, config, self.dtype)))
            self._lm = LanguageModel(_filled(short, self.device), None, config.path)
        self.block = (total - few) // (self.n_layers - n) if self.n_layers > n else few // n
        self.d_model, self.d_vocab = self._lm.d_model, self._lm.d_vocab
        self.head = self.d_model * self.d_vocab
        each = _QUANTISED[config.quantize] or self.dtype.itemsize
        self.n_bytes = round(total * each)
        with torch.inference_mode(), fused(self._lm):
            self._read(context_size)

    def _read(self, context_size: int) -> None:
        width = min(context_size, _MOST_TOKENS)
        ids = torch.zeros(max(1, min(_BATCH, _MOST_TOKENS // width)), width, dtype=torch.int64)
        lm, n = self._lm, self._lm.n_layers
        body = self._seconds(lambda: capture(lm, f"blocks.{n - 1}.hook_resid_post", ids))
        x = torch.full((ids.numel(), self.d_model), _CONSTANT, dtype=lm.dtype, device=self.device)
        self.layer = body / n / ids.numel()
        self.logits = self._seconds(lambda: lm.model.get_output_embeddings()(x)) / len(x)
        scores = torch.zeros(64, self.d_vocab, device=self.device)
        self.softmax = self._seconds(lambda: _probabilities(scores)) / len(scores)

    @functools.cache  # noqa: B019 - a few of them, and as long-lived as the rates
    def step(self, n_rows: int, sampling: Sampling) -> float:
        """Seconds to write one more token in each of so many rows: all blocks, the unembedding, and the draw."""
        with torch.inference_mode(), fused(self._lm):
            ids = torch.zeros(n_rows, _PROMPT, dtype=torch.int64, device=self.device)
            _, cache = last_logits(self._lm, ids)
            whole = self._seconds(lambda: last_logits(self._lm, ids[:, :1], cache))
            x = torch.full((n_rows, 1, self.d_model), _CONSTANT, dtype=self.dtype, device=self.device)
            head = self._seconds(lambda: self._lm.model.get_output_embeddings()(x).float())
            # Peaked as those of a real model: a few tokens hold most of the probability.
            scores = 5 * torch.randn(n_rows, self.d_vocab, device=self.device)
            cells = [NoiseCell(0, str(row), 0) for row in range(n_rows)]
            draw = self._seconds(lambda: next_tokens(scores.clone(), cells, 0, sampling))
        return max(whole - head, 0.0) * self.n_layers / self._lm.n_layers + head + draw

    def _seconds(self, work: Callable[[], Any]) -> float:
        return _seconds(work, torch.cuda.synchronize if self.device.type == "cuda" else None)


def _shortened(saved: Any, n_layers: int) -> Any:
    short = copy.deepcopy(saved)
    text = short.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == total:  # one a block
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
    return short


def _without_weights(saved: Any, config: ModelConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(saved)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(plain, dtype=dtype, trust_remote_code=config.trust_remote_code)


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


def _seconds(work: Callable[[], Any], finish: Callable[[], Any] | None = None) -> float:
    """Shortest time of a piece of work, once it is warm: what else runs here only makes it longer."""
    found: list[float] = []
    while len(found) < _REPEATS + 1 or (sum(found) < _LEAST and len(found) < 20 * _REPEATS):
        start = time.perf_counter()
        work()
        if finish is not None:
            finish()
        found.append(time.perf_counter() - start)
        if found[-1] > 2 and len(found) > 1:
            break
    return min(found[1:])


def encode_seconds(d_in: int, d_sae: int, k: int) -> float:
    """Seconds a token in which an SAE of this size, in float32 on the CPU, finds the active features."""
    width = min(d_sae, _WIDEST)
    x, W = torch.full((256, d_in), _CONSTANT), torch.full((d_in, width), _CONSTANT)
    return _seconds(lambda: (x @ W).relu_().topk(min(k or 1, width))) / len(x) * d_sae / width


def product_rate(d_in: int) -> float:
    """Multiplications and additions a second in products of float32 matrices on the CPU."""
    x, W = torch.full((256, d_in), _CONSTANT), torch.full((d_in, 4_096), _CONSTANT)
    return 2 * x.numel() * W.shape[1] / _seconds(lambda: x @ W)


def table_speed() -> float:
    """Seconds of a piece of work on tables, relative to where the study's constants were measured."""
    values = np.random.default_rng(0).normal(size=400_000)

    def work() -> None:
        table = pd.DataFrame({"feature": np.arange(len(values)) % 5_000, "value": values})
        table.groupby("feature")["value"].agg(["mean", "max"]).sort_values("mean")
        np.sort(values)
        sum(value * value for value in values[:200_000].tolist())

    return _seconds(work) / _TABLE


class DiskRates:
    """Bytes a second that a folder's disk writes, and that are read back and hashed (from memory, if they are there).

    BadFile if the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        # A file without a name: nothing is left of a process that is killed.
        with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
            data = np.random.default_rng(0).bytes(_FILE)
            start = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self.write = _FILE / (time.perf_counter() - start)

            def read() -> None:
                file.seek(0)
                hashlib.file_digest(file, "sha256")

            self.read = _FILE / _seconds(read)
