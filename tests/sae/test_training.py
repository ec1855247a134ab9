from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for planted, which the killed process imports too

from planted import D_IN, planted, planted_store, true_features

from saeffect.activations.shards import ActivationStore, save_shard, shard_name
from saeffect.errors import BadFile, ConfigError, EmptySelection, Interrupted
from saeffect.sae.base import SaeConfig
from saeffect.sae.saelens_format import load_sae
from saeffect.sae.topk import TopKSae
from saeffect.sae.training import (
    SaeTrainingConfig,
    _fold_scale,
    _input_scale,
    _rate_factor,
    train_sae,
    training_quality,
)

WEIGHTS = "sae_weights.safetensors"
SMALL = SaeTrainingConfig(
    d_sae=32,
    k=2,
    epochs=2,
    batch_size=64,
    learning_rate=3e-3,
    dead_after=600,
    auxiliary_k=8,
    checkpoint_every=7,
    report_every=5,
)


class Killed(BaseException):
    """Stands in for a process that ends here."""


def _stop_at(step: int, error: type[BaseException] = Killed) -> Callable[[str], None]:
    def say(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise error

    return say


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """960 planted tokens: 15 steps an epoch of `SMALL`."""
    return planted_store(tmp_path_factory.mktemp("store"), 960)


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`SMALL` trained in one go."""
    folder = tmp_path_factory.mktemp("whole")
    train_sae(store, SMALL, folder, metadata={"hook_name": "blocks.1.hook_resid_pre"}, dtype="float32")
    return folder


@pytest.mark.parametrize("stops", [(5,), (10,), (20,), (30,), (10, 25)])
def test_a_killed_run_ends_with_the_same_bytes(
    store: ActivationStore, whole: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    metadata = {"hook_name": "blocks.1.hook_resid_pre"}
    for stop in stops:
        with pytest.raises(Killed):
            train_sae(store, SMALL, tmp_path, metadata=metadata, dtype="float32", say=_stop_at(stop))
        assert not (tmp_path / WEIGHTS).exists()
    train_sae(store, SMALL, tmp_path, metadata=metadata, dtype="float32")
    for name in (WEIGHTS, "cfg.json", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "metrics.jsonl", WEIGHTS]


def test_kill_9(store: ActivationStore, whole: Path, tmp_path: Path) -> None:
    code = """
import os, sys, torch
torch.set_num_threads(1)
from test_training import SMALL, ActivationStore, train_sae
def say(line):
    if line.startswith("step 25/"):
        os.kill(os.getpid(), 9)
train_sae(ActivationStore.open(sys.argv[1]), SMALL, sys.argv[2], metadata={"hook_name": "blocks.1.hook_resid_pre"},
    dtype="float32", say=say)
"""
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.folder), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == -9
    assert (tmp_path / "checkpoint" / "state.safetensors").is_file()
    said: list[str] = []
    train_sae(
        store,
        SMALL,
        tmp_path,
        metadata={"hook_name": "blocks.1.hook_resid_pre"},
        dtype="float32",
        say=said.append,
    )
    assert said[0].startswith("step 25/"), "steps up to the checkpoint at 21 are not done again"
    assert (tmp_path / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_the_log(whole: Path) -> None:
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 9, 14, 19, 24, 29]
    assert [row["tokens"] for row in rows] == [320, 640, 960, 1280, 1600, 1920]
    assert rows[-1]["explained_variance"] > rows[0]["explained_variance"]
    assert 0 < rows[-1]["l0"] <= 2


def test_planted_features_are_found(tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store", 16_384)
    config = SaeTrainingConfig(
        d_sae=48, k=2, epochs=10, batch_size=256, learning_rate=5e-3, dead_after=5_000, auxiliary_k=8
    )
    sae = train_sae(store, config, tmp_path / "sae", metadata={}, dtype="float32")
    cosines = (true_features() @ sae.W_dec.T).max(dim=1).values
    assert (cosines > 0.95).float().mean() > 0.85, cosines
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    held_out = planted_store(tmp_path / "held_out", 2_000, seed=5)
    quality = training_quality(load_sae(tmp_path / "sae"), held_out)  # type: ignore[arg-type]
    assert quality.explained_variance > 0.9
    assert quality.n_tokens == 2_000
    assert 1.5 < quality.l0 <= 2
    assert 0.9 < quality.l2_ratio < 1.1


def test_the_auxiliary_loss_brings_features_back() -> None:
    """Eight features take all the tokens; the others are too faint to be chosen unless they are trained apart."""
    x = planted(512, seed=3)
    dead = {}
    for weight in (0.0, 1.0):
        sae = TopKSae(SaeConfig("topk", D_IN, 40, k=4))
        sae.initialise(x.mean(0), seed=0)
        with torch.no_grad():
            sae.W_enc[:, 8:] *= 0.02
        optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
        for _ in range(300):
            silent = (~(sae.encode(x) > 0).any(0)).nonzero().flatten()
            sae.accumulate_gradients(x, dead=silent, k_auxiliary=4, auxiliary_weight=weight)
            sae.remove_parallel_gradient()
            optimizer.step()
            sae.normalise_decoder()
        dead[weight] = len(silent)
    assert dead[1.0] < dead[0.0], dead


def test_folding_the_scale_is_exact() -> None:
    x = planted(50, seed=3)
    scale = _input_scale(x)
    assert (x * scale).norm(dim=1).mean().item() == pytest.approx(D_IN**0.5, rel=1e-5)
    sae = TopKSae(SaeConfig("topk", D_IN, 32, k=4))
    sae.initialise(x.mean(0) * scale, seed=0)
    with torch.no_grad():
        sae.b_enc += 0.1
    acts, out = sae.encode(x * scale), sae(x * scale)
    rows = sae.W_dec.clone()
    _fold_scale(sae, scale)
    torch.testing.assert_close(sae.encode(x) * scale, acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x) * scale, out, rtol=1e-4, atol=1e-5)
    assert torch.equal(sae.W_dec, rows)


def test_quality_by_hand(tmp_path: Path) -> None:
    """Feature 0 of three keeps the first dimension; the second dimension is lost."""
    sae = TopKSae(SaeConfig("topk", 2, 3, k=1))
    with torch.no_grad():
        sae.W_enc[0, 0] = 1.0
        sae.W_dec[0, 0] = 1.0
    (tmp_path / "harvest.json").write_text("{}")
    save_shard(tmp_path / shard_name(0), {"activations": torch.tensor([[3.0, 4.0], [0.0, 2.0]])})
    quality = training_quality(sae, ActivationStore.open(tmp_path))
    assert quality.explained_variance == pytest.approx(1 - 20 / (2 * 1.5**2 + 2 * 1.0**2))
    assert quality.l0 == 0.5
    assert quality.l2_ratio == pytest.approx((3 / 5 + 0) / 2)
    assert quality.dead_share == pytest.approx(2 / 3)
    assert quality.mean_log10_density == pytest.approx((-0.30103 - 10 - 10) / 3, abs=1e-4)
    assert quality.n_tokens == 2


def test_the_rate_rises_stays_and_falls() -> None:
    config = SaeTrainingConfig(warmup_share=0.1, decay_share=0.2)
    rates = [_rate_factor(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    assert rates[:10] == sorted(rates[:10])
    assert rates[80:] == sorted(rates[80:], reverse=True)


def test_seeds_matter_and_global_randomness_does_not(store: ActivationStore, whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    for seed, same in ((0, True), (1, False)):
        config = SMALL.model_copy(update={"seed": seed})
        train_sae(store, config, tmp_path / str(seed), metadata={}, dtype="float32")
        written = (tmp_path / str(seed) / WEIGHTS).read_bytes()
        assert (written == (whole / WEIGHTS).read_bytes()) is same


def test_another_run_does_not_go_on(store: ActivationStore, tmp_path: Path, complains: Callable[..., Any]) -> None:
    with pytest.raises(Killed):
        train_sae(store, SMALL, tmp_path, metadata={}, say=_stop_at(10))
    with complains(ConfigError, "checkpoint of another run", at="checkpoint"):
        train_sae(store, SMALL.model_copy(update={"seed": 1}), tmp_path, metadata={})
    other = ActivationStore(store.folder, {"made_by": {"text": "another"}})
    with complains(ConfigError, "checkpoint of another run", at="checkpoint"):
        train_sae(other, SMALL, tmp_path, metadata={})


def test_stopped_by_the_user(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        train_sae(store, SMALL, tmp_path, metadata={}, say=_stop_at(10, KeyboardInterrupt))
    assert "run the same command again" in str(caught.value)
    assert (tmp_path / "checkpoint" / "state.safetensors").is_file()


def test_losses_that_are_no_numbers(tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "harvest.json").write_text('{"made_by": 1}')
    save_shard(tmp_path / shard_name(0), {"activations": torch.full((256, 4), float("nan"))})
    store = ActivationStore.open(tmp_path)
    with complains(BadFile, "the loss became nan at step 0", "lower learning_rate"):
        train_sae(store, SMALL, tmp_path / "sae", metadata={})
    assert not (tmp_path / "sae" / WEIGHTS).exists()


def test_less_than_one_batch(store: ActivationStore, tmp_path: Path, complains: Callable[..., Any]) -> None:
    config = SMALL.model_copy(update={"batch_size": 961})
    with complains(EmptySelection, "fewer tokens than one batch of 961", at=str(store.folder)):
        train_sae(store, config, tmp_path, metadata={})


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"d_sae": 8, "k": 9}, "k=9 is more than d_sae=8"),
        ({"k": 0}, "Got 0."),
        ({"learning_rate": 0}, "Got 0."),
        ({"architecture": "gated"}, "Got 'gated'."),
    ],
)
def test_bad_recipes(complains: Callable[..., Any], values: dict[str, Any], part: str) -> None:
    with complains(ConfigError, part, at="sae.yaml"):
        SaeTrainingConfig.read(values, at="sae.yaml")
