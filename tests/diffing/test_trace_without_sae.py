"""A trace without an SAE: everything but the features is the same as with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saeffect.diffing.trace import Trace, Tracer
from saeffect.lm.activations import NormLimit, TokenRows
from saeffect.lm.language_model import LanguageModel
from saeffect.progress import Log, Progress
from saeffect.sae.base import SaeConfig
from saeffect.sae.topk import TopKSae

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def tracers(tiny_llama: LanguageModel) -> dict[str, Tracer]:
    """With a random SAE and without one."""
    ids = np.random.default_rng(0).integers(1, 300, (6, 12)).astype(np.int32)
    rows = TokenRows(ids, np.array([0, 0, 0, 1, 1, 1]), ("domain", "general"))
    torch.manual_seed(0)
    sae = TopKSae(SaeConfig("topk", 32, 48, k=4))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    limit = NormLimit(1.0, 1e9)
    saes = {"with": sae.requires_grad_(False), "without": None}
    return {name: Tracer(tiny_llama, basis, HOOK, rows, limit) for name, basis in saes.items()}


@pytest.fixture(scope="module")
def traces(tracers: dict[str, Tracer], tiny_llama: LanguageModel, random_model: Any) -> dict[str, Trace]:
    """Of another random model."""
    tuned = replace(tiny_llama, model=random_model(tiny_llama.model.config, seed=1), name="tuned", identity="tuned")
    return {name: tracer.trace(tuned, name) for name, tracer in tracers.items()}


def test_all_but_the_features_is_the_same(traces: dict[str, Trace]) -> None:
    plain, full = traces["without"], traces["with"]
    assert plain.read.shape == plain.written.shape == (4, 0)
    assert full.read.shape == full.written.shape == (4, 48)
    for name in ("expected", "positions", "halves", "kl", "layers", "texts", "base_texts"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(full, name), name)
    assert plain.numbers == full.numbers
    assert plain.numbers["kl"] > 0.01
    assert plain.made_by != full.made_by


def test_what_was_written_is_told_before_the_text_is_read(
    tracers: dict[str, Tracer], traces: dict[str, Trace], tiny_llama: LanguageModel, random_model: Any
) -> None:
    tuned = replace(tiny_llama, model=random_model(tiny_llama.model.config, seed=1), name="tuned", identity="tuned")
    written: list[Any] = []
    written_at_reading: list[int] = []

    def show(progress: Progress) -> None:
        if progress.what.startswith("reading"):
            written_at_reading.append(len(written))

    tracer = replace(tracers["without"], log=Log(show=show))
    tracer.trace(tuned, "tuned", lambda *texts: written.append(texts))
    assert written_at_reading
    assert set(written_at_reading) == {1}
    np.testing.assert_array_equal(written[0][0], traces["without"].texts)
    np.testing.assert_array_equal(written[0][1], traces["without"].base_texts)


def test_a_trace_leaves_what_the_base_model_fires(tracers: dict[str, Tracer], traces: dict[str, Trace]) -> None:
    """Equal to reading the text with the base model alone, and to the densities of the trace."""
    kept = tracers["with"].firing().matrix().toarray()
    alone = replace(tracers["with"]).firing().matrix().toarray()
    np.testing.assert_allclose(kept, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((kept > 0).mean(axis=0), traces["with"].read[2], atol=1e-6)
    assert tracers["without"].firing().n_tokens == 0


def test_it_comes_back_from_its_file(traces: dict[str, Trace], tmp_path: Path) -> None:
    traces["without"].save(tmp_path / "trace.safetensors")
    back = Trace.load(tmp_path / "trace.safetensors")
    assert (back.name, back.made_by, back.numbers) == ("without", traces["without"].made_by, traces["without"].numbers)
    assert back.read.shape == (4, 0)
    np.testing.assert_allclose(back.kl, traces["without"].kl, rtol=1e-3)
