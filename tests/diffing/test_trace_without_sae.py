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
from saeffect.sae.base import SaeConfig
from saeffect.sae.topk import TopKSae

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def traces(tiny_llama: LanguageModel, random_model: Any) -> dict[str, Trace]:
    """With a random SAE and without one, of another random model."""
    tuned = replace(tiny_llama, model=random_model(tiny_llama.model.config, seed=1), name="tuned", identity="tuned")
    ids = np.random.default_rng(0).integers(1, 300, (6, 12)).astype(np.int32)
    rows = TokenRows(ids, np.array([0, 0, 0, 1, 1, 1]), ("domain", "general"))
    torch.manual_seed(0)
    sae = TopKSae(SaeConfig("topk", 32, 48, k=4))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    limit = NormLimit(1.0, 1e9)
    saes = {"with": sae.requires_grad_(False), "without": None}
    return {name: Tracer(tiny_llama, basis, HOOK, rows, limit).trace(tuned, name) for name, basis in saes.items()}


def test_all_but_the_features_is_the_same(traces: dict[str, Trace]) -> None:
    plain, full = traces["without"], traces["with"]
    assert plain.read.shape == plain.written.shape == (4, 0)
    assert full.read.shape == full.written.shape == (4, 48)
    for name in ("expected", "positions", "halves", "kl", "layers", "texts", "base_texts"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(full, name), name)
    assert plain.numbers == full.numbers
    assert plain.numbers["kl"] > 0.01
    assert plain.made_by != full.made_by


def test_it_comes_back_from_its_file(traces: dict[str, Trace], tmp_path: Path) -> None:
    traces["without"].save(tmp_path / "trace.safetensors")
    back = Trace.load(tmp_path / "trace.safetensors")
    assert (back.name, back.made_by, back.numbers) == ("without", traces["without"].made_by, traces["without"].numbers)
    assert back.read.shape == (4, 0)
    np.testing.assert_allclose(back.kl, traces["without"].kl, rtol=1e-3)
