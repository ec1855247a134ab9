from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saeffect.sae import ARCHITECTURES
from saeffect.sae.trainable import StepInputs, StepResult
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.step import StepReport, TrainingStep, new_sae, penalty_coefficient, rate_factor

D_IN = 8


def _trainer(total: int = 100, **settings: Any) -> TrainingStep:
    settings = {"architecture": "standard", "d_sae": 12, "learning_rate": 1e-3} | settings
    if settings["architecture"] in ("topk", "batchtopk", "matryoshka", "crosscoder"):
        settings |= {"k": 3, "auxiliary_k": 4, "dead_after": 80}
    config = SaeTrainingConfig(**settings)
    sae = new_sae(config, D_IN)
    sae.initialise(_x(0), config)
    return TrainingStep(sae, config, total)


def _x(seed: int, n: int = 40) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) * 2


def _silence(trainer: TrainingStep, features: list[int]) -> None:
    """Biases so low that these never fire."""
    trainer.sae.b_enc.data[features] = -1e3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup_share": 0.2, "decay_share": 0.4}, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"warmup_share": 0.2, "schedule": "constant"}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup_share": 0.0, "decay_share": 0.0}, [1] * 10),
        (
            {"warmup_share": 0.0, "decay_share": 0.4, "schedule": "cosine"},
            [1] * 7 + [0.5 - 0.5 * math.cos(math.pi * left) for left in (0.75, 0.5, 0.25)],
        ),
        # A rise and a fall that overlap: the smaller of the two.
        ({"warmup_share": 0.5, "decay_share": 1.0}, [0.2, 0.4, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ],
)
def test_the_rate_rises_stays_and_falls(settings: dict[str, Any], expected: list[float]) -> None:
    config = SaeTrainingConfig(**settings)
    assert [rate_factor(step, 10, config) for step in range(10)] == pytest.approx(expected)


def test_centred_inputs_are_learnt_as_if_they_came_so() -> None:
    plain, centred = _trainer(), _trainer(centre_inputs=True)
    centred.sae.load_state_dict(plain.sae.state_dict())
    for step in range(4):
        x = _x(step) + 3
        report = plain(step, x - x.mean(1, keepdim=True))
        assert centred(step, x).losses == pytest.approx(report.losses)
    torch.testing.assert_close(centred.sae.W_dec, plain.sae.W_dec)
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close(centred.sae(x), plain.sae(x - mean) + mean)
    with pytest.raises(ValueError, match="a crosscoder reads two"):
        SaeTrainingConfig(architecture="crosscoder", centre_inputs=True)


def test_the_optimizer_gets_the_rate_of_its_step() -> None:
    trainer = _trainer(total=10, warmup_share=0.2, decay_share=0.4, learning_rate=0.5)
    found = []
    for step in range(10):
        trainer(step, _x(step))
        found.append(trainer.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.25] + [0.5] * 6 + [0.375, 0.25, 0.125])


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({"architecture": "standard", "l1_coefficient": 8.0}, 8.0),
        ({"architecture": "gated", "l1_coefficient": 3.0}, 3.0),
        ({"architecture": "jumprelu", "l0_coefficient": 2.0}, 2.0),
    ],
)
def test_the_penalty_warms_up(settings: dict[str, Any], full: float) -> None:
    config = SaeTrainingConfig(**settings, penalty_warmup_share=0.25)
    found = [penalty_coefficient(step, 16, config) for step in range(7)]
    assert found == pytest.approx([0, full / 4, full / 2, full * 3 / 4, full, full, full])
    at_once = config.model_copy(update={"penalty_warmup_share": 0.0})
    assert penalty_coefficient(0, 16, at_once) == full


def test_the_penalty_of_a_step_is_in_its_loss() -> None:
    trainer = _trainer(total=100, l1_coefficient=8.0, penalty_warmup_share=0.1)
    assert trainer(0, _x(0)).losses["l1"] == 0
    sae, x = trainer.sae, _x(1)
    penalty = (sae.encode(x) * sae.W_dec.norm(dim=1)).sum(1).mean().detach()
    assert trainer(5, x).losses["l1"] == pytest.approx(float(4.0 * penalty), rel=1e-5)


def test_what_a_report_says() -> None:
    trainer, x = _trainer(clip_gradient_norm=1e-3), _x(0)
    active = float((trainer.sae.encode(x) > 0).sum() / len(x))
    mse = float((trainer.sae(x) - x).square().sum(1).mean().detach())
    report = trainer(0, x, stop=True)
    assert report.losses["mse"] == pytest.approx(mse, rel=1e-5)
    assert report.loss == pytest.approx(sum(report.losses.values()))
    assert report.l0 == pytest.approx(active)
    assert report.gradient_norm > 1e-3, "before clipping"
    assert report.stop
    assert not trainer(1, x).stop
    norms = [float(leaf.grad.norm()) for leaf in trainer.leaves.values() if leaf.grad is not None]
    assert math.hypot(*norms) == pytest.approx(1e-3, rel=1e-3), "after clipping"
    assert math.isnan(_trainer(clip_gradient_norm=None)(0, x).gradient_norm)
    assert StepReport({"mse": 1.0, "l1": 0.5}, 0.0, 0, 0.0).loss == 1.5


