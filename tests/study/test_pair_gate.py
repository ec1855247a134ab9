"""The gate of a model, its SAE and its fine-tune: what is said of them."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from learnt_pair import HOOK, activations, learnt, text, trained_sae
from saeffect.lm.activations import TokenRows
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.topk import TopKSae
from saeffect.sae.training.config import SaeRecipe
from saeffect.study.pair_gate import WARM_START, judge_pair


def rows_of(lm: LanguageModel) -> TokenRows:
    ids = text(lm, 16, seed=5)
    return TokenRows(ids, torch.zeros(len(ids), dtype=torch.int64).numpy(), ("general",))


@pytest.fixture(scope="module")
def pair(tiny_llama: LanguageModel) -> tuple[LanguageModel, SparseAutoencoder]:
    lm = learnt(tiny_llama)
    return lm, trained_sae(activations(lm, HOOK, text(lm, 32, seed=2)))


def test_a_right_pair(pair: tuple[LanguageModel, SparseAutoencoder]) -> None:
    lm, sae = pair
    found = judge_pair({"base": lm, "tuned": lm}, sae, HOOK, rows_of)
    assert found.ok, found.changes
    table = found.table()
    assert table["base"].equals(table["tuned"])
    assert table.loc["explained_variance", "base"] > 0.6
    assert found.by_position()["model"].tolist().count("tuned") == 7
    assert found.as_dict()["ok"] is True
    assert "The SAE fits." in found._repr_html_() and "ce_loss_score" in found._repr_html_()


def test_without_a_hook_the_best_is_taken(pair: tuple[LanguageModel, SparseAutoencoder]) -> None:
    assert judge_pair({"base": pair[0]}, pair[1], None, rows_of).hook == HOOK


def test_a_fine_tune_that_moved_away(pair: tuple[LanguageModel, SparseAutoencoder]) -> None:
    lm, sae = pair
    tuned = copy.deepcopy(lm.model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        mixed = tuned.model.layers[1].mlp.down_proj.weight
        mixed.copy_(4 * mixed[torch.randperm(len(mixed))])
    found = judge_pair({"base": lm, "tuned": dataclasses.replace(lm, model=tuned)}, sae, HOOK, rows_of)
    assert (found.failed("base"), found.failed("tuned")) == (False, True)
    assert found.changes == (WARM_START,)


class _Permuted:
    """A tokenizer that gives each token another's id."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        return [(37 * i) % 319 + 1 if i else 0 for i in self._tokenizer.encode(text, **options)]


def test_another_tokenizer(pair: tuple[LanguageModel, SparseAutoencoder]) -> None:
    lm, sae = pair
    other = dataclasses.replace(lm, tokenizer=_Permuted(lm.tokenizer))
    found = judge_pair({"base": other}, sae, HOOK, rows_of)
    assert [change.name for change in found.changes] == ["tokenizer"]
    assert "perplexity" in found.changes[0].found
    found = judge_pair({"base": other}, sae, HOOK, rows_of, tokenizers={"org/base": lm.tokenizer})
    assert found.changes[0].fix == "use that of org/base."
    assert not found.ok


def test_what_nothing_mends(pair: tuple[LanguageModel, SparseAutoencoder]) -> None:
    lm, _ = pair
    nothing = TopKSae(SaeConfig("topk", 32, 64, k=4)).eval().requires_grad_(False)
    found = judge_pair({"base": lm}, nothing, HOOK, rows_of)
    assert found.failed("base")
    assert not found.ok


def test_the_recipes_of_the_page_are_recipes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert [SaeRecipe.read(yaml.safe_load(block), at="docs/gate.md").sae.init_from for block in blocks] == [
        "./saes/base"
    ]
