from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for planted

from planted import planted_store, train_one, true_features

from saeffect.errors import BadFile, ConfigError, EmptySelection, InUse, UnknownName
from saeffect.io import sole_writer
from saeffect.lm.checkpoint import Checkpoint
from saeffect.lm.harvest import ActivationStore
from saeffect.progress import Log
from saeffect.sae import ARCHITECTURES
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.formats import load_sae
from saeffect.sae.training import run as training_run
from saeffect.sae.training.config import SaeTrainingConfig
from saeffect.sae.training.figure import save_training_figure
from saeffect.sae.training.train import SaeJob, train_saes

WEIGHTS = "sae_weights.safetensors"
METADATA = {"hook_name": "blocks.1.hook_resid_pre"}
SMALL = SaeTrainingConfig(
    d_sae=32,
    k=2,
    epochs=2,
    batch_size=64,
    learning_rate=3e-3,
    dead_after=600,
    auxiliary_k=8,
    checkpoint_every=7,
    metrics_every=5,
    evaluate_every=12,
)


def _but(config: SaeTrainingConfig, **changes: Any) -> SaeTrainingConfig:
    return SaeTrainingConfig(**(config.model_dump(exclude_defaults=True) | changes))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """960 planted tokens: 15 steps an epoch of `SMALL`."""
    return planted_store(tmp_path_factory.mktemp("store"), 960)


SHORT = SMALL.model_copy(update={"steps": 4, "metrics_every": 1})


@pytest.fixture(scope="module")
def short(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SAE of four steps."""
    folder = tmp_path_factory.mktemp("short")
    train_saes(store, [SaeJob(SHORT, folder, METADATA)])
    return folder


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`SMALL` trained in one go."""
    folder = tmp_path_factory.mktemp("whole")
    train_one(store, SMALL, folder, metadata=METADATA, dtype="float32", evaluate=lambda _: {"ce_loss_score": 0.5})
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_left(whole: Path) -> None:
    names = ["cfg.json", "finished.json", "metrics.jsonl", WEIGHTS, "sparsity.safetensors"]
    assert sorted(p.name for p in whole.iterdir()) == sorted([*names, "training.png", "training.svg"])
    sae = load_sae(whole)
    assert sae.cfg.hook_name == METADATA["hook_name"]
    assert (sae.cfg.d_sae, sae.cfg.k) == (32, 2)


def test_the_curve_is_drawn(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_run, "save_training_figure", save_training_figure)
    train_saes(store, [SaeJob(SHORT, tmp_path, METADATA)])
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "training.svg").read_bytes()


def test_the_log(whole: Path) -> None:
    rows = _rows(whole)
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [4, 9, 14, 19, 24, 29]
    assert [row["tokens"] for row in trained] == [320, 640, 960, 1280, 1600, 1920]
    assert trained[-1]["explained_variance"] > trained[0]["explained_variance"]
    assert 0 < trained[-1]["l0"] <= 2
    assert trained[-1]["loss"] == pytest.approx(trained[-1]["mse"] + trained[-1].get("auxiliary", 0.0), rel=1e-5)
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [11, 23, 29], "and the last step"


def test_explained_variance_is_of_the_whole_batch(store: ActivationStore, tmp_path: Path) -> None:
    """At a rate of next to nothing the SAE stays where it starts: mse and variance can be worked out by hand."""
    config = _but(SMALL, steps=1, epochs=1, metrics_every=1, learning_rate=1e-12, normalise_inputs="none")
    sae = train_one(store, config, tmp_path, metadata={}, dtype="float32")
    x = next(store.batches(64, seed=0, epoch=0))
    mse = (sae(x) - x).square().sum(1).mean()
    (row,) = _rows(tmp_path)
    assert row["mse"] == pytest.approx(float(mse), rel=1e-4)
    assert row["explained_variance"] == pytest.approx(1 - float(mse / x.var(0, correction=0).sum()), rel=1e-4)
    assert row["l0"] == pytest.approx(float((sae.encode(x) > 0).sum() / 64))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, Tensor]:
    """(activations to train on, others to measure on)"""
    folder = tmp_path_factory.mktemp("planted")
    return planted_store(folder / "store", 16_384), planted_store(folder / "held_out", 2_000, seed=5).sample(2_000)


