"""`saeffect saes` and `saeffect convert-sae`."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import call
from hub_cache import HubCache
from saeffect.sae.formats import load_sae
from tiny_study import make_sae, make_study


def test_models_releases_and_saes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["saes"]) == 0
    shown = capsys.readouterr().out
    assert "google/gemma-2-2b " in shown and "openai-community/gpt2 " in shown and "MIT licence" in shown
    assert call(["saes", "--model", "google/gemma-2-2b"]) == 0
    shown = capsys.readouterr().out
    assert "gemma-scope-2b-pt-res-canonical" in shown and "blocks 0-25" in shown and "transcoders" in shown
    assert "gemma-scope-2b-pt-transcoders " not in shown
    assert call(["saes", "--release", "gpt2-small-res-jb", "--layer", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "saelens:gpt2-small-res-jb/",
        "  blocks.8.hook_resid_pre  blocks.8.hook_resid_pre  l0 60",
        "In a study, release and SAE:",
        "  sae: saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre",
    ]
    assert call(["saes", "--release", "temporal-sae-gemma-2-2b", "--all"]) == 0
    assert "not read: temporal SAE" in capsys.readouterr().out
    assert call(["saes", "--model", "gemma-2-2c"]) == 2
    assert "similar: google/gemma-2-2b" in capsys.readouterr().err


def test_lists_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--model", "gemma-2-2b"], ["--model", "gemma-2-2b", "--layer", "12"]):
        assert call(["saes", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        too_long = [line for line in lines if len(line) > 80 and "sae: saelens:" not in line]
        assert len(lines) > 10 and not too_long


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['saeffect', 'saes']; from saeffect.cli.app import main; main();"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.BytesIO()
    torch.save(
        {"W_enc": torch.eye(4, 9), "b_enc": torch.zeros(9), "W_dec": torch.eye(9, 4), "b_dec": torch.ones(4)}, out
    )
    (tmp_path / "7.pt").write_bytes(out.getvalue())
    command = ["convert-sae", str(tmp_path / "7.pt"), "--out", str(tmp_path / "sae")]
    assert call([*command, "--hook", "blocks.7.nothing"]) == 2
    assert "there is no hook kind 'nothing'" in capsys.readouterr().err and not (tmp_path / "sae").exists()
    assert call([*command, "--hook", "blocks.7.hook_resid_post", "--model", "me/mine"]) == 0
    assert "standard, 4 wide, 9 features, reads blocks.7.hook_resid_post" in capsys.readouterr().out
    cfg = load_sae(tmp_path / "sae").cfg
    assert (cfg.hook_name, cfg.metadata["model_name"]) == ("blocks.7.hook_resid_post", "me/mine")


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"])
def test_a_study_with_hub_saes_is_checked(
    hub: HubCache, tmp_path: Path, capsys: pytest.CaptureFixture[str], hook: str
) -> None:
    arms: dict[str, Any] = {}
    for index, (role, model) in enumerate({"control": "base", "treatment": "tuned"}.items()):
        make_sae(tmp_path / role, index, hook_name=hook)
        hub.add_folder("me/saes", role, tmp_path / role)
        arms[role] = {"role": role, "model": f"./{model}", "sae": f"hf:me/saes/{role}"}
    study = make_study(tmp_path / "study", arms=arms)
    assert call(["check", str(study)]) == 0
    assert f"arm control (control): topk SAE, 32 × 96, at {hook}" in capsys.readouterr().out
    arms["treatment"]["sae"] = "hf:me/saes/none"
    assert call(["check", str(make_study(tmp_path / "other", arms=arms))]) == 2
    told = capsys.readouterr().err
    assert "Unreachable: hf:me/saes/none is not in the hub's cache" in told and "arms.treatment.sae" in told
