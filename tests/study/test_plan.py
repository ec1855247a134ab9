"""What a study will take: every stage is there, numbers of tokens and operations are those of the stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from command_line import call
from saeffect.errors import ConfigError
from saeffect.lm.loading import resolve_dtype
from saeffect.steering.sampling import Sampling
from saeffect.study import rates
from saeffect.study.check import check_study
from saeffect.study.plan import Plan, plan_study
from saeffect.study.run import stage_keys
from saeffect.study.study import Study
from tiny_study import HOOK, make_study


@pytest.fixture(scope="module", autouse=True)
def _short() -> Any:
    """Measurements that are only as long as they must be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_MIN_SECONDS", 0.0)
        patch.setattr(rates, "_MIN_REPEATS", 1)
        patch.setattr(rates, "_FILE_BYTES", 1 << 20)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.open(make_study(tmp_path_factory.mktemp("plan"), push={"doses": [0.5, 1.0], "samples": 1}))


@pytest.fixture(scope="module")
def planned(tiny: Study) -> Plan:
    return plan_study(tiny)


def of(plan: Plan, stage: str) -> Any:
    return plan.table.set_index("stage").loc[stage]


def test_stages_are_those_of_the_run(tiny: Study, planned: Plan) -> None:
    assert planned.table["stage"].tolist() == ["start", *stage_keys(tiny)]
    assert (planned.table.drop(columns="stage") >= 0).all().all()
    assert (planned.table["seconds"] > 0).all()


def test_tokens_and_operations(tiny: Study, planned: Plan) -> None:
    # 1,024 tokens through the one block before the hook; the placebo has the control's model, so nothing is read again,
    # and where the trace read whole rows not even that.
    assert of(planned, "features control")["tokens"] == of(planned, "features placebo")["tokens"] == 0
    changes = tiny.config.changes.model_copy(update={"tokens_per_row": 8})
    planned = plan_study(Study(tiny.config.model_copy(update={"changes": changes}), tiny.source))
    features = of(planned, "features control")
    assert features["tokens"] == 1024
    assert of(planned, "features placebo")["tokens"] == 0
    block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32  # attention with half the key heads, MLP, two norms
    d_vocab = len(tiny.tokens.tokenizer)
    assert features["flop"] == 2 * (1024 * block + 32 * d_vocab * 96 + 1024 * 32 * 96)


def test_totals(planned: Plan) -> None:
    assert planned.total["seconds"] == pytest.approx(planned.table["seconds"].sum())
    assert planned.total["memory"] == planned.table["memory"].max()
    assert "steer control" in planned._repr_html_()


def test_pass_overhead_is_counted_once(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    # With one block and with three; then the unembedding, the softmax, and the draw.
    took = iter([0.012, 0.016, 0.0, 0.0, 0.012, 0.016, 0.5])
    monkeypatch.setattr(rates, "_seconds", lambda work, finish: next(took))
    measured = rates.ModelRates(tiny.config.arms["control"].model, context_size=32)
    assert measured.n_layers == 3
    n_tokens = 8 * 32
    assert (measured.layer * n_tokens, measured.start * n_tokens) == pytest.approx((0.002, 0.010))
    assert measured.step(4, Sampling(max_new_tokens=3)) == pytest.approx(0.010 + 3 * 0.002 + 0.5)


def test_a_busy_machine_is_told(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert any("keep this machine busy" in line for line in plan_study(tiny).lines)


def test_text_beyond_memory_is_read_again(tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeffect.lm.residuals.machine_memory", lambda: 8_000)
    assert of(plan_study(tiny), "features placebo")["tokens"] == 1024


def test_steering_is_shared_by_devices(tiny: Study) -> None:
    wide = tiny.config.model_copy(update={"steering": tiny.config.steering.model_copy(update={"batch_size": 7})})
    one, eight = (plan_study(Study(wide, tiny.source), gpus=n) for n in (1, 8))
    assert of(eight, "steer control")["tokens"] < of(one, "steer control")["tokens"] / 2
    assert of(eight, "features control")["tokens"] == of(one, "features control")["tokens"]
    with pytest.raises(ConfigError, match="at least one device"):
        plan_study(tiny, gpus=0)


def test_without_weights_and_with_saes_to_be_trained(tmp_path: Path) -> None:
    path = make_study(tmp_path)
    config = yaml.safe_load(path.read_text())
    for arm in config["arms"].values():
        arm |= {"sae": f"{arm['sae']}-new", "hook": HOOK}
    sae = {"d_sae": 96, "k": 6, "batch_size": 256, "epochs": 1}
    text = [{"name": "domain", "path": "./text.jsonl"}]
    config["training"] = {"text": text, "tokens": 2048, "held_out_tokens": 512, "context_size": 32, "sae": sae}
    path.write_text(yaml.safe_dump(config))
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    plan = plan_study(Study.open(path))
    assert plan.table["stage"].tolist()[:4] == [
        "train-sae control",
        "train-sae placebo",
        "train-sae treatment",
        "start",
    ]
    training = of(plan, "train-sae control")
    assert training["tokens"] == 2560
    width = resolve_dtype("auto", torch.device("cpu")).itemsize
    # Activations in the dtype of this processor; the SAE in float16; two checkpoints and a third, each of weights and both moments in float32.
    assert training["disk"] == 2560 * 32 * width + 2 * 32 * 96 * (2 + 3 * 12)


def test_the_command_is_one_screen(tiny: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plan", str(tiny.source), "--gpus", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("all ") and max(map(len, lines[-20:])) <= 80
    assert call(["plan", str(tiny.source), "--gpus", "0"]) == 2


def test_rows_beyond_the_model_are_refused(tiny: Study, complains: Callable[..., Any]) -> None:
    text = tiny.config.text.model_copy(update={"context_size": 256})
    study = Study(tiny.config.model_copy(update={"text": text}), tiny.source)
    for refuse in (plan_study, check_study):
        with complains(ConfigError, "rows of text have 256 tokens, but the model of control takes 128"):
            refuse(study)
