"""On a GPU (see `fake_cuda`) no tensor meets one of the CPU, and the numbers are those of the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from fake_cuda import fake_cuda
from saeffect import Study, load_sae, train_sae
from saeffect.sae.training.run import SaeRun
from saeffect.study.notebook import steer
from saeffect.study.pair_gate import GateRequest, gate_pair
from saeffect.study.stages.features import extract_features
from saeffect.study.stages.gate import measure_gate
from tiny_study import HOOK, make_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study")).parent


def _measure(folder: Path, device: str) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    config = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    config["arms"]["control"]["model"] = {"path": "./base", "device": device, "dtype": "float32"}
    path = folder / f"{device}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    study = Study.open(path)
    arm, rows = study.arms["control"], study.rows().head(4)
    assert arm.lm.device.type == device
    gate = measure_gate(arm, rows, study.config.gate)
    features = extract_features(arm, rows).features
    trials = steer(
        arm, features.head(1), rows, prompts=["The river"], doses=[0.5], samples=1, max_new_tokens=3, temperature=0.0
    )
    return gate, features, trials


def test_an_arm_is_measured_and_steered_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        gate, features, trials = _measure(folder, "cuda")
    own_gate, own_features, own_trials = _measure(folder, "cpu")
    assert {k: v for k, v in gate.items() if isinstance(v, float)} == pytest.approx(
        {k: v for k, v in own_gate.items() if isinstance(v, float)}, rel=1e-4, nan_ok=True
    )
    pd.testing.assert_frame_equal(features, own_features, rtol=1e-4)
    pd.testing.assert_frame_equal(trials, own_trials, rtol=1e-4)


def test_the_gate_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = GateRequest(
        str(folder / "base"),
        str(folder / "saes" / "control"),
        texts=(str(folder / "text.jsonl"),),
        hook=HOOK,
        tokens=256,
    )
    with fake_cuda(monkeypatch):
        on_gpu = gate_pair(request).table()["base"]
    own = gate_pair(request).table()["base"]  # in another dtype, where the processor has one
    assert on_gpu.notna().equals(own.notna())
    assert on_gpu["ce_clean"] == pytest.approx(own["ce_clean"], rel=0.05)
    assert on_gpu["l0"] == own["l0"]


def test_a_copy_on_the_gpu_follows_its_sae(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = load_sae(folder / "saes" / "control").requires_grad_(requires_grad=False)
    with fake_cuda(monkeypatch):
        there = sae.on(torch.device("cuda", 0))
        assert (there.W_dec.device.type, sae.W_dec.device.type) == ("cuda", "cpu")
        assert sae.on(torch.device("cuda", 0)) is there
        assert sae.on(sae.W_dec.device) is sae
        other = copy.copy(sae)
        assert other.on(torch.device("cuda", 0)) is not there


def test_saes_are_trained_on_the_models_device(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    begin = SaeRun.__init__

    def watched(self: SaeRun, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        devices.extend(leaf.device.type for leaf in self.trainer.leaves.values())

    monkeypatch.setattr(SaeRun, "__init__", watched)

    def trained(device: str) -> torch.Tensor:
        recipe = {
            "model": {"path": str(folder / "base"), "device": device, "dtype": "float32"},
            "hook": HOOK,
            "text": [{"name": "text", "path": str(folder / "text.jsonl")}],
            "tokens": 2048,
            "held_out_tokens": 128,
            "context_size": 32,
            "dtype": "float32",
            "sae": {"d_sae": 64, "k": 4, "batch_size": 128, "steps": 8, "checkpoint_every": 4, "evaluate_every": 8},
        }
        train_sae(recipe, tmp_path / device, work=tmp_path / f"work-{device}")
        return load_sae(tmp_path / device).W_dec.detach()

    with fake_cuda(monkeypatch):
        on_gpu = trained("cuda")
    assert set(devices) == {"cuda"}
    torch.testing.assert_close(on_gpu, trained("cpu"), rtol=1e-3, atol=1e-5)


def test_tensors_of_two_devices_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        x = torch.ones(2, device="cuda")
        assert (x + 1).tolist() == [2, 2]
        assert x[torch.tensor([0])].device.type == "cuda"
        for mixed in (lambda: x + torch.ones(2), lambda: torch.ones(2)[x > 0], lambda: x.numpy()):
            with pytest.raises(RuntimeError):
                mixed()