@pytest.mark.parametrize("longest", [1e-3, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(longest: float) -> None:
    trainer, x = _trainer(clip_gradient_norm=longest), _x(0)
    free = _trainer(clip_gradient_norm=None)
    report, _ = trainer(0, x), free(0, x)
    leaves = list(free.leaves.values())
    norm = float(torch.nn.utils.clip_grad_norm_(leaves, longest))
    assert report.gradient_norm == pytest.approx(norm, rel=1e-5)
    for name, leaf in free.leaves.items():
        assert leaf.grad is not None
        seen = trainer.optimizer.state[trainer.leaves[name]]["exp_avg"] / (1 - trainer.config.adam_beta1)
        torch.testing.assert_close(seen, leaf.grad, rtol=1e-4, atol=1e-7 * min(1.0, longest))


def test_counters_by_hand() -> None:
    trainer = _trainer(dead_window=2, learning_rate=1e-9, l1_coefficient=0.0)
    _silence(trainer, [3, 5])
    fires = [(trainer.sae.encode(_x(seed)) > 0).sum(0) for seed in range(5)]
    trainer(0, _x(0))
    assert torch.equal(trainer.fired, fires[0])
    assert trainer.since_fired[3] == 40
    assert trainer.since_fired[0] == 0
    trainer(1, _x(1))  # the window of two steps is full
    assert torch.equal(trainer.fired_before, fires[0] + fires[1])
    assert not trainer.fired.any()
    assert trainer.tokens_counted.tolist() == [0, 80]
    trainer(2, _x(2))
    assert torch.equal(trainer.fired, fires[2])
    assert trainer.tokens_counted.tolist() == [40, 80]
    assert trainer.since_fired[[3, 5]].tolist() == [120, 120]
    rate = (fires[0] + fires[1] + fires[2]).double() / 120
    torch.testing.assert_close(trainer.log10_density().double(), (rate + 1e-10).log10(), rtol=1e-6, atol=1e-6)
    assert float(trainer.log10_density()[3]) == pytest.approx(-10)


def test_density_before_any_step() -> None:
    assert torch.equal(_trainer().log10_density(), torch.full((12,), -10.0))


def test_dead_features_reach_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, told = _trainer(dead_after=80), []
    real = trainer.sae.accumulate_gradients

    def spy(x: Tensor, step: StepInputs) -> StepResult:
        told.append(step.dead.tolist())
        return real(x, step)

    monkeypatch.setattr(trainer.sae, "accumulate_gradients", spy)
    _silence(trainer, [3, 5])
    for step in range(4):
        trainer(step, _x(step))
    assert told == [[], [], [3, 5], [3, 5]], "after 80 tokens without firing"


def test_dead_features_are_resampled_when_due() -> None:
    """At steps 4 and 8 of 10; what is dead is under 1 in 100 over the last window; not after the given share."""
    settings = {"dead_window": 2, "resample_every": 4, "dead_threshold": 0.01, "learning_rate": 1e-9}
    trainer = _trainer(total=10, resample_until=0.5, **settings)
    _silence(trainer, [3, 5])
    reports = []
    for step in range(10):
        if step == 4:
            assert trainer.sae.b_enc.data[[3, 5]].tolist() == [0, 0]
            assert trainer.since_fired[[3, 5]].tolist() == [0, 0]
            _silence(trainer, [7])
        reports.append(trainer(step, _x(step)))
    assert [report.n_resampled for report in reports] == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    until_the_end = _trainer(total=10, resample_until=1.0, **settings)
    _silence(until_the_end, [3])
    found = []
    for step in range(10):
        if step == 5:
            _silence(until_the_end, [7])
        found.append(until_the_end(step, _x(step)).n_resampled)
    assert found == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]


def test_without_resampling_the_dead_stay_dead() -> None:
    trainer = _trainer(total=10, dead_window=2)
    _silence(trainer, [3])
    assert not any(trainer(step, _x(step)).n_resampled for step in range(10))


@pytest.mark.parametrize("architecture", [name for name, kind in ARCHITECTURES.items() if kind.trainable])
def test_nan_loss_leaves_weights_unchanged(architecture: Any) -> None:
    trainer = _trainer(architecture=architecture)
    trainer(0, _x(0))
    before = {name: leaf.detach().clone() for name, leaf in trainer.leaves.items()}
    x = _x(1)
    x[7, 2] = torch.nan
    assert not math.isfinite(trainer(1, x).loss)
    for name, leaf in trainer.leaves.items():
        assert torch.equal(leaf, before[name])


@pytest.mark.parametrize("architecture", [name for name, kind in ARCHITECTURES.items() if kind.trainable])
def test_the_state_is_all_there_is(architecture: Any) -> None:
    """Copying leaves, moments and state to another step, made from another seed, gives the same future."""
    settings = {"architecture": architecture, "dead_window": 3, "resample_every": 6, "dead_threshold": 0.2}
    one, other = _trainer(**settings), _trainer(**settings, b_dec_init="mean")
    for step in range(5):
        one(step, _x(step))
        other(step, _x(step + 50))
    with torch.no_grad():
        for name, leaf in one.leaves.items():
            other.leaves[name].copy_(leaf)
            for key, moment in one.optimizer.state[leaf].items():
                other.optimizer.state[other.leaves[name]][key].copy_(moment)
        for name, tensor in one.state().items():
            other.state()[name].copy_(tensor)
    for step in range(5, 14):
        assert one(step, _x(step)) == other(step, _x(step))
    for name, leaf in one.leaves.items():
        assert torch.equal(leaf, other.leaves[name])
