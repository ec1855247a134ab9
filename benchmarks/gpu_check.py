"""The check of `gpu.py`: tiny shapes on a device beside the CPU, part by part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from synthetic import Planted

__all__ = ["checks"]

TOLERANCE = 2e-3  # relative to the largest entry: rounding, carried through 20 steps of Adam
SMALLEST = 1e-4  # below that, a number of a table is rounding alone
# Tables that sampled texts enter, where one rounded draw changes the rest of a text (those in tables/ show others).
SAMPLED = (
    "interventions dose_search dose effects outcome_effects baselines baseline_effects written_words change_numbers"
    " changes change_groups null_groups declared_changes contrasts judgements evidence answer calibration by_chance"
    " power regression partial_residuals table1 table2 threats design"
)


def train_sae(architecture: str, device: torch.device) -> dict[str, torch.Tensor]:
    """An SAE's weights after 20 steps, and its activations and output on one more batch."""
    from saeffect.sae.base import ARCHITECTURES
    from saeffect.sae.training.config import SaeTrainingConfig
    from saeffect.sae.training.step import TrainingStep, new_sae

    d_in = 32 * (2 if ARCHITECTURES[architecture].sides else 1)
    settings: dict[str, Any] = {"k": 6} if "k" in ARCHITECTURES[architecture].keys else {}
    config = SaeTrainingConfig(architecture=architecture, d_sae=128, batch_size=64, dead_window=10, **settings)
    planted = Planted(d_in, 64)
    sae = new_sae(config, d_in)
    sae.initialise(planted.activations(256), config)
    sae = sae.to(device)
    step = TrainingStep(sae, config, 20)
    for number in range(20):
        step(number, planted.activations(64).to(device))
    saved = sae.for_inference()
    x = planted.activations(64).to(device)
    acts = saved.encode(x)
    tensors = {"W_enc": saved.W_enc, "W_dec": saved.W_dec, "feature_acts": acts, "sae_out": saved.decode(acts)}
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}


def run_recipe(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The SAE that `train-sae` makes of a tiny model: harvest, 20 steps, checkpoint, measurements."""
    from saeffect import load_sae, train_sae

    recipe = {
        "model": {"path": str(folder / "base"), "device": str(device), "dtype": "float32"},
        "hook": "blocks.1.hook_resid_pre",
        "text": [{"name": "text", "path": str(folder / "text.jsonl")}],
        "tokens": 4096, "held_out_tokens": 128, "context_size": 32, "dtype": "float32",
        "sae": {"architecture": "topk", "d_sae": 96, "k": 6, "batch_size": 128, "steps": 20, "checkpoint_every": 10},
    }  # fmt: skip
    out = folder / f"sae-{device.type}"
    train_sae(recipe, out, work=folder / f"work-{device.type}")
    sae = load_sae(out)
    return {name: tensor.detach() for name, tensor in sae.named_parameters()}


def run_model(folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """A tiny model: activations at three hooks, its top tokens, and texts steered greedily."""
    from saeffect.config import ModelConfig
    from saeffect.features.projection import project
    from saeffect.lm.architectures import unembedding
    from saeffect.lm.hooks import capture
    from saeffect.lm.loading import load_language_model
    from saeffect.steering import Intervention, NoiseCell, Sampling, generate
    from saeffect.steering.operators import AddVectors

    lm = load_language_model(ModelConfig(path=str(folder / "base"), device=str(device), dtype="float32"))
    ids = torch.arange(64).view(4, 16) + 1
    hooks = ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.attn.hook_z")
    tensors = {hook: capture(lm, hook, ids) for hook in hooks}
    rows = torch.randn(96, lm.d_model, generator=torch.Generator().manual_seed(0))
    top = project(rows, unembedding(lm).to(device), 10)
    tensors |= {"top tokens": top.indices, "weights": top.weights}
    steering = Intervention(AddVectors(rows[:8]))
    greedy = Sampling(max_new_tokens=12, temperature=0.0, top_p=1.0, frequency_penalty=1.0)
    cells = [NoiseCell(0, "river", i) for i in range(8)]
    texts = generate(lm, hooks[0], lm.encode_prompt("The river"), cells, greedy, intervention=steering)
    tensors["steered texts"] = torch.tensor(texts)
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}


def run_tiny_study(folder: Path, device: torch.device, name: str) -> Path:
    """The run directory `name` of a whole tiny study on a device."""
    import yaml

    from saeffect.study.run import run_study
    from saeffect.study.study import Study

    config = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
    for arm in config["arms"].values():
        arm["model"] = {"path": arm["model"], "device": str(device), "dtype": "float32"}
    path = folder / "on-a-device.yaml"  # the same name for all, as tables name the study
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run_study(Study.open(path), folder / name)
    return folder / name


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest entry."""
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-12)) for n in a)


def checks(device: torch.device) -> Iterator[dict[str, Any]]:
    """One record a part: name, error, ok, and what went wrong."""
    from compare_runs import differences

    from saeffect.sae.base import ARCHITECTURES
    from saeffect.sae.trainable import TrainableSae
    from tiny_study import make_study

    cpu = torch.device("cpu")

    def part(name: str, run: Callable[[torch.device], dict[str, torch.Tensor]]) -> dict[str, Any]:
        try:
            error = largest_difference(run(cpu), run(device))
        except Exception as problem:  # one part that fails must not hide the others
            return {"part": name, "ok": False, "error": None, "problem": f"{type(problem).__name__}: {problem}"}
        return {"part": name, "ok": error <= TOLERANCE, "error": error, "problem": ""}

    for architecture, kind in ARCHITECTURES.items():
        if issubclass(kind, TrainableSae):
            yield part(f"training, {architecture}", lambda on, a=architecture: train_sae(a, on))
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        make_study(folder)
        yield part("train-sae", lambda on: run_recipe(folder, on))
        yield part("hooks, top tokens, steering", lambda on: run_model(folder, on))
        try:
            runs = run_tiny_study(folder, cpu, "on-cpu"), run_tiny_study(folder, device, "on-device")
            lines = [line for line in differences(*runs, rtol=TOLERANCE, atol=SMALLEST) if _compared(line)]
            yield {"part": "whole study", "ok": not lines, "error": len(lines), "problem": "; ".join(lines[:5])}
        except Exception as problem:
            yield {"part": "whole study", "ok": False, "error": None, "problem": f"{type(problem).__name__}: {problem}"}


def _compared(line: str) -> bool:
    """Whether a difference is in a table that no sampled text enters."""
    path = line.partition(":")[0]
    return not path.startswith("tables/") and Path(path).stem not in SAMPLED.split()
