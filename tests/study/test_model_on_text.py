"""How texts begin, who says so, and whether the model knows them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from saeffect.errors import ConfigError
from saeffect.lm.activations import TokenRows
from saeffect.lm.finetune import perplexity
from saeffect.lm.language_model import LanguageModel
from saeffect.study.check import check_study
from saeffect.study.stages.gate import complaint_about_model, model_on_text
from saeffect.study.study import Study
from tiny_study import make_sae, make_study

KNOWS = {"perplexity": {"general": 20.0}, "unigram_perplexity": {"general": 400.0}, "prepend_bos": False}


def _study(folder: Path, word: Any = None) -> Path:
    """A study whose tokenizer begins a text with its token 0, and whose SAEs say `word` of that."""
    path = make_study(folder)
    for model in ("base", "tuned"):
        fast = PreTrainedTokenizerFast.from_pretrained(folder / model)
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        fast.save_pretrained(folder / model)
    for index, arm in enumerate(("control", "treatment", "placebo")):
        make_sae(folder / "saes" / arm, index, **({} if word is None else {"prepend_bos": word}))
    return path


def test_rows_begin_as_saes_or_tokenizer_say(tmp_path: Path) -> None:
    study = Study.open(_study(tmp_path))
    assert (study.rows().ids[:, 0] == 0).all()
    assert study.arms["treatment"].lm.encode_prompt("fever")[0] == 0
    for index, arm in enumerate(("control", "treatment", "placebo")):
        make_sae(tmp_path / "saes" / arm, index, prepend_bos=False)
    study = Study.open(tmp_path / "study.yaml")
    assert not (study.rows().ids[:, 0] == 0).all()
    checked = check_study(study)
    said = next(line for line in checked.lines if "begins" in line)
    assert "without a BOS token; otherwise: the tokenizer by itself begins a text with '<|endoftext|>'" in said
    assert checked.design.set_index("field").loc["bos", "status"] == "same"
    make_sae(tmp_path / "saes" / "placebo", 2, prepend_bos=True)
    with pytest.raises(ConfigError, match="in front: placebo; these on texts without: control, treatment"):
        check_study(Study.open(tmp_path / "study.yaml"))


def test_perplexity_and_both_beginnings_by_hand(tiny_llama: LanguageModel) -> None:
    ids = np.random.default_rng(0).integers(1, 6, (4, 9)).astype(np.int32)
    ids[:, 0] = 0
    rows = TokenRows(ids, np.array([0, 1, 0, 1]), ("general", "medical"))
    lm = dataclasses.replace(tiny_llama, prepend_bos=True)
    losses = np.array([math.log(perplexity(lm.model, ids[i : i + 1])) for i in range(4)])
    with torch.inference_mode():
        found = model_on_text(lm, rows, losses, rows)
        plain = model_on_text(tiny_llama, dataclasses.replace(rows, ids=ids[:, 1:]), losses, rows)
        with_bos = lm.model(input_ids=torch.from_numpy(ids[:2].astype(np.int64))).logits[:, 1:-1]
        expected = torch.nn.functional.cross_entropy(
            with_bos.flatten(0, 1), torch.from_numpy(ids[:2, 2:].flatten().astype(np.int64))
        )
    assert found["perplexity"]["general"] == pytest.approx(math.exp((losses[0] + losses[2]) / 2))
    assert found["unigram_perplexity"]["medical"] < 5, "the BOS is no token of the text"
    assert found["prepend_bos"] and not plain["prepend_bos"]
    assert found["ce_with_bos"] == pytest.approx(float(expected), rel=1e-5)
    assert found["ce_without_bos"] == pytest.approx(math.log(perplexity(lm.model, ids[:2, 1:])), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ce_with_bos": 3.0, "ce_without_bos": 3.1}, ""),
        ({"ce_with_bos": math.nan, "ce_without_bos": math.nan}, ""),
        ({"ce_with_bos": 3.0, "ce_without_bos": 5.0}, "148.4 without the BOS token in front of rows, and 20.09 with"),
        ({"ce_with_bos": 5.0, "ce_without_bos": 3.0, "prepend_bos": True}, "text.bos: never"),
        ({"perplexity": {"general": 500.0}, "ce_with_bos": 3.0, "ce_without_bos": 3.0}, "frequencies alone give 400"),
        ({"perplexity": {"general": math.nan}, "ce_with_bos": 3.0, "ce_without_bos": 3.0}, "on general is nan"),
    ],
)
def test_absurd_predictions_are_told(changes: dict[str, Any], words: str) -> None:
    said = complaint_about_model(KNOWS | changes)
    assert words in said
    assert bool(said) == bool(words)
