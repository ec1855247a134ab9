"""The task of the steering benchmark: one set of weights in two libraries, the same vectors, tokens and settings."""

from __future__ import annotations

import copy
import inspect
import time
from typing import Any

import torch
from measure import copy_rate, median_seconds
from peer_model import hooked_gpt2
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from saeffect.lm.hooks import capture, edited
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import resolve_dtype
from saeffect.steering import Intervention, NoiseCell, Sampling, generate
from saeffect.steering.operators import AddVectors
from saeffect.steering.prompt_pass import last_logits, read_prompts
from saeffect.steering.sampling import next_tokens

__all__ = ["Task"]

# With random weights all tokens are about equally probable. The final norm times this gives logits as peaked as those
# of a trained model, so that the top_p set of mass 0.3 has a few tokens and not thousands.
LOGIT_SCALE = 6.0


class Vocabulary:
    """The part of a tokenizer that both libraries use in generation: special ids and padding."""

    padding_side = "right"

    def __init__(self, size: int) -> None:
        self.size = size
        self.eos_token_id = self.bos_token_id = self.pad_token_id = size - 1
        self.all_special_ids = (size - 1,)

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}


class Task:
    """Both sides, ready to run.

    Args:
        quick: A tiny model and few tokens instead of GPT-2 small's shape and 50.
        features: Features of a round of saeffect; None for as many as a batch.
    """

    def __init__(self, *, quick: bool, features: int | None) -> None:
        sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 500} if quick else {}
        self.config = GPT2Config(**sizes)
        self.config.bos_token_id = self.config.eos_token_id = self.config.vocab_size - 1
        torch.manual_seed(0)
        model = GPT2LMHeadModel(self.config).eval().requires_grad_(False)
        model.transformer.ln_f.weight *= LOGIT_SCALE
        layer = 3 if quick else 8
        self.hook = f"blocks.{layer}.hook_resid_pre"
        self.prompt = torch.randint(self.config.vocab_size - 1, (1, 7))
        self.sampling = Sampling(max_new_tokens=8 if quick else 50)
        self.batch = 16 if quick else inspect.signature(generate).parameters["batch_size"].default
        self.batches = (1, 4, 16) if quick else (1, 16, 64, 128, 256)
        self.features = features or self.batch
        dtypes = {torch.float32, resolve_dtype("auto", torch.device("cpu"))}
        names = {dtype: f"saeffect_{str(dtype).removeprefix('torch.')}" for dtype in dtypes}
        self.default = names[resolve_dtype("auto", torch.device("cpu"))]
        self.ours = {
            names[dtype]: LanguageModel(
                copy.deepcopy(model).to(dtype), Vocabulary(self.config.vocab_size), "gpt2", prepend_bos=False
            )
            for dtype in sorted(dtypes, key=lambda d: d != torch.float32)
        }
        self.peer = hooked_gpt2(model, processed=True)
        # Without one, transformer-lens 3.9 counts the positions of cached tokens twice.
        self.peer.tokenizer = Vocabulary(self.config.vocab_size)
        norm = capture(self.ours["saeffect_float32"], self.hook, self.prompt)[:, 1:].norm(dim=-1).mean()
        vectors = torch.randn(max(self.features, *self.batches), self.config.n_embd)
        self.vectors = norm * vectors / vectors.norm(dim=1, keepdim=True)
        self._next_of_the_peer = 0

    def describe(self) -> dict[str, Any]:
        """The settings of the task."""
        config = self.config
        model = f"{config.n_layer} blocks, d_model {config.n_embd}, {config.vocab_size:,} tokens"
        return {
            "model": f"GPT-2 with random weights, {model}",
            "hook": self.hook,
            "positions": "all",
            "prompt_tokens": self.prompt.shape[1],
            "new_tokens": self.sampling.max_new_tokens,
            "top_p": self.sampling.top_p,
            "temperature": self.sampling.temperature,
            "frequency_penalty": self.sampling.frequency_penalty,
            "batch": self.batch,
            "features_a_round": self.features,
            "default_dtype": self.default.removeprefix("saeffect_"),
            "tokens_in_top_p_set": self._tokens_in_the_set(),
        }

    def paper_loop(self) -> float:
        """Features a second of one feature, steered as in the paper's code."""
        vector = self.vectors[self._next_of_the_peer % len(self.vectors)]
        self._next_of_the_peer += 1
        s = self.sampling
        started = time.perf_counter()
        self._peer_generate(
            vector, s.max_new_tokens, top_p=s.top_p, temperature=s.temperature, freq_penalty=s.frequency_penalty
        )
        return 1 / (time.perf_counter() - started)

    def steer(self, name: str, batch: int | None = None) -> tuple[float, list[list[int]]]:
        """Features a second of one batch or more of saeffect, and the tokens."""
        n = batch or self.features
        started = time.perf_counter()
        outputs = self._generate(name, n, self.sampling, batch or self.batch)
        return n / (time.perf_counter() - started), outputs

    def parts(self, name: str) -> dict[str, float]:
        """Seconds of one token of a batch: the bare products, sampling, and moving the weights once.

        The limit is what the products of all tokens take alone, from the model's own weights into memory that is
        there already; everything else (attention, norms, the prompt, sampling) is not in it.
        """
        lm, n = self.ours[name], self.batch
        weights = [(p, True) for p_name, p in lm.model.transformer.h.named_parameters() if p.ndim == 2]
        weights.append((lm.model.lm_head.weight, False))
        products = _products(weights, n, lm.dtype)
        logits = lm.model(self.prompt).logits[:, -1].float().repeat(n, 1)
        cells = [NoiseCell(0, "p", i) for i in range(n)]
        sampled = median_seconds(lambda: next_tokens(logits, cells, 0, self.sampling), 3)
        n_bytes = sum(w.numel() * w.element_size() for w, _ in weights)
        return {
            "products_s": products,
            "sampling_s": sampled,
            "weights_once_s": n_bytes / copy_rate(2**28 if n_bytes > 2**26 else 2**20),
            "flop_per_second": 2 * n * sum(w.numel() for w, _ in weights) / products,
            "limit_features_per_second": n / (products * self.sampling.max_new_tokens),
        }

    def check(self) -> dict[str, float]:
        """Both sides compute the same: log-probabilities after the prompt and a token, and greedy texts.

        Raises:
            RuntimeError: float32 differs by more than rounding, or bfloat16 by more than it may.
        """
        errors: dict[str, float] = {}
        vectors = self.vectors[:2]
        expected = torch.cat([self._peer_log_probabilities(v) for v in vectors])
        for name, lm in self.ours.items():
            edit = Intervention(AddVectors(vectors)).edit(self.prompt.shape[1])
            logits, cache = read_prompts(lm, self.hook, self.prompt.tolist() * len(vectors), edit, room=1)
            first = logits.log_softmax(-1)
            edit.start = self.prompt.shape[1]
            with torch.inference_mode(), edited(lm, self.hook, edit):
                logits, _ = last_logits(lm, self.prompt[:, :1].expand(len(vectors), -1), cache)
            ours = torch.stack([first, logits.log_softmax(-1)], dim=1)
            dtype = name.removeprefix("saeffect_")
            error = float((ours - expected).norm() / expected.norm())
            errors[f"{dtype}_log_probability_error"] = error
            if not error < (1e-5 if dtype == "float32" else 0.05):
                raise RuntimeError(f"{dtype} log-probabilities differ from transformer-lens': relative {error:.2g}")
        n_new = self.sampling.max_new_tokens
        greedy = self._generate(
            "saeffect_float32",
            len(vectors),
            Sampling(max_new_tokens=n_new, temperature=0, frequency_penalty=0, allow_end=True),
            4,
        )
        same = [self._peer_generate(v, n_new, do_sample=False) == ids for v, ids in zip(vectors, greedy, strict=True)]
        errors["same_greedy_tokens"] = sum(same) / len(same)
        if not all(same):
            raise RuntimeError("the most probable texts of both sides differ in float32")
        return errors

    def _generate(self, name: str, n: int, sampling: Sampling, batch: int) -> list[list[int]]:
        return generate(
            self.ours[name],
            self.hook,
            self.prompt[0].tolist(),
            [NoiseCell(0, "What topic is on your mind?", 0)] * n,
            sampling,
            intervention=Intervention(AddVectors(self.vectors[:n])),
            batch_size=batch,
        )

    @torch.inference_mode()
    def _peer_generate(self, vector: Tensor, n_new: int, **settings: Any) -> list[int]:
        with self.peer.hooks(fwd_hooks=[(self.hook, _adding(vector))]):
            output = self.peer.generate(self.prompt, max_new_tokens=n_new, stop_at_eos=False, verbose=False, **settings)
        ids: list[int] = output[0, self.prompt.shape[1] :].tolist()
        return ids

    @torch.inference_mode()
    def _peer_log_probabilities(self, vector: Tensor) -> Tensor:
        """After the prompt and after the prompt and its first token again, `[1, 2, d_vocab]`."""
        ids = torch.cat([self.prompt, self.prompt[:, :1]], dim=1)
        with self.peer.hooks(fwd_hooks=[(self.hook, _adding(vector))]):
            return self.peer(ids)[:, -2:].log_softmax(-1)

    def _tokens_in_the_set(self) -> float:
        """Median number of tokens that may be drawn, over positions of random text."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.config.vocab_size - 1, (4, 32), generator=generator)
        with torch.inference_mode():
            p = self.ours["saeffect_float32"].model(ids).logits.softmax(-1).flatten(0, 1)
        ordered = p.sort(dim=-1, descending=True).values
        return float(((ordered.cumsum(-1) - ordered) < self.sampling.top_p).sum(-1).float().median())


def _adding(vector: Tensor) -> Any:
    def hook(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - transformer-lens passes it by name
        return activation + vector

    return hook


def _products(weights: list[tuple[Tensor, bool]], n: int, dtype: torch.dtype) -> float:
    """Seconds of `n` rows times each weight; the flag says whether it is stored [in, out]."""
    jobs = []
    for weight, as_it_is in weights:
        w = weight if as_it_is else weight.T
        jobs.append((torch.randn(n, w.shape[0]).to(dtype), w, torch.empty(n, w.shape[1], dtype=dtype)))

    def run() -> None:
        for x, w, out in jobs:
            torch.mm(x, w, out=out)

    return median_seconds(run, 3)
