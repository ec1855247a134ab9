from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.errors import ConfigError, ShapeMismatch, UnknownName
from saeffect.steering import Intervention, MeanDifferences, NoiseCell, SteeringPlan, generate, run_baselines
from saeffect.steering.baselines import BASELINE_COLUMNS, naming_prompt
from saeffect.steering.operators import AddVectors
from steering.tiny_model import D_MODEL, HOOK, OneHotWords, n_hooks, site

W_DEC = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(5)) * 2
FEATURES = pd.DataFrame({"feature": [4, 1], "top_tokens": [["w10", " w11"], ["?", "\n"]]})
PLAN = SteeringPlan(prompts=("one two", "three"), doses=(0.5,), samples=2, max_new_tokens=6, seed=9)
DIFFERENCE = torch.arange(1.0, D_MODEL + 1)


def run(lm, plan=PLAN, **change):
    given = {"vectors": OneHotWords(), "mean_differences": {4: DIFFERENCE, 1: "the feature never fired on the text"}}
    return run_baselines(site(lm, W_DEC), FEATURES, plan, **{**given, **change})


def test_the_rows_are_what_generate_gives(lm):
    table = run(lm)
    assert tuple(table.columns) == BASELINE_COLUMNS
    assert len(table) == 2 * 2 * 2 * 2
    vector = 0.5 * 4.0 * DIFFERENCE / DIFFERENCE.norm()
    for row in table[table["feature"] == 4].itertuples():
        text = PLAN.prompts[row.prompt]
        named = f"Talk about w10, w11. {text}" if row.condition == "prompt" else text
        steering = None if row.condition == "prompt" else Intervention(AddVectors(vector[None]))
        cells = [NoiseCell(9, text, row.sample)]
        ids = generate(lm, HOOK, lm.encode(named), cells, PLAN, intervention=steering)[0]
        assert row.text == lm.decode(ids)
        assert row.dose == (0.0 if row.condition == "prompt" else 0.5)
        assert row.perplexity >= 1
        assert row.reason == ""
    assert n_hooks(lm) == 0


def test_progress_counts_every_text_up_to_all(lm):
    seen: list[tuple[int, int]] = []
    run(lm, progress=lambda *n: seen.append(n))
    assert seen[-1] == (16, 16)
    assert seen == sorted(seen)


def test_what_cannot_be_run_says_why(lm):
    table = run(lm)
    gone = table[table["feature"] == 1].set_index("condition")
    assert gone[["similarity", "distinct2", "perplexity"]].isna().all(axis=None)
    assert gone["text"].isna().all()
    assert gone.loc["prompt", "reason"].str.contains("no top token is a word").all()
    assert gone.loc["mean_difference", "reason"].str.contains("never fired").all()
    ablation = SteeringPlan(prompts=("one two",), doses=(1.0,), operator="ablate", max_new_tokens=3)
    from saeffect.sae.base import SaeConfig
    from saeffect.sae.standard import StandardSae
    from saeffect.steering import Site

    sae = StandardSae(SaeConfig("standard", D_MODEL, 6))
    table = run_baselines(
        Site(lm, HOOK, W_DEC, 4.0, sae=sae),
        FEATURES[:1],
        ablation,
        vectors=OneHotWords(),
        mean_differences={4: DIFFERENCE},
        baselines=("mean_difference",),
    )
    assert table["reason"].str.contains("takes away another length").all()


def test_bad_requests(lm):
    with pytest.raises(UnknownName, match="valid: mean_difference, prompt"):
        run(lm, baselines=("promt",))
    with pytest.raises(ConfigError, match="one dose"):
        run(lm, SteeringPlan(prompts=("one",), doses=(0.5, 1.0)))


def test_the_prompt_names_each_word_once():
    assert naming_prompt([" drug", "▁Drug", "Ġdose"], "Hi") == "Talk about drug, dose. Hi"
    assert naming_prompt(["?", " "], "Hi") == ""


def test_mean_differences_equal_numpys_means():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(40, 8))).float()
    acts = torch.from_numpy(np.maximum(rng.normal(size=(40, 3)), 0)).float()
    acts[:, 2] = 0
    general = torch.from_numpy(rng.random(40) < 0.5)
    sums = MeanDifferences([9, 4, 7], 8)
    for first in range(0, 40, 16):
        part = slice(first, first + 16)
        sums.add(x[part], acts[part], general[part])
    for column, feature in enumerate((9, 4)):
        expected = x[acts[:, column] > 0].mean(0) - x[general].mean(0)
        torch.testing.assert_close(sums.vector(feature), expected)
    assert "never fired" in sums.vector(7)
    with pytest.raises(ShapeMismatch, match="40 tokens"):
        sums.add(x, acts[:, :2], general)
    assert "no text" in _only_domain(x, acts)


def _only_domain(x, acts):
    sums = MeanDifferences([0], 8)
    sums.add(x, acts[:, :1], torch.zeros(len(x), dtype=torch.bool))
    return sums.vector(0)


def test_a_feature_on_everywhere_has_no_difference():
    sums = MeanDifferences([0], 4)
    sums.add(torch.ones(3, 4), torch.ones(3, 1), torch.ones(3, dtype=torch.bool))
    assert "equal" in sums.vector(0)