@pytest.mark.parametrize("architecture", [name for name, kind in ARCHITECTURES.items() if kind.trainable])
def test_planted_features_are_found(planted: tuple[ActivationStore, Tensor], tmp_path: Path, architecture: str) -> None:
    store, x = planted
    own: dict[str, dict[str, Any]] = {
        "standard": {"l1_coefficient": 1.0},
        "gated": {"l1_coefficient": 1.0},
        "jumprelu": {"l0_coefficient": 0.3, "bandwidth": 0.5, "threshold_at_start": 0.3},
    }
    own |= {f"crosscoder_{end}": own[name] for end, name in (("l1", "standard"), ("jumprelu", "jumprelu"))}
    of_k = {"k": 2, "dead_after": 5_000, "auxiliary_k": 8, "epochs": 4}
    config = SaeTrainingConfig(
        architecture=architecture,
        d_sae=48,
        batch_size=256,
        learning_rate=5e-3,
        **({"epochs": 10} | own.get(architecture, of_k)),
    )
    sae = train_one(store, config, tmp_path / "sae", metadata={}, dtype="float32")
    rows = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    cosines = (true_features() @ rows.T).max(dim=1).values
    assert (cosines > 0.9).float().mean() > 0.8, cosines
    error = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert 1 - error > (0.85 if architecture.startswith("crosscoder") else 0.9)
    assert (sae.encode(x) > 0).sum() / 2_000 < 6


def test_input_scale_only_rescales_the_sae(tmp_path: Path) -> None:
    """Inputs are brought to one size, and the SAE that is saved takes and gives them in their own."""
    found = []
    for factor in (1.0, 8.0):
        store = planted_store(tmp_path / f"store{factor}", 960)
        store = _Scaled(store, factor)  # type: ignore[assignment]
        sae = train_one(store, SMALL, tmp_path / f"{factor}", metadata={}, dtype="float32")
        x = store.sample(200)
        found.append((sae(x) / factor, sae.encode(x) / factor))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class _Scaled:
    """A store whose activations are larger; powers of two, so that nothing is rounded."""

    def __init__(self, store: ActivationStore, factor: float) -> None:
        self._store, self._factor = store, factor
        self.d_in, self.mean_norm = store.d_in, store.mean_norm * factor

    def identity(self) -> str:
        return f"{self._store.identity()} {self._factor}"

    def sample(self, n_tokens: int) -> Tensor:
        return self._store.sample(n_tokens) * self._factor

    def n_batches(self, batch_size: int) -> int | None:
        return self._store.n_batches(batch_size)

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
        for x in self._store.batches(batch_size, seed=seed, epoch=epoch, start=start):
            yield x * self._factor


class _Streamed(_Scaled):
    """Of unknown length, as streamed text is."""

    def n_batches(self, batch_size: int) -> int | None:
        return None


def test_text_of_unknown_length_is_read_again(
    store: ActivationStore, whole: Path, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    source = _Streamed(store, 1.0)
    with complains(ConfigError, "the number of steps must be given", at="sae.steps"):
        train_one(source, SMALL, tmp_path / "a", metadata={})
    train_one(source, _but(SMALL, steps=30), tmp_path / "b", metadata=METADATA, dtype="float32")
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes(), "two passes of 15 batches"
    with complains(EmptySelection, "fewer tokens than one batch of 961"):
        train_one(source, _but(SMALL, steps=3, batch_size=961), tmp_path / "c", metadata={})


def test_seeds_matter_and_global_randomness_does_not(store: ActivationStore, whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    for seed, same in ((0, True), (1, False)):
        train_one(store, _but(SMALL, seed=seed), tmp_path / str(seed), metadata={}, dtype="float32")
        written = (tmp_path / str(seed) / WEIGHTS).read_bytes()
        assert (written == (whole / WEIGHTS).read_bytes()) is same


def test_side_by_side_equals_one_by_one(store: ActivationStore, whole: Path, tmp_path: Path) -> None:
    config = _but(SMALL, seed=1, data_seed=0)
    alone = train_one(store, config, tmp_path / "alone", metadata={}, dtype="float32")
    said: list[str] = []
    jobs = [SaeJob(_but(SMALL, data_seed=0), tmp_path / "a", METADATA, "float32")]
    jobs.append(SaeJob(config, tmp_path / "b", {}, "float32"))
    both = train_saes(store, jobs, log=Log(said.append))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    assert torch.equal(both[1].W_dec, alone.W_dec)
    assert {line.split(":")[0] for line in said} == {"a", "b"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 32}, "share batch_size; got 64 and 32"),
        ({"seed": 1}, "share data_seed; got 0 and 1"),
        ({"epochs": 3}, "share epochs"),
        ({"normalise_inputs": "none"}, "share normalise_inputs"),
        ({}, "into one folder"),
    ],
)
def test_jobs_that_cannot_go_together(
    store: ActivationStore, tmp_path: Path, complains: Callable[..., Any], changes: dict[str, Any], named: str
) -> None:
    jobs = [SaeJob(SMALL, tmp_path / "a"), SaeJob(_but(SMALL, **changes), tmp_path / ("b" if changes else "a"))]
    with complains(ConfigError, named):
        train_saes(store, jobs)
    assert not list(tmp_path.iterdir())


