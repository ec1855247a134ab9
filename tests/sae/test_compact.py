from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from saeffect.errors import BadFile, IncompatibleSae, NotFound
from saeffect.io import read_json, write_json
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats import is_compact, load_compact, load_sae, save_compact, save_sae
from saeffect.sae.topk import TopKSae

D_IN, D_SAE = 16, 40


@pytest.fixture
def sae() -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    sae = TopKSae(SaeConfig("topk", D_IN, D_SAE, k=4, metadata={"hook_name": "blocks.1.hook_resid_pre"}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture
def statistics() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"feature": range(D_SAE), "density": rng.random(D_SAE), "max_activation": 9.0})
    table["mean_activation"] = rng.random(D_SAE) + 1
    table.loc[3, ["density", "mean_activation", "max_activation"]] = [0.0, np.nan, 0.0]
    return table


@pytest.fixture
def folder(sae: SparseAutoencoder, statistics: pd.DataFrame, tmp_path: Path) -> Path:
    save_sae(sae, tmp_path / "whole")
    (tmp_path / "whole" / "README.md").write_text("a card\n\n![curves](training.png)\n", encoding="utf-8")
    return save_compact(sae, statistics, tmp_path / "whole", tmp_path / "compact")


def test_rows_come_back_within_half_a_step(sae: SparseAutoencoder, folder: Path) -> None:
    found = load_compact(folder)
    step = sae.W_dec.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((found.W_dec - sae.W_dec).abs() <= step / 2 * 1.001).all())
    assert bool((torch.cosine_similarity(found.W_dec, sae.W_dec, dim=1) > 0.9999).all())
    assert torch.equal(found.b_dec, sae.b_dec)
    assert found.cfg.hook_name == "blocks.1.hook_resid_pre" and found.cfg.k == 4
    card = (folder / "README.md").read_text()
    assert card.startswith("a card\n") and "compact form" in card and "training.png" not in card


def test_by_hand(tmp_path: Path, statistics: pd.DataFrame) -> None:
    sae = TopKSae(SaeConfig("topk", 2, 2, k=1))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[12.7, -0.24], [0.0, 0.0]]))
    save_sae(sae, tmp_path / "whole")
    save_compact(sae, statistics.head(2), tmp_path / "whole", tmp_path / "compact")
    stored = load_file(tmp_path / "compact" / "decoder.safetensors")
    assert stored["W_dec"].tolist() == [[127, -2], [0, 0]]
    torch.testing.assert_close(load_compact(tmp_path / "compact").W_dec, torch.tensor([[12.7, -0.2], [0.0, 0.0]]))


def test_statistics_come_back(statistics: pd.DataFrame, folder: Path) -> None:
    found = load_compact(folder).statistics
    assert found["feature"].tolist() == list(range(D_SAE))
    for name in ("density", "mean_activation", "max_activation"):
        np.testing.assert_allclose(found[name], statistics[name], rtol=1e-6)
    assert np.isnan(found.loc[3, "mean_activation"])


def test_compact_is_a_quarter_of_the_size(folder: Path, tmp_path: Path) -> None:
    assert is_compact(folder) and not is_compact(tmp_path / "whole")
    assert load_file(folder / "decoder.safetensors")["W_dec"].dtype == torch.int8


def test_compact_sae_cannot_be_loaded_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="its decoder alone"):
        load_sae(folder)
    with pytest.raises(NotFound, match="is it a whole SAE"):
        load_compact(tmp_path / "whole")


def test_a_decoder_that_diverged(sae: SparseAutoencoder, statistics: pd.DataFrame, tmp_path: Path) -> None:
    with torch.no_grad():
        sae.W_dec[0, 0] = torch.nan
    with pytest.raises(BadFile, match="NaN"):
        save_compact(sae, statistics, tmp_path, tmp_path / "out")


def test_truncated(folder: Path) -> None:
    file = folder / "decoder.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadFile, match="cannot be read"):
        load_compact(folder)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scale", None, BadFile),
        ("scale", torch.full((D_SAE,), torch.inf), BadFile),
        ("density", torch.zeros(3), IncompatibleSae),
        ("W_dec", torch.zeros(D_SAE, 3, dtype=torch.int8), IncompatibleSae),
    ],
)
def test_malformed(folder: Path, name: str, value: torch.Tensor | None, error: type[Exception]) -> None:
    tensors = load_file(folder / "decoder.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "decoder.safetensors")
    with pytest.raises(error, match=name):
        load_compact(folder)


def test_a_configuration_of_another_width(folder: Path) -> None:
    cfg = read_json(folder / "cfg.json")
    write_json(folder / "cfg.json", cfg | {"d_sae": D_SAE + 1})
    with pytest.raises(IncompatibleSae, match="asks for"):
        load_compact(folder)
