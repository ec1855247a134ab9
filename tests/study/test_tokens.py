"""What becomes of a study whose models have tokenizers that differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from saeffect.comparison.design import design_check
from saeffect.errors import ConfigError, IncompatibleModels
from saeffect.lm.architectures import unembedding
from saeffect.lm.tokens import known_tokens
from saeffect.study.check import check_study
from saeffect.study.stages.compare import arm_facts
from saeffect.study.stages.features import ranked_tokens, shared_unembedding
from saeffect.study.stages.gate import measure_gate
from saeffect.study.study import Study
from tiny_study import make_model, make_study, sentences

CHAT = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "plain"
    folder.mkdir()
    make_study(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "study"))


def change(folder: Path, **keys: Any) -> None:
    path = folder / "study.yaml"
    config = yaml.safe_load(path.read_text())
    for key, value in keys.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def add_tokens(place: Path, *, resize: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT})
    tokenizer.save_pretrained(place)
    if resize:
        model = AutoModelForCausalLM.from_pretrained(place)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(place)


def edit_tokenizer(place: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = place / "tokenizer.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def test_added_chat_tokens_are_told_and_never_ranked(folder: Path) -> None:
    add_tokens(folder / "tuned", resize=True)
    study = Study.open(folder / "study.yaml")
    said = "\n".join(check_study(study, folder / "run").lines)
    assert "arm treatment's own tokenizer adds 2 tokens (<|im_start|>, <|im_end|>)" in said
    control, treatment = (study.open_arm(name).lm for name in ("control", "treatment"))
    assert treatment.d_vocab == control.d_vocab + 2
    assert ranked_tokens(study, treatment)[: control.d_vocab].equal(ranked_tokens(study, control))
    assert not ranked_tokens(study, treatment)[control.d_vocab :].any()
    facts = {name: arm_facts(study, name) for name in study.config.arms}
    row = design_check(facts).set_index("field").loc["tokenizer"]
    assert (row["control"], row["status"]) == ("the control's", "intended")
    assert "adds 2 tokens" in row["treatment"]


def test_added_token_moves_no_other_unembedding(folder: Path) -> None:
    before = unembedding(Study.open(folder / "study.yaml").open_arm("treatment").lm)
    add_tokens(folder / "tuned", resize=True)
    after = shared_unembedding(Study.open(folder / "study.yaml").open_arm("treatment").lm)
    torch.testing.assert_close(after[:, : before.shape[1]], before, atol=1e-6, rtol=1e-5)


def test_all_arms_use_the_controls_tokens(folder: Path) -> None:
    edit_tokenizer(folder / "tuned", lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True))
    study = Study.open(folder / "study.yaml")
    said = "\n".join(check_study(study, folder / "run").lines)
    assert "arm treatment's own tokenizer cuts 'The river'" in said
    assert [study.open_arm(name).lm.encode("fever and cough") for name in ("control", "treatment")] == [
        study.tokens.tokenizer.encode("fever and cough")
    ] * 2
    row = design_check({name: arm_facts(study, name) for name in study.config.arms}).set_index("field").loc["tokenizer"]
    assert row["status"] == "flaw"


def test_the_controls_tokenizer_counts_for_every_arm(folder: Path) -> None:
    before = Study.open(folder / "study.yaml").identities["treatment"]
    edit_tokenizer(folder / "base", lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True))
    after = Study.open(folder / "study.yaml").identities["treatment"]
    assert before["model"] == after["model"]
    assert before["tokens"] != after["tokens"]


def test_other_ids_refused_renamed_placeholder_allowed(folder: Path) -> None:
    def swap(raw: dict[str, Any]) -> None:
        vocab = raw["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    kept = (folder / "tuned" / "tokenizer.json").read_text()
    edit_tokenizer(folder / "tuned", swap)
    with pytest.raises(IncompatibleModels, match=r"2 of .* ids are another token, such as .*'a' in one and 'b'"):
        _ = Study.open(folder / "study.yaml").tokens
    (folder / "tuned" / "tokenizer.json").write_text(kept)
    for name, token in (("base", "<|reserved|>"), ("tuned", "<|tool|>")):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        tokenizer.save_pretrained(folder / name)
    tokens = Study.open(folder / "study.yaml").tokens
    assert tokens.differences["treatment"].words() == "renames 1 token (<|reserved|> to <|tool|>)"
    assert tokens.shared == frozenset(known_tokens(tokens.tokenizer)) - {len(tokens.tokenizer) - 1}


def test_token_without_embedding_in_text_is_refused(folder: Path) -> None:
    for name in ("base", "tuned"):
        add_tokens(folder / name, resize=False)
    study = Study.open(folder / "study.yaml")
    assert "(<|im_start|>, <|im_end|>) are without embedding" in "\n".join(check_study(study, folder / "run").lines)
    rows = [json.dumps({"text": "<|im_start|>" + text}) for text in sentences(400)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    study = Study.open(folder / "study.yaml")
    with pytest.raises(ConfigError, match=r"token '<\|im_start\|>' \(id \d+\), but the embedding of control's model"):
        check_study(study, folder / "run")
    with pytest.raises(ConfigError, match=r"<\|im_start\|>"):
        measure_gate(study.open_arm("control"), study.rows(), study.config.gate)
    shutil.copy(folder / "other.jsonl", folder / "text.jsonl")
    change(folder, steering={"prompts": ["The river", "<|im_end|> My doctor"]})
    with pytest.raises(ConfigError, match=r"the prompt '<\|im_end\|> My doctor' holds the token"):
        check_study(Study.open(folder / "study.yaml"), folder / "run")


def test_check_refuses_rows_longer_than_the_model(folder: Path) -> None:
    change(folder, text={"context_size": 129})
    with pytest.raises(ConfigError, match="129 tokens, but the model of control takes 128") as caught:
        check_study(Study.open(folder / "study.yaml"), folder / "run")
    assert "text.context_size" in str(caught.value.at)


def test_check_refuses_tokenizer_without_end(folder: Path) -> None:
    def rename(raw: dict[str, Any]) -> None:
        raw["model"]["vocab"]["<end>"] = raw["model"]["vocab"].pop("<|endoftext|>")
        raw["added_tokens"] = []

    for name in ("base", "tuned"):
        edit_tokenizer(folder / name, rename)
        (folder / name / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="no end-of-text token") as caught:
        check_study(Study.open(folder / "study.yaml"), folder / "run")
    assert "eos_token in the tokenizer_config.json" in str(caught.value.fix)


def test_another_vocabulary_is_refused(folder: Path) -> None:
    make_model(folder / "foreign", 3, extra=["entirely different words zebra quagga okapi"] * 50)
    arms = yaml.safe_load((folder / "study.yaml").read_text())["arms"]
    arms["treatment"]["model"] = "./foreign"
    change(folder, arms=arms)
    with pytest.raises(IncompatibleModels, match="different tokenizers"):
        _ = Study.open(folder / "study.yaml").tokens


def test_ranked_tokens_follow_scripts_or_vectors(folder: Path) -> None:
    def of(choice: Any) -> set[str]:
        change(folder, features={"tokens": choice}) if choice else None
        study = Study.open(folder / "study.yaml")
        lm = study.open_arm("control").lm
        return {
            text for text, is_in in zip(lm.token_strings(), ranked_tokens(study, lm).tolist(), strict=True) if is_in
        }

    everything = of(None)
    latin = of("latin")
    assert {" fever", "."} <= latin < everything
    assert "\ufffd" in everything - latin
    known = of("embeddings")
    assert " fever" in known
    assert known < everything
