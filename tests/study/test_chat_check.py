"""A study of chats: check, run, and what its tables count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from chat_templates import FAMILIES
from saeffect.errors import SaeffectError
from saeffect.lm.chat import has_part
from saeffect.study.check import check_study
from saeffect.study.study import Study
from tiny_study import make_study, sentences

pytestmark = pytest.mark.usefixtures("without_figures")

TEXTS = sentences(200)
TALKS = [
    [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
    for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)
]


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    path = make_study(folder)
    for name in ("text", "other"):
        rows = "\n".join(json.dumps({"messages": talk}) for talk in (TALKS if name == "text" else TALKS[::-1]))
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    config = yaml.safe_load(path.read_text())
    config["text"] |= {"format": "chat", "positions": ["assistant"], "context_size": 96, "tokens": 2048}
    config["changes"] = {"tokens_per_row": 96, "rows": 16}
    config["steering"] |= {"format": "chat", "system": "Be kind."}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    _template(folder / "tuned", FAMILIES["chatml"])
    return path


def _template(model: Path, template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    if template is None:
        (model / "chat_template.jinja").unlink(missing_ok=True)


def _changed(path: Path, **changes: Any) -> Study:
    config = yaml.safe_load(path.read_text())
    for section, keys in changes.items():
        config[section] |= keys
    other = path.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(config), encoding="utf-8")
    return Study.open(other)


def _refused(study: Study) -> str:
    with pytest.raises(SaeffectError) as caught:
        check_study(study)
    return str(caught.value)


def test_check_shows_a_conversation_as_it_is_read(study_file: Path) -> None:
    found = check_study(Study.open(study_file))
    lines = "\n".join(found.lines)
    assert "chats are written by the chat template of treatment's tokenizer; control has none of its own" in lines
    assert "at positions: assistant" in lines
    assert f" * assistant | {TALKS[0][1]['content']}" in lines and f"   user      | {TALKS[0][0]['content']}" in lines
    row = found.design.set_index("field").loc["chat_template"]
    assert row["status"] == "intended" and row["control"] == "none of its own" and row["treatment"] == "the study's"


def test_another_template_in_one_arm_is_a_flaw(study_file: Path) -> None:
    _template(study_file.parent / "base", FAMILIES["thinking"])
    try:
        row = check_study(Study.open(study_file)).design.set_index("field").loc["chat_template"]
        assert row["status"] == "flaw" and row["treatment"].startswith("another one")
    finally:
        _template(study_file.parent / "base", None)


def test_rows_and_prompts_of_the_study(study_file: Path) -> None:
    study = Study.open(study_file)
    rows, lm = study.rows(), study.reader
    assert rows.counts is not None and 0.1 < rows.counts.mean() < 0.6
    first = lm.encode_chat(TALKS[0])
    n = min(len(first.ids), rows.context_size)
    assert rows.ids[0, :n].tolist() == first.ids[:n]
    assert rows.counts[0, :n].tolist() == has_part(first.parts, ("assistant",))[:n].tolist()
    prompt = lm.tokenizer.decode(lm.encode_prompt(study.steering.prompts[0]))
    assert (
        prompt
        == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nThe river<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_identity_knows_template_and_positions(study_file: Path) -> None:
    whole = {
        Study.open(study_file).text_identity,
        _changed(study_file, text={"positions": "user"}).text_identity,
        _changed(study_file, text={"system": "Be brief."}).text_identity,
        _changed(study_file, text={"chat_template": FAMILIES["thinking"]}).text_identity,
    }
    assert len(whole) == 4


def test_a_template_in_a_file_beside_the_study(study_file: Path) -> None:
    (study_file.parent / "t.jinja").write_text(FAMILIES["thinking"], encoding="utf-8")
    study = _changed(study_file, text={"chat_template": "t.jinja"})
    assert study.chat is not None and study.chat.template == FAMILIES["thinking"]
    assert "t.jinja" in "\n".join(check_study(study).lines)


@pytest.mark.parametrize(
    ("text", "steering", "said"),
    [
        ({"positions": "system"}, {}, "is of system"),
        ({"chat_template": "none.jinja"}, {}, "none.jinja"),
        ({"chat_template": FAMILIES["gemma"], "system": "s"}, {"system": None}, "System role not supported"),
        ({}, {"positions": "user", "prompts": [[{"role": "assistant", "content": "x"}]]}, "no token of the prompt"),
        ({"chat_template": FAMILIES["gemma"]}, {}, "steering.prompts"),
        ({"sources": [{"name": "a", "path": "text.jsonl", "field": "talk"}]}, {}, "messages"),
    ],
)
def test_what_check_refuses(study_file: Path, text: dict[str, Any], steering: dict[str, Any], said: str) -> None:
    assert said in _refused(_changed(study_file, text=text, steering=steering))


def test_too_short_rows_for_what_is_compared(study_file: Path) -> None:
    study = _changed(study_file, changes={"tokens_per_row": 8})
    assert "changes.tokens_per_row" in _refused(study)


def test_the_run_counts_the_assistants_tokens(study_file: Path, tmp_path: Path) -> None:
    from saeffect.study.run import run_study

    few = {"max_features": 2, "samples": 1, "max_new_tokens": 4, "baselines": []}
    study = _changed(study_file, steering=few | {"positions": "assistant", "doses": [0.5], "search_prompts": []})
    run = run_study(study, tmp_path / "run")
    features = run.read_table(run.arm("control", "features.parquet"))
    counts = study.rows().counts
    assert counts is not None
    shares = features["n_active"] / features["density"]
    most = int(counts[:, 1:].sum())
    assert shares.dropna().round().between(0.5 * most, most).all()
    interventions = run.read_table(run.arm("control", "interventions.parquet"))
    assert (interventions["condition"] == "steered").any()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Be kind." in page
    assert "conversations, tokens at positions: assistant" in page
    assert "2 chats × 1 text, at positions: assistant" in page
