"""An SAE that starts from another one is that one, as far as its architecture can be; features keep their index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saeffect.errors import IncompatibleSae, NotFound
from saeffect.sae.base import SaeConfig
from saeffect.sae.batchtopk import BatchTopKSae
from saeffect.sae.formats import load_sae, save_sae
from saeffect.sae.gated import GatedSae
from saeffect.sae.jumprelu import JumpReluSae
from saeffect.sae.matryoshka import MatryoshkaSae
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae
from saeffect.sae.trainable import TrainableSae
from saeffect.sae.training.run import copy_weights

D_IN, D_SAE, K, SCALE = 6, 20, 3, 2.5
X = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(9))
KINDS = {kind.architecture: kind for kind in (StandardSae, TopKSae, BatchTopKSae, JumpReluSae, GatedSae, MatryoshkaSae)}
RAW = {"apply_b_dec_to_input": False}
CENTRED = {"centre_input": True}
RESCALED = {"rescale_acts_by_decoder_norm": True}


def _sae(architecture: str, seed: int = 0, **options: Any) -> Any:
    k = K if architecture in ("topk", "batchtopk", "matryoshka") else None
    sae = KINDS[architecture](SaeConfig(architecture, D_IN, D_SAE, k=k, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(sae.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator))
            if name == "threshold":
                p.abs_()
        if isinstance(sae, BatchTopKSae):
            sae.topk_threshold.fill_(0.9)
    return sae


def _started(source: Any, sae: TrainableSae, folder: Path, **options: Any) -> Any:
    """What training would save if it took no step."""
    save_sae(source, folder)
    copy_weights(folder, sae, SCALE, **options)
    return sae


SAME = [
    ("standard", {}, "standard", {}),
    ("standard", {}, "standard", RAW),
    ("topk", {}, "topk", {}),
    ("topk", RAW, "topk", {}),
    ("topk", RESCALED, "topk", {}),
    ("topk", RESCALED, "topk", RESCALED),
    ("jumprelu", {}, "jumprelu", {}),
    ("jumprelu", {}, "jumprelu", RAW),
    ("batchtopk", {}, "jumprelu", {}),
    ("batchtopk", {}, "batchtopk", {}),
    ("batchtopk", RESCALED, "batchtopk", {}),
    ("batchtopk", RESCALED, "batchtopk", RESCALED),
    ("batchtopk", {}, "matryoshka", RAW),
    ("matryoshka", RESCALED, "batchtopk", RESCALED),
    ("gated", {}, "gated", {}),
    ("gated", {}, "gated", RAW),
    ("gated", RAW, "gated", {}),
    ("gated", {}, "jumprelu", {}),
    ("gated", {}, "jumprelu", RAW),
    ("jumprelu", {}, "gated", {}),
    ("jumprelu", RAW, "gated", {}),
    ("standard", {}, "gated", RAW),
    ("jumprelu", CENTRED, "jumprelu", CENTRED | RAW),
]


# Ranking by activation, or one threshold for all, is another thing once lengths have moved into the encoder.
RANKED = ("topk", "batchtopk", "matryoshka")
UNIT_TOO = [case for case in SAME if case[2] not in RANKED or case[1].get("rescale_acts_by_decoder_norm")]


@pytest.mark.parametrize(
    ("source", "source_options", "target", "options", "unit_decoder"),
    [(*case, False) for case in SAME] + [(*case, True) for case in UNIT_TOO],
)
def test_zero_steps_keep_the_source(
    tmp_path: Path,
    source: str,
    source_options: dict[str, Any],
    target: str,
    options: dict[str, Any],
    unit_decoder: bool,
) -> None:
    original = _sae(source, **source_options)
    sae = _started(original, _sae(target, seed=1, **options), tmp_path, unit_decoder=unit_decoder)
    expected = load_sae(tmp_path)
    assert 0 < (expected.encode(X) > 0).sum() < X.shape[0] * D_SAE
    if unit_decoder:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    scaled = sae.for_inference()
    torch.testing.assert_close(scaled(X * SCALE) / SCALE, expected(X), rtol=1e-4, atol=1e-4)
    assert torch.equal(scaled.encode(X * SCALE) > 0, expected.encode(X) > 0)
    sae.fold_scale(SCALE)
    folded = sae.for_inference()
    torch.testing.assert_close(folded(X), expected(X), rtol=1e-4, atol=1e-4)
    if not unit_decoder and source_options == options == {}:
        torch.testing.assert_close(folded.encode(X), expected.encode(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_features_keep_their_index(tmp_path: Path, source: str, target: str) -> None:
    original = _sae(source)
    sae = _sae(target, seed=1)
    leaves = sae.leaves()  # what the optimizer holds may exist already
    _started(original, sae, tmp_path)
    torch.testing.assert_close(sae.W_dec, original.W_dec)
    torch.testing.assert_close(sae.b_dec, original.b_dec * SCALE)
    directions = torch.nn.functional.cosine_similarity(sae.W_rows, original.W_rows)
    torch.testing.assert_close(directions, torch.ones(D_SAE))
    for name, leaf in leaves.items():
        parameter = sae.get_parameter(name)
        assert leaf.data_ptr() == parameter.data_ptr()
        assert torch.equal(leaf, parameter.T if name == "W_enc" else parameter)


@pytest.mark.parametrize("source", ["standard", "topk"])
def test_what_has_no_threshold(tmp_path: Path, source: str) -> None:
    """A JumpReLU SAE keeps the thresholds it would start with, in units of scaled inputs; BatchTopK starts at 0."""
    original, jump = _sae(source), _sae("jumprelu", seed=1)
    with torch.no_grad():
        jump.threshold.fill_(0.01)
    _started(original, jump, tmp_path)
    assert (jump.threshold == torch.tensor(0.01)).all()
    torch.testing.assert_close(jump.b_enc, original.b_enc * SCALE)
    batch = _started(original, _sae("batchtopk", seed=1), tmp_path)
    assert float(batch.topk_threshold) == 0.0


def test_many_thresholds_become_their_median(tmp_path: Path) -> None:
    original = _sae("jumprelu")
    median = original.threshold.median().item()
    sae = _started(original, _sae("batchtopk", seed=1), tmp_path)
    assert float(sae.topk_threshold) == pytest.approx(median * SCALE, rel=1e-6)
    contribution = (original.threshold * original.W_dec.norm(dim=1)).median().item()
    sae = _started(original, _sae("matryoshka", seed=1, **RESCALED), tmp_path)
    assert float(sae.topk_threshold) == pytest.approx(contribution * SCALE, rel=1e-6)


def test_open_gates_give_no_threshold(tmp_path: Path) -> None:
    gated = _sae("gated")
    with torch.no_grad():
        gated.b_gate.fill_(50.0)
    sae = _started(gated, _sae("jumprelu", seed=1), tmp_path)
    assert (sae.threshold == 0).all()
    torch.testing.assert_close(sae(X * SCALE) / SCALE, gated(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "shape"), [("d_in", (D_IN + 1, D_SAE)), ("d_sae", (D_IN, D_SAE + 1))])
def test_another_size(tmp_path: Path, complains: Callable[..., Any], name: str, shape: tuple[int, int]) -> None:
    save_sae(_sae("standard"), tmp_path)
    sae = StandardSae(SaeConfig("standard", *shape))
    with complains(IncompatibleSae, f"has {name}=", "but the one to be trained has", at="init_from"):
        copy_weights(tmp_path, sae, SCALE, at="init_from")
    assert not any(p.any() for p in sae.parameters())


def test_another_normalisation(tmp_path: Path, complains: Callable[..., Any]) -> None:
    save_sae(_sae("standard", normalize_activations="layer_norm"), tmp_path)
    with complains(IncompatibleSae, "normalize_activations='layer_norm'", at=str(tmp_path)):
        copy_weights(tmp_path, _sae("standard"), SCALE)
    save_sae(_sae("standard", **CENTRED), tmp_path)
    with complains(IncompatibleSae, "centre_input=True", "set centre_inputs: true", at=str(tmp_path)):
        copy_weights(tmp_path, _sae("standard"), SCALE)


def test_no_such_folder(tmp_path: Path, complains: Callable[..., Any]) -> None:
    with complains(NotFound, "there is no folder", at="init_from"):
        copy_weights(tmp_path / "none", _sae("standard"), SCALE, at="init_from")