def test_what_is_finished_is_not_repeated(store: ActivationStore, tmp_path: Path) -> None:
    job = SaeJob(SHORT, tmp_path / "a", METADATA, "float16")
    (first,) = train_saes(store, [job])
    written = _times(job.out)
    said: list[str] = []
    (again,) = train_saes(store, [job], log=Log(said.append))
    assert said == ["finished before; nothing to do"]
    assert torch.equal(first.W_dec, again.W_dec), (
        "what is given back is what was saved, also by the run that trained it"
    )
    # How often metrics are written decides nothing.
    train_saes(store, [replace(job, config=_but(SHORT, metrics_every=3))])
    assert _times(job.out) == written


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "damage"), [(WEIGHTS, b"damaged"), ("sparsity.safetensors", None), ("metrics.jsonl", b"")]
)
def test_lost_weights_are_trained_again(
    short: Path, tmp_path: Path, store: ActivationStore, name: str, damage: bytes | None
) -> None:
    out = Path(shutil.copytree(short, tmp_path / "a"))
    if damage is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(damage)
    said: list[str] = []
    train_saes(store, [SaeJob(SHORT, out, METADATA)], log=Log(said.append))
    assert f"{name} changed or vanished" in said[0]
    for path in short.iterdir():
        if path.name not in ("metrics.jsonl", "finished.json"):  # they hold seconds
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert len(_rows(out)) == len(_rows(short))


def test_figure_and_cfg_are_restored_untrained(short: Path, tmp_path: Path, store: ActivationStore) -> None:
    out = Path(shutil.copytree(short, tmp_path / "a"))
    (out / "cfg.json").write_text('{"d_in": "many"}')
    (out / "training.png").write_bytes(b"")
    (out / "training.svg").unlink()
    Checkpoint(out / "checkpoint", SaeJob(SHORT, out).folder(store.identity()).note()["made_by"]).begin()
    said: list[str] = []
    train_saes(store, [SaeJob(SHORT, out, METADATA)], log=Log(said.append))
    assert said == ["finished before; nothing to do"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in short.iterdir()
    }
    # What was added to the metadata since is no damage.
    cfg = json.loads((out / "cfg.json").read_text())
    cfg["metadata"]["held_out"] = {"l0": 2.0}
    (out / "cfg.json").write_text(json.dumps(cfg))
    train_saes(store, [SaeJob(SHORT, out, METADATA)])
    assert load_sae(out).cfg.metadata["held_out"] == {"l0": 2.0}


