"""A new architecture, and a new file format, from outside the package: each is one place of under fifty lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for planted

from planted import planted_store, train_one

from saeffect.errors import BadFile
from saeffect.sae import ARCHITECTURES, SaeConfig, SparseAutoencoder, StandardSae
from saeffect.sae.formats import FORMATS, load_sae, read_sae_config
from saeffect.sae.trainable import StepInputs, StepResult, TrainableSae, squared_error
from saeffect.sae.training.config import SaeTrainingConfig, recipe_keys
from saeffect.sae.training.log import read_metrics


@pytest.fixture
def squares() -> Iterator[type[TrainableSae]]:
    """ReLU features, and a penalty on the squares of their activations."""

    class SquaredSae(TrainableSae):
        architecture, label = "squared", "Squared"
        keys = ("l1_coefficient",)
        penalty = "l1_coefficient"
        loss_parts = (("l2", "squares"),)

        def activation(self, hidden_pre: Tensor) -> Tensor:
            return hidden_pre.relu()

        @torch.no_grad()
        def accumulate_gradients(self, x: Tensor, step: StepInputs) -> StepResult:
            centred, weight = self.centred(x), step.coefficient / step.n_tokens
            entries = step.encoder.above(centred, self.W_rows, self.b_enc.data)
            sae_out = entries.decode(entries.values, self.W_dec.data) + self.b_dec.data
            d_out = (sae_out - x) * (2.0 / step.n_tokens)
            d_acts = entries.inner(d_out, self.W_dec.data) + 2 * weight * entries.values
            self.backward(entries, d_acts * (entries.values > 0), d_out, centred)
            losses = {"mse": squared_error(sae_out - x) / step.n_tokens, "l2": weight * entries.values.square().sum()}
            return StepResult(losses, entries.counts(), sae_out)

    yield SquaredSae
    del ARCHITECTURES["squared"]


def test_new_architecture_is_configured_trained_logged_and_loaded(squares: type[TrainableSae], tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store", 960)
    config = SaeTrainingConfig.read(
        {"architecture": "squared", "d_sae": 32, "batch_size": 64, "l1_coefficient": 0.1}, at="recipe.yaml"
    )
    trained = train_one(store, config, tmp_path / "sae", metadata={}, dtype="float32")
    loaded = load_sae(tmp_path / "sae")
    x = store.sample(50)
    assert type(loaded) is squares and torch.equal(loaded(x), trained(x))
    last = read_metrics(tmp_path / "sae")[-1]
    assert last["l2"] > 0 and last["loss"] == pytest.approx(last["mse"] + last["l2"])
    assert "Only for standard, gated, crosscoder_l1, squared." in recipe_keys()
    warm = SaeTrainingConfig(architecture="standard", d_sae=32, batch_size=64, steps=1, init_from=str(tmp_path / "sae"))
    train_one(store, warm, tmp_path / "warm", metadata={})


class ArrayFormat:
    """NumPy arrays in one archive."""

    weights = "arrays.npz"

    def matches(self, folder: Path, raw: Any) -> bool:
        return (folder / self.weights).is_file()

    def config(self, folder: Path, raw: Any, where: str) -> SaeConfig:
        return SaeConfig("standard", raw["width"], raw["features"], metadata={"hook_name": raw["hook"]})

    def load(self, folder: Path, raw: Any, where: str) -> SparseAutoencoder:
        sae = StandardSae(self.config(folder, raw, where))
        with np.load(folder / self.weights) as arrays, torch.no_grad():
            for name, parameter in sae.named_parameters():
                if arrays[name].shape != tuple(parameter.shape):
                    raise BadFile(f"{name} has another shape than cfg.json says.", at=where)
                parameter.copy_(torch.from_numpy(arrays[name]))
        return sae


def test_new_format_is_read_wherever_saes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = StandardSae(SaeConfig("standard", 3, 5))
    with torch.no_grad():
        sae.b_enc.fill_(0.5)
    np.savez(tmp_path / "arrays.npz", **{name: p.detach().numpy() for name, p in sae.named_parameters()})
    (tmp_path / "cfg.json").write_text('{"width": 3, "features": 5, "hook": "blocks.0.hook_resid_post"}')
    with pytest.raises(BadFile):
        load_sae(tmp_path)
    monkeypatch.setattr("saeffect.sae.formats.FORMATS", {"arrays": ArrayFormat(), **FORMATS})
    assert torch.equal(load_sae(tmp_path).encode(torch.zeros(1, 3)), torch.full((1, 5), 0.5))
    assert read_sae_config(tmp_path).hook_name == "blocks.0.hook_resid_post"


def test_cfg_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saeffect.sae import formats

    formats.save_sae(StandardSae(SaeConfig("standard", 3, 5)), tmp_path)
    read: list[Path] = []
    real = formats.read_json
    monkeypatch.setattr(formats, "read_json", lambda path: read.append(path) or real(path))
    load_sae(tmp_path)
    assert read == [tmp_path / "cfg.json"]
