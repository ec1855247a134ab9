"""`protocol: paper` beside the paper's own code: TransformerLens generates, a BERT is mean-pooled, one text beats one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.config import SteeringConfig
from saeffect.config_steering import PAPER_PROTOCOL
from saeffect.errors import ConfigError
from saeffect.lm.language_model import LanguageModel
from saeffect.steering import Site, SteeringPlan, run_trials
from saeffect.steering.effects import effects

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from peer import peer

HOOK = "blocks.1.hook_resid_pre"
PROMPT = "The old doctor wrote a letter"
COEFFICIENT = 50.0


class Letters:
    """A text's vector counts its characters, so that every difference between two texts shows."""

    def mean_vector(self, text: str) -> np.ndarray:
        return np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256).astype(float)


@pytest.fixture(scope="module")
def W_dec() -> torch.Tensor:
    return 0.1 * torch.randn(6, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def features(tiny_gpt2: LanguageModel) -> pd.DataFrame:
    ids = [[50, 60], [70, 270], [300, 310]]
    tokens = [tiny_gpt2.tokenizer.convert_ids_to_tokens(own) for own in ids]
    return pd.DataFrame({"feature": [0, 2, 5], "top_tokens": tokens, "top_token_ids": ids})


def plan(**changes: Any) -> SteeringPlan:
    keys = {k: v for k, v in PAPER_PROTOCOL.items() if k in SteeringPlan.model_fields}
    return SteeringPlan(**keys | {"doses": (COEFFICIENT,), "unit": "coefficient", "prompts": (PROMPT,)} | changes)


def run(lm: LanguageModel, W_dec: torch.Tensor, features: pd.DataFrame, **changes: Any) -> pd.DataFrame:
    with_bos = LanguageModel(lm.model, lm.tokenizer, lm.name, lm.identity, prepend_bos=True)
    steering = plan(protocol="paper", **changes)
    return run_trials(Site(with_bos, HOOK, W_dec, 4.0), features, steering, vectors=Letters())


def by_their_code(lm: LanguageModel, vector: torch.Tensor | None) -> str:
    """What their `steering_hook` and `hooked_generate` do, drawing the most probable token.

    With a cache only the first pass has more than one position, so the hook acts on the prompt's. Here every pass reads
    all, since `generate` of TransformerLens 3 shifts the positions of GPT-2 when it uses its cache.
    """
    from transformer_lens.utilities.logits_utils import sample_logits

    model = peer(lm, processed=True)
    tokens = torch.tensor([[0, *lm.tokenizer.encode(PROMPT)]])
    n = tokens.shape[1]

    def hook(resid: torch.Tensor, hook: object) -> torch.Tensor:
        if vector is not None:
            resid[:, : n - 1, :] += COEFFICIENT * vector
        return resid

    with torch.no_grad():
        for _ in range(50):
            logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)])[:, -1]
            new = sample_logits(logits, top_p=1e-6, temperature=1.0, freq_penalty=1.0, tokens=tokens)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
    return lm.decode(tokens[0, n:].tolist())


def test_texts_are_those_of_their_code(tiny_gpt2, W_dec, features) -> None:
    trials = run(tiny_gpt2, W_dec, features, top_p=1e-6).set_index(["feature", "condition"])
    unsteered = by_their_code(tiny_gpt2, None)
    for feature in features["feature"]:
        assert trials.loc[(feature, "unsteered"), "text"] == unsteered
        steered = by_their_code(tiny_gpt2, W_dec[feature])
        assert trials.loc[(feature, "steered"), "text"] == steered != unsteered


def test_the_rigorous_protocol_differs_in_bos_and_penalty(tiny_gpt2, W_dec, features) -> None:
    paper = run(tiny_gpt2, W_dec, features, top_p=1e-6)
    with_bos = LanguageModel(tiny_gpt2.model, tiny_gpt2.tokenizer, "tiny-gpt2", "tiny-gpt2", prepend_bos=True)
    ours = run_trials(Site(with_bos, HOOK, W_dec, 4.0), features, plan(top_p=1e-6), vectors=Letters())
    assert (paper["text"] != ours["text"]).all()


def test_similarity_of_prompt_and_text_to_spelled_tokens(tiny_gpt2, W_dec, features) -> None:
    trials = run(tiny_gpt2, W_dec, features)
    row = trials[(trials["feature"] == 5) & (trials["condition"] == "steered")].iloc[0]
    ids = features.set_index("feature").loc[5, "top_token_ids"]
    reference = " ".join(tiny_gpt2.tokenizer.convert_ids_to_tokens(ids))
    assert "Ġ" in reference
    a, b = Letters().mean_vector(PROMPT + row["text"]), Letters().mean_vector(reference)
    assert row["similarity"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-6)


def test_each_text_has_noise_of_its_own(tiny_gpt2, W_dec, features) -> None:
    trials = run(tiny_gpt2, W_dec, features, top_p=1.0)
    unsteered = trials.loc[trials["condition"] == "unsteered", "text"]
    assert unsteered.nunique() == len(features), "one unsteered text a feature"
    still = run(tiny_gpt2, torch.full_like(W_dec, 1e-12), features, top_p=1.0)
    pairs = still.pivot(index="feature", columns="condition", values="text")
    assert (pairs["steered"] != pairs["unsteered"]).all(), "a push of nothing still gives another text"


def test_pass_is_one_text_above_another(tiny_gpt2, W_dec, features) -> None:
    trials = run(tiny_gpt2, W_dec, features)
    found = effects(trials.assign(similarity_shuffled=np.nan))
    wide = trials.pivot(index="feature", columns="condition", values="similarity")
    assert found["paper_pass"].tolist() == (wide["steered"] > wide["unsteered"]).tolist()
    assert found["p"].isna().all(), "one pair cannot be tested"


def test_the_section_is_filled_in() -> None:
    section = SteeringConfig.read({"protocol": "paper"}, at="")
    for key, value in PAPER_PROTOCOL.items():
        assert getattr(section, key) == value
    assert (section.unit, section.doses) == ("coefficient", (50.0,))
    assert SteeringConfig.read(section.model_dump(mode="json"), at="") == section
    local = SteeringConfig.read({"protocol": "paper", "outcome_encoder": "/models/bert-base-uncased"}, at="")
    assert local.outcome_encoder == "/models/bert-base-uncased"


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_p", 0.9), ("positions", "all"), ("doses", [0.4]), ("samples", 4), ("outcome_encoder", "roberta-base")],
)
def test_another_value_is_refused(key: str, value: object, complains) -> None:
    with complains(ConfigError, f"protocol: paper decides {key}", "leave it out", at="steering"):
        SteeringConfig.read({"protocol": "paper", key: value}, at="steering")
