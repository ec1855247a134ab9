"""Null fine-tunes: made, resumed, extended, measured and read by a study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from saeffect.diffing.nulls import kept_adapters, pooled_p, read_nulls
from saeffect.diffing.standardised import raw_changes
from saeffect.diffing.trace import ENCODER
from saeffect.errors import ConfigError
from saeffect.io import sole_writer
from saeffect.lm.finetune import FinetuneConfig
from saeffect.progress import Log
from saeffect.study import nulls
from saeffect.study.check import check_study
from saeffect.study.nulls import make_nulls, null_recipe
from saeffect.study.run import run_study
from saeffect.study.stages.changes import _recipe_table, read_trace
from saeffect.study.study import Study
from tiny_study import make_study

STAGES = ("gate", "features", "coherence", "select", "match", "changes")


class Killed(BaseException):
    """Stands in for a process that ends here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study in which nothing is steered, with a recipe of its control."""
    folder = tmp_path_factory.mktemp("nulls")
    make_study(folder, steering=None, changes={"rows": 8, "tokens_per_row": 16})
    return folder


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nulls, "_BATCH", 6)
    monkeypatch.setattr(nulls, "_TEXT_LENGTH", 48)


def _recipe(folder: Path, **changes: Any) -> FinetuneConfig:
    values = {
        "model": str(folder / "base"),
        "text": str(folder / "text.jsonl"),
        "control_text": str(folder / "other.jsonl"),
        "held_out": 0.2,
        "rank": 2,
        "steps": 4,
        "batch_size": 2,
        "context_size": 16,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "evaluation_rows": 2,
    }
    return FinetuneConfig.read(values | changes, at="recipe")


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """Two nulls, made in one go."""
    patch = pytest.MonkeyPatch()
    patch.setattr(nulls, "_BATCH", 6)
    patch.setattr(nulls, "_TEXT_LENGTH", 48)
    result = make_nulls(_recipe(folder), folder / "nulls", 2, study=Study.open(folder / "study.yaml"))
    patch.undo()
    assert result.measured == (1, 2)
    return folder / "nulls"


def _arrays(folder: Path) -> list[np.ndarray]:
    return [getattr(trace, name) for trace in read_nulls(folder) for name in ("read", "kl", "texts", "layers")]


def _same(one: Path, other: Path) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(_arrays(one), _arrays(other), strict=True))


def test_only_traces_texts_and_the_card_stay(made: Path) -> None:
    names = {path.name for path in made.iterdir()} - {".saeffect-lock"}
    assert names == {"nulls.json", "own.jsonl", "null-1.safetensors", "null-2.safetensors"}


def test_the_card_says_what_each_null_is(made: Path, folder: Path) -> None:
    text = (made / "nulls.json").read_text(encoding="utf-8")
    card = json.loads(text)
    assert str(folder) not in text
    assert [card["nulls"][k]["text"] for k in "12"] == [
        "the base model's own samples",
        "the base model's own samples",
    ]
    assert [card["nulls"][k]["seed"] for k in "12"] == [1, 2]
    assert all(len(pair) == 2 and min(pair) >= 1 for pair in card["nulls"]["2"]["perplexity"].values())
    assert set(card["measured_on"]) == {"base model", "SAE", ENCODER, "hook", "text"}
    assert card["recipe"]["rank"] == 2


def test_nulls_differ_from_each_other_and_base(made: Path) -> None:
    one, two = read_nulls(made)
    assert one.numbers["kl"] > 0
    assert not np.array_equal(one.read[1], two.read[1])
    assert not np.array_equal(one.kl, two.kl)


def test_each_null_draws_its_own_texts(folder: Path) -> None:
    recipe, own = _recipe(folder, seed=5), Path("own.jsonl")
    first, second = null_recipe(recipe, 1, own), null_recipe(recipe, 2, None)
    assert (first.seed, second.seed) == (6, 7)
    assert first.text.path == str(own)
    assert second.text == recipe.control_text
    assert first.control_text == second.control_text == recipe.text


def test_general_text_for_nulls_must_be_there(folder: Path, tmp_path: Path, complains: Callable[..., Any]) -> None:
    recipe = _recipe(folder).model_copy(update={"control_text": None})
    with complains(ConfigError, "no control_text"):
        make_nulls(recipe, tmp_path / "nulls", 1, text="general")
    assert not (tmp_path / "nulls").exists()


@pytest.mark.parametrize("at", ["step 2/4", "writing with null-2"])
def test_a_killed_run_ends_with_the_same_nulls(folder: Path, made: Path, tmp_path: Path, at: str) -> None:
    study = Study.open(folder / "study.yaml")

    def kill(line: str) -> None:
        if at in line and ("null 2" in line or "null-2" in line):
            raise Killed

    with pytest.raises(Killed):
        make_nulls(_recipe(folder), tmp_path / "n", 2, study=study, log=Log(kill))
    lines: list[str] = []
    make_nulls(_recipe(folder), tmp_path / "n", 2, study=study, log=Log(lines.append))
    assert not [line for line in lines if line.startswith("null 1")]  # finished before
    assert _same(tmp_path / "n", made)


@pytest.mark.parametrize("damaged", [False, True])
def test_resumes_after_a_kill_while_writing_texts(
    folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    written = nulls._write_batch

    def second_fails(lm: Any, index: int) -> list[str]:
        if index == 1:
            raise Killed
        return written(lm, index)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(nulls, "_write_batch", second_fails)
        make_nulls(_recipe(folder, steps=8), tmp_path / "n", 1)
    if damaged:
        (tmp_path / "n" / "own" / "0.json").write_text('["half')
    asked: list[int] = []
    monkeypatch.setattr(nulls, "_write_batch", lambda lm, index: asked.append(index) or written(lm, index))
    make_nulls(_recipe(folder, steps=8), tmp_path / "n", 1)
    first = 0 if damaged else 1
    assert len(asked) > 1
    assert asked == list(range(first, len(asked) + first)), "the first batch is kept"


def test_adapters_made_without_a_study_are_measured_later(folder: Path, made: Path, tmp_path: Path) -> None:
    recipe = _recipe(folder)
    assert make_nulls(recipe, tmp_path / "n", 1).trained == (1,)
    assert (tmp_path / "n" / "adapters" / "null-1" / "lora" / "adapter_model.safetensors").is_file()
    again = make_nulls(recipe, tmp_path / "n", 2, study=Study.open(folder / "study.yaml"), keep_adapters=True)
    assert again.measured == (1, 2)  # and one more is added
    assert (tmp_path / "n" / "adapters" / "null-1" / "lora" / "adapter_model.safetensors").is_file()
    assert _same(tmp_path / "n", made)


def test_adapters_of_finished_nulls_are_made_when_they_are_to_be_kept(folder: Path, made: Path, tmp_path: Path) -> None:
    """Also if that is stopped; the traces stay the same, to the byte, and nothing is trained twice."""
    out, study = Path(shutil.copytree(made, tmp_path / "n")), Study.open(folder / "study.yaml")
    files = [f"null-{k}.safetensors" for k in (1, 2)]
    assert not kept_adapters(out)

    def kill(line: str) -> None:
        if "null 2" in line and "step 2/4" in line:
            raise Killed

    with pytest.raises(Killed):
        make_nulls(_recipe(folder), out, 2, study=study, keep_adapters=True, log=Log(kill))
    assert list(kept_adapters(out)) == ["null-1"]
    assert make_nulls(_recipe(folder), out, 2, study=study).measured == (1, 2)  # with traces alone as before
    lines: list[str] = []
    for _ in range(2):
        result = make_nulls(_recipe(folder), out, 2, study=study, keep_adapters=True, log=Log(lines.append))
        assert result.measured == (1, 2)
    assert list(kept_adapters(out)) == ["null-1", "null-2"]
    assert not [line for line in lines if line.startswith("null 1")]
    assert len([line for line in lines if line == "null 2: the base model's own samples"]) == 1
    assert [(out / name).read_bytes() for name in files] == [(made / name).read_bytes() for name in files]
    cards = [json.loads((place / "nulls.json").read_text(encoding="utf-8")) for place in (out, made)]
    for card in cards:
        for null in card["nulls"].values():
            del null["minutes"]
    assert cards[0] == cards[1]


def test_another_process_keeps_its_null(folder: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "n" / "adapters" / "null-1"):
        result = make_nulls(_recipe(folder), tmp_path / "n", 2)
    assert (result.trained, result.elsewhere) == ((2,), (1,))


def test_a_damaged_null_is_made_again(folder: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "n")
    (tmp_path / "n" / "null-2.safetensors").write_bytes(b"no tensors")
    make_nulls(_recipe(folder), tmp_path / "n", 2, study=Study.open(folder / "study.yaml"))
    assert _same(tmp_path / "n", made)


def test_refusals_say_what_differs(folder: Path, made: Path, complains: Callable[..., Any], tmp_path: Path) -> None:
    study = Study.open(folder / "study.yaml")
    with complains(ConfigError, "at least one null"):
        make_nulls(_recipe(folder), made, 0)
    with complains(ConfigError, "another recipe", "rank: 2 there, 4 here"):
        make_nulls(_recipe(folder, rank=4), made, 2, study=study)
    with complains(ConfigError, "no study is given"):
        make_nulls(_recipe(folder), made, 2)
    with complains(ConfigError, "another model"):
        make_nulls(_recipe(folder, model=str(folder / "tuned")), tmp_path / "n", 1, study=study)
    with complains(ConfigError, "another text", "not trained again"):
        make_nulls(_recipe(folder), made, 2, study=_study(folder, changes={"rows": 4, "tokens_per_row": 16}))
    shutil.copytree(made, tmp_path / "bare")
    (tmp_path / "bare" / "nulls.json").unlink()
    with complains(ConfigError, "no nulls.json"):
        make_nulls(_recipe(folder), tmp_path / "bare", 2, study=study)
    assert not (tmp_path / "n").exists()


def test_nulls_of_another_encoder_are_refused(folder: Path, made: Path, complains: Callable[..., Any]) -> None:
    """The decoder may stay while thresholds or encoder are trained on."""
    nulls = shutil.copytree(made, folder / "of another encoder")
    card = json.loads((nulls / "nulls.json").read_text(encoding="utf-8"))
    card["measured_on"][ENCODER] = "0" * 64
    (nulls / "nulls.json").write_text(json.dumps(card), encoding="utf-8")
    with complains(ConfigError, "null-1.safetensors was measured on another SAE's encoder"):
        check_study(_study(folder, nulls="./of another encoder"))
    with complains(ConfigError, "another SAE's encoder"):
        make_nulls(_recipe(folder), nulls, 3, study=_study(folder))
    del card["measured_on"][ENCODER]  # made before it was recorded
    (nulls / "nulls.json").write_text(json.dumps(card), encoding="utf-8")
    assert "nulls: 2" in _lines(_study(folder, nulls="./of another encoder"))


def _study(folder: Path, **changes: Any) -> Study:
    values = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8")) | changes
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return Study.open(path)


def _lines(study: Study) -> str:
    return "\n".join(check_study(study).lines)


def test_check_counts_the_nulls(folder: Path, made: Path, tmp_path: Path, complains: Callable[..., Any]) -> None:
    assert "nulls: none" in _lines(_study(folder))
    assert "nulls: 2; by counting them alone p is never below 0.33" in _lines(_study(folder, nulls="./nulls"))
    one = folder / "one"
    one.mkdir(exist_ok=True)
    shutil.copy(made / "null-1.safetensors", one)
    assert "never below 0.5" in _lines(_study(folder, nulls="./one"))
    with complains(ConfigError, "another text"):
        check_study(_study(folder, nulls="./nulls", changes={"rows": 4, "tokens_per_row": 16}))
    with complains(ConfigError, "another base model, SAE, hook or text"):
        check_study(_study(folder, nulls="./one", changes={"rows": 4, "tokens_per_row": 16}))


def test_check_refuses_missing_empty_and_damaged_folders(folder: Path, complains: Callable[..., Any]) -> None:
    from saeffect.errors import BadFile, EmptySelection, NotFound, UnknownName

    with complains(NotFound, "no folder of nulls", "saeffect finetune RECIPE --null"):
        check_study(_study(folder, nulls="./nowhere"))
    (folder / "empty").mkdir()
    with complains(EmptySelection, "holds no null-"):
        check_study(_study(folder, nulls="./empty"))
    (folder / "empty" / "null-1.safetensors").write_bytes(b"no tensors")
    with complains(BadFile, "cannot be read"):
        check_study(_study(folder, nulls="./empty"))
    with complains(UnknownName, "nobody"):
        check_study(_study(folder, nulls="bundled:nobody"))


def test_a_study_without_nulls_gives_their_cost(folder: Path, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "before", tmp_path / "run")
    run = run_study(_study(folder), tmp_path / "run", stages=STAGES)
    table = pd.read_parquet(run.path("comparison", "changes.parquet"))
    assert table["p"].isna().all()
    assert table["reason"].str.contains("saeffect finetune RECIPE --null 20 --study").all()
    assert run.path("comparison", "trace.safetensors").is_file()
    assert set(table["basis"]) == {"read", "written", "expected", "difference", "combined"}


def test_a_study_with_nulls_judges_every_feature(folder: Path, made: Path, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "before", tmp_path / "run")
    lines: list[str] = []
    run = run_study(_study(folder, nulls="./nulls"), tmp_path / "run", stages=STAGES, log=Log(lines.append))
    first = "a first finding: given no subject, treatment writes clearly more often than nulls: no word"
    assert any(first in line for line in lines)  # two nulls are too few for any
    table = pd.read_parquet(run.path("comparison", "changes.parquet"))
    apart = table["basis"] == "combined"  # which two nulls are too few for
    assert table.loc[~apart, "p"].notna().all()
    assert table.loc[apart, "p"].isna().all()
    ranked = table[table["p"].notna()]
    assert (ranked["p"] >= ranked["smallest_p"] * (1 - 1e-12)).all()
    assert ranked["smallest_p"].notna().all()
    assert (table["n_nulls"] == 2).all()
    assert (table.loc[~apart, "q"] >= table.loc[~apart, "p"]).all()
    # p is of the changes that z is of. What is read here was rounded on the way to its file.
    features = pd.read_parquet(run.arm("control", "features.parquet")).sort_values("feature")
    top, trace = np.stack(features["top_token_ids"].to_list()), read_trace(run)
    own, *others = (raw_changes(one, top)["expected"] for one in (trace, *read_nulls(made)))
    expected = table[table["basis"] == "expected"].sort_values("feature")["p"]
    assert np.abs(expected - pooled_p(own, np.array(others), trace.read[2]).p).mean() < 0.02
    recipe = pd.read_parquet(run.path("comparison", "null_recipe.parquet")).set_index("setting")
    assert recipe.loc["batch_size", "nulls"] == "2" and recipe.loc["batch_size", "tuned"] == ""
    assert recipe["differs"].isna().all()  # a whole model, which does not say how it was trained


def test_recipes_of_nulls_and_fine_tune_are_compared(made: Path) -> None:
    recipe = {"steps": 4, "batch_size": 8, "rank": 2, "learning_rate": 0.01}
    found = _recipe_table({"recipe": recipe}, made).set_index("setting")
    assert found.loc[["steps", "batch_size", "learning_rate"], "differs"].tolist() == [False, True, False]
    assert pd.isna(found.loc["alpha", "differs"])
    assert _recipe_table({"recipe": "damaged"}, made)["differs"].isna().all()