def test_another_recipes_sae_stays(
    short: Path, tmp_path: Path, store: ActivationStore, complains: Callable[..., Any]
) -> None:
    out = Path(shutil.copytree(short, tmp_path / "a"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with complains(ConfigError, "another recipe", "choose another output folder", at=str(out)):
        train_saes(store, [SaeJob(_but(SHORT, seed=5), out, METADATA)])
    with complains(ConfigError, "another recipe", at=str(out)):
        train_saes(_Scaled(store, 1.0), [SaeJob(SHORT, out, METADATA)])
    for note in ("", "[]", '{"made_by": 3}', '{"made_by": "x"}', '{"made_by": "x", "files": ["a"]}'):
        (out / "finished.json").write_text(note)
        with complains(BadFile, "finished.json is damaged", at=str(out)):
            train_saes(store, [SaeJob(SHORT, out, METADATA)])
    (out / "finished.json").write_bytes(before["finished.json"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["README.md", "cfg.json", "metrics.jsonl", "checkpoint/epoch-3.pt"])
def test_a_folder_with_somebody_elses_files_is_refused(
    store: ActivationStore, tmp_path: Path, complains: Callable[..., Any], name: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with complains(ConfigError, f"holds {path.relative_to(tmp_path).parts[0]}", at=str(tmp_path)):
        train_one(store, SHORT, tmp_path, metadata={})
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


def test_unrelated_files_are_kept(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        train_one(store, _but(SHORT, checkpoint_every=1, metrics_every=1), tmp_path, metadata={}, log=_stop_at(2))
    mine = [tmp_path / "notes.md", tmp_path / ".draft.abcdefgh.txt", tmp_path / "checkpoint" / "mine.pt"]
    for path in mine:
        path.write_text("mine")
    train_one(store, SHORT, tmp_path, metadata={})
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert list((tmp_path / "checkpoint").iterdir()) == mine[2:]


class _Stop(BaseException):
    """Stands in for a process that ends here."""


def _stop_at(step: int) -> Log:
    def stop(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise _Stop

    return Log(stop)


def test_another_run_does_not_go_on(store: ActivationStore, tmp_path: Path, complains: Callable[..., Any]) -> None:
    with pytest.raises(_Stop):
        train_one(store, SMALL, tmp_path, metadata={}, log=_stop_at(10))
    with complains(ConfigError, "checkpoint of another run", at="checkpoint"):
        train_one(store, _but(SMALL, seed=1), tmp_path, metadata={})
    with complains(ConfigError, "checkpoint of another run", at="checkpoint"):
        train_one(_Scaled(store, 1.0), SMALL, tmp_path, metadata={})


def test_weights_that_are_not_finite_are_never_saved(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    """A step whose loss was finite may still break the weights; the checkpoint after it must not replace a good one."""
    from saeffect.sae.topk import TopKSae

    real = TopKSae.after_step

    def breaks(sae: TopKSae, inputs: Any) -> None:
        real(sae, inputs)
        breaks.calls += 1  # type: ignore[attr-defined]
        if breaks.calls == 14:  # type: ignore[attr-defined]
            sae.W_dec.data[3, 0] = torch.inf

    breaks.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(TopKSae, "after_step", breaks)
    with complains(BadFile, "W_dec became NaN or infinite at step 13.", "from the checkpoint after step 7"):
        train_one(store, SMALL, tmp_path, metadata={})
    assert [p.name for p in (tmp_path / "checkpoint").glob("*.safetensors")] == ["step-00000007.safetensors"]


def test_losses_that_overflow(store: ActivationStore, tmp_path: Path, complains: Callable[..., Any]) -> None:
    config = _but(SMALL, learning_rate=1e30, decoder_rows="free", checkpoint_every=1)
    with complains(BadFile, " at step ", "lower learning_rate", at=str(tmp_path)):
        train_one(store, config, tmp_path, metadata={})
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_a_folder_that_cannot_be(
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complains: Callable[..., Any],
    place: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" if place == "a file" else tmp_path / "file" / "sae"
    monkeypatch.setattr(ActivationStore, "sample", None)  # nothing heavy before that
    with complains(BadFile, "cannot be written", "choose another", at=str(out)):
        train_one(store, SMALL, out, metadata={})
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_into_which_another_process_trains(
    store: ActivationStore, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    with pytest.raises(_Stop):
        train_one(store, SMALL, tmp_path, metadata={}, log=_stop_at(10))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with sole_writer(tmp_path), complains(InUse, "another process is writing", at=str(tmp_path)):
        train_one(store, SMALL, tmp_path, metadata={})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_less_than_one_batch(store: ActivationStore, tmp_path: Path, complains: Callable[..., Any]) -> None:
    with complains(EmptySelection, "fewer tokens than one batch of 961"):
        train_one(store, _but(SMALL, batch_size=961), tmp_path / "sae", metadata={})
    assert not (tmp_path / "sae").exists()


def test_evaluation_gets_the_saved_form(store: ActivationStore, tmp_path: Path) -> None:
    seen: list[SparseAutoencoder] = []

    def evaluate(sae: SparseAutoencoder) -> dict[str, float]:
        seen.append(sae)
        return {}

    config = _but(SMALL, architecture="batchtopk")
    trained = train_one(store, config, tmp_path, metadata=METADATA, dtype="float32", evaluate=evaluate)
    x = store.sample(100)
    assert trained.cfg.architecture == "jumprelu"
    assert torch.equal(seen[-1](x), trained(x))
    assert not torch.equal(seen[0](x), trained(x)), "a copy of then"


def test_an_unknown_architecture_is_named_beside_the_valid_ones(complains: Callable[..., Any]) -> None:
    with complains(UnknownName, "jumprelu", at="sae.yaml"):
        SaeTrainingConfig.read({"architecture": "transcoder"}, at="sae.yaml")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"d_sae": 8, "k": 9}, "k=9 is more than d_sae=8"),
        ({"k": 0}, "Got 0."),
        ({"learning_rate": 0}, "Got 0."),
        ({"architecture": "standard", "l1_coefficient": -1}, "Got -1."),
        ({"architecture": "standard", "k": 4}, "k is a setting of topk, batchtopk, matryoshka, crosscoder"),
    ],
)
def test_bad_recipes(complains: Callable[..., Any], values: dict[str, Any], part: str) -> None:
    with complains(ConfigError, part, at="sae.yaml"):
        SaeTrainingConfig.read(values, at="sae.yaml")
