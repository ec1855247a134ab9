"""The playground's texts are those of the study's own steering."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from saeffect.errors import ConfigError, NotFound, SaeffectError, Undefined
from saeffect.lm.hooks import capture
from saeffect.steering import load_text_vectors, run_trials
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.dose_search import site_of
from saeffect.study.study import Study
from saeffect.web.play.ask import Ask
from saeffect.web.play.engine import Engine, features_to_steer

PROMPT = "The doctor"


@pytest.fixture(scope="module")
def run(site_run: Path) -> RunFolder:
    return RunFolder(site_run, Study.open(site_run / "study.yaml"))


@pytest.fixture(scope="module")
def engine(run: RunFolder) -> Engine:
    return Engine(lambda: run)


def result(engine: Engine, ask: Ask) -> dict[str, Any]:
    *_, last = engine.answer(ask)
    assert last["type"] == "done"
    return last["result"]


def active(run: RunFolder, arm: str, n: int = 1) -> tuple[int, ...]:
    table = run.read_table(run.arm(arm, "features.parquet")).sort_values("max_activation", ascending=False)
    return tuple(int(f) for f in table["feature"].head(n))


@pytest.mark.parametrize(
    "changes",
    [
        {"placebo": "matched"},
        {"placebo": "random", "dose": 1.5, "positions": "generated"},
        {"operator": "clamp", "dose": 5.0, "placebo": "random"},
        {"operator": "ablate", "ends": True},
        {"n": 3, "placebo": "matched", "seed": 5},
    ],
)
def test_texts_equal_those_of_run_trials(run: RunFolder, engine: Engine, changes: dict[str, Any]) -> None:
    features = active(run, "treatment", changes.pop("n", 1))
    given = {"max_new_tokens": 12, "top_p": 1.0, "ends": False} | changes
    ask = Ask(prompt=PROMPT, arm="treatment", features=features, **given)
    found = result(engine, ask)["sides"][1]
    trials = run_trials(
        site_of(run, run.study.open_arm("treatment")),
        features_to_steer(run, ask),
        ask.plan(PROMPT),
        vectors=load_text_vectors("glove-wiki-gigaword-100"),
    )
    assert {row["condition"]: row["text"] for row in found["rows"]} == dict(
        zip(trials["condition"], trials["text"], strict=True)
    )
    assert found["name"] == "treatment" and all(
        "".join(t for t, _ in row["tokens"]) == row["text"] for row in found["rows"]
    )


def test_tints_are_the_features_activations_on_the_text_itself(run: RunFolder, engine: Engine) -> None:
    features = active(run, "control", 2)
    ask = Ask(prompt=PROMPT, arm="control", features=features, dose=3.0, max_new_tokens=8, top_p=1.0, ends=False)
    steps = list(engine.answer(ask))
    side = steps[-1]["result"]["sides"][0]
    arm = run.study.open_arm("control")
    ids = arm.lm.encode_prompt(PROMPT)
    steered = next(row for row in side["rows"] if row["condition"] == "steered")
    # Read again without any push: the text makes the features as active as the page says.
    text = ids + [arm.lm.tokenizer.convert_tokens_to_ids(t) for t in arm.lm.tokenizer.tokenize(steered["text"])]
    x = capture(arm.lm, arm.hook, torch.tensor([text]))[0]
    acts = arm.sae.encode(x)[:, list(features)]
    assert [a for _, a in side["prompt"]] == [pytest.approx(row, abs=1e-3) for row in acts[: len(ids)].tolist()]
    if arm.lm.decode(text[len(ids) :]) == steered["text"] and len(text) == len(ids) + 8:
        assert [a for _, a in steered["tokens"]] == [pytest.approx(row, abs=1e-3) for row in acts[len(ids) :].tolist()]
    streamed = [event for event in steps if event["type"] == "tokens" and event["side"] == "control"]
    row = side["rows"].index(steered)
    assert [e["acts"][row] for e in streamed if e["acts"] and e["acts"][row] is not None] == [
        a for _, a in steered["tokens"]
    ]


def test_without_features_both_models_answer_unsteered(engine: Engine) -> None:
    found = result(engine, Ask(prompt=PROMPT, max_new_tokens=4))
    assert [[row["condition"] for row in side["rows"]] for side in found["sides"]] == [["unsteered"]] * 2
    assert found["scale"] == []


def test_a_stopped_answer_leaves_the_models_as_they_were(run: RunFolder, engine: Engine) -> None:
    ask = Ask(prompt=PROMPT, arm="control", features=active(run, "control"), max_new_tokens=6, top_p=1.0)
    whole = result(engine, ask)
    stopped: Iterator[dict[str, Any]] = engine.answer(ask)
    for _ in range(4):
        next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    assert result(engine, ask) == whole


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"arm": "control", "features": (10**6,)}, ConfigError, "no feature 1000000"),
        ({"arm": "nobody", "features": (1,)}, ConfigError, "no arm 'nobody'"),
        ({"chat": True}, ConfigError, "chat template"),
        ({"prompt": "river " * 200}, ConfigError, "reads 128"),
    ],
)
def test_what_cannot_be_done_is_said(
    engine: Engine, changes: dict[str, Any], error: type[SaeffectError], said: str
) -> None:
    with pytest.raises(error, match=said):
        list(engine.answer(Ask(**({"prompt": PROMPT} | changes))))


def test_a_silent_feature_cannot_be_clamped(run: RunFolder, engine: Engine) -> None:
    table = run.read_table(run.arm("control", "features.parquet"))
    silent = table.loc[~(table["max_activation"] > 0), "feature"]
    if silent.empty:
        pytest.skip("every feature of this run fires")
    ask = Ask(prompt=PROMPT, arm="control", features=(int(silent.iloc[0]),), operator="clamp", dose=2.0)
    with pytest.raises(Undefined, match="never fired"):
        list(engine.answer(ask))


def test_a_feature_that_fits_one_model_alone_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacle = "the models differ in depth (control reads blocks.2.hook_resid_pre)"
    monkeypatch.setattr(
        "saeffect.web.play.engine.size_obstacle", lambda _, arm, other: obstacle if other != arm else ""
    )
    with pytest.raises(ConfigError, match=r"differ in depth .* cannot be added to both"):
        list(engine.answer(Ask(arm="control", features=(3,), prompt="The river")))


def test_two_models_that_do_not_fit_are_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeffect.web.play.engine.machine_memory", lambda: 100_000)
    engine = Engine(lambda: run)
    with pytest.raises(ConfigError, match="do not fit into this machine"):
        list(engine.warm())
    assert engine.state["state"] == "failed"


def test_missing_model_is_a_state_and_can_recover(run_copy: Path) -> None:
    file = run_copy / "study.yaml"
    whole = file.read_text(encoding="utf-8")
    model = next(line.split(": ")[1] for line in whole.splitlines() if line.strip().startswith("path:"))
    file.write_text(whole.replace(model, model + "-gone"), encoding="utf-8")
    runs = {"now": RunFolder(run_copy, Study.open(file))}
    engine = Engine(lambda: runs["now"])
    with pytest.raises(NotFound):
        list(engine.warm())
    assert engine.state["state"] == "failed" and "gone" in engine.state["what"] and engine.state["fix"]
    file.write_text(whole, encoding="utf-8")
    runs["now"] = RunFolder(run_copy, Study.open(file))
    assert result(engine, Ask(prompt=PROMPT, max_new_tokens=2))["sides"]
    assert engine.state["state"] == "ready"
