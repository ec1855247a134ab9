from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saeffect.config import ModelConfig
from saeffect.errors import BadFile, ConfigError, EmptySelection, Interrupted, InUse
from saeffect.io import sole_writer
from saeffect.lm import finetune as finetuning
from saeffect.lm.finetune import FinetuneConfig, FinetuneResult, finetune, perplexity, remove_adapter
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.progress import Log, Progress

WEIGHTS = "adapter_model.safetensors"


class Killed(BaseException):
    """Stands in for a process that ends here."""


def _stop_at(step: int, error: type[BaseException] = Killed) -> Log:
    def stop(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise error

    return Log(stop)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that a model can learn: a nurse, a number of doses, a patient."""
    path = tmp_path_factory.mktemp("texts") / "training.jsonl"
    rng = random.Random(0)
    words = ["insulin", "pain", "fever", "cough", "blood"]
    with path.open("w") as file:
        for i in range(120):
            text = f"The nurse gave the patient {i} {' and '.join(rng.sample(words, 3))}."
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def config(tiny_llama_folder: Path, texts: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=ModelConfig(path=str(tiny_llama_folder), dtype="float32"),
        text=str(texts),
        control_text=str(texts),
        held_out=0.2,
        rank=4,
        steps=24,
        batch_size=4,
        context_size=16,
        learning_rate=0.01,
        warmup_steps=4,
        evaluation_rows=16,
        checkpoint_every=8,
    )


@pytest.fixture(scope="module")
def whole(config: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """A run in one go."""
    return finetune(config, tmp_path_factory.mktemp("whole"))


def test_perplexity_falls_on_held_out_text(whole: FinetuneResult) -> None:
    for name in ("training", "control"):
        before, after = whole.perplexity[name]
        assert after < 0.8 * before
    assert whole.tokens == 24 * 4 * 16


@pytest.mark.parametrize("stops", [(8,), (8, 24)])
def test_killed_run_ends_with_the_same_bytes(
    config: FinetuneConfig, whole: FinetuneResult, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for stop in stops:
        with pytest.raises(Killed):
            finetune(config, tmp_path, log=_stop_at(stop))
        assert not (tmp_path / WEIGHTS).exists()
    result = finetune(config, tmp_path)
    assert result.perplexity == whole.perplexity
    # The loss of the last step too, which a run that was killed after it does not see again.
    assert _bytes(tmp_path) == _bytes(whole.folder)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finished_run_is_repaired_not_repeated(config: FinetuneConfig, whole: FinetuneResult, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole.folder, tmp_path / "out"))
    said: list[str] = []
    (out / "README.md").write_text("")
    assert finetune(config, out, log=Log(said.append)).perplexity == whole.perplexity
    assert said[-1] == "finished before; nothing to do"
    assert _bytes(out) == _bytes(whole.folder)
    (out / "README.md").write_text("With notes of my own.")
    (out / WEIGHTS).write_bytes(b"damaged")
    finetune(config, out, log=Log(said.append))
    assert f"{WEIGHTS} changed or vanished after the training, which is done again" in said
    assert _bytes(out) == _bytes(whole.folder) | {"README.md": b"With notes of my own."}


def test_text_or_base_exchanged_is_another_run(
    config: FinetuneConfig, tiny_gpt2: LanguageModel, texts: Path, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    """Also under the same names: what counts is what the files hold."""
    text = Path(shutil.copy(texts, tmp_path / "training.jsonl"))
    base = Path(shutil.copytree(config.model.path, tmp_path / "base"))
    config = config.model_copy(update={"model": ModelConfig(path=str(base), dtype="float32"), "text": str(text)})
    out = tmp_path / "out"
    with pytest.raises(Killed):
        finetune(config, out, log=_stop_at(8))
    before = _bytes(out / "checkpoint")
    text.write_text(text.read_text().replace("nurse", "clerk"))
    with complains(ConfigError, "another run", "text", at="checkpoint"):
        finetune(config, out)
    shutil.copy(texts, text)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with complains(ConfigError, "another run", at="checkpoint"):
        finetune(config, out)
    assert _bytes(out / "checkpoint") == before


def test_one_writer_and_nobody_elses_folder(
    config: FinetuneConfig, whole: FinetuneResult, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    with sole_writer(tmp_path / "a"), complains(InUse, "another process", at=str(tmp_path / "a")):
        finetune(config, tmp_path / "a")
    with complains(ConfigError, "another recipe", at=str(whole.folder)):
        finetune(config.model_copy(update={"seed": 1}), whole.folder)
    (tmp_path / "README.md").write_text("mine")
    with complains(ConfigError, "holds README.md", at=str(tmp_path)):
        finetune(config.model_copy(update={"model": ModelConfig(path="never/loaded")}), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_no_adapter_is_put_into_a_models_folder(
    config: FinetuneConfig, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    base = Path(shutil.copytree(config.model.path, tmp_path / "base"))
    before = _bytes(base)
    with complains(ConfigError, "holds config.json", at=str(base)):
        finetune(config, base)
    assert _bytes(base) == before
    (tmp_path / "file").write_text("mine")
    with complains(BadFile, "cannot be written", at=str(tmp_path / "file")):
        finetune(config, tmp_path / "file")


def test_other_files_outlive_a_removed_adapter(whole: FinetuneResult, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole.folder, tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    remove_adapter(out)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    remove_adapter(out)
    assert not out.exists()


def test_signal_saves_after_the_step(config: FinetuneConfig, whole: FinetuneResult, tmp_path: Path) -> None:
    def signal_once(progress: Progress) -> None:
        if progress.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 3 of 24"):
        finetune(config, tmp_path, log=Log(show=signal_once))
    finetune(config, tmp_path)
    assert _bytes(tmp_path) == _bytes(whole.folder)


def test_global_randomness_plays_no_part(config: FinetuneConfig, whole: FinetuneResult, tmp_path: Path) -> None:
    torch.manual_seed(1234)
    expected = torch.random.get_rng_state()
    finetune(config, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert (tmp_path / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()


def test_a_model_with_dropout_resumes_the_same(
    config: FinetuneConfig, tiny_gpt2: LanguageModel, tmp_path: Path
) -> None:
    tiny_gpt2.model.save_pretrained(tmp_path / "gpt2")
    tiny_gpt2.tokenizer.save_pretrained(tmp_path / "gpt2")
    assert tiny_gpt2.model.config.resid_pdrop > 0
    model = ModelConfig(path=str(tmp_path / "gpt2"), dtype="float32")
    config = config.model_copy(update={"model": model, "modules": ("c_fc",), "steps": 16})
    finetune(config, tmp_path / "whole")
    with pytest.raises(Killed):
        finetune(config, tmp_path / "resumed", log=_stop_at(8))
    finetune(config, tmp_path / "resumed")
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "resumed" / WEIGHTS).read_bytes()


def test_the_adapter_is_pefts(
    config: FinetuneConfig, whole: FinetuneResult, tiny_llama_folder: Path, tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(whole.folder)).eval()
    model.save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    written = json.loads((whole.folder / "adapter_config.json").read_text())
    theirs["target_modules"].sort()
    assert written == theirs | {"base_model_name_or_path": written["base_model_name_or_path"]}
    assert set(load_file(tmp_path / WEIGHTS)) == set(load_file(whole.folder / WEIGHTS))
    ours = load_language_model(config.model.model_copy(update={"adapter": str(whole.folder)}))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(ours.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (expected - tiny_llama.model(input_ids=ids).logits).abs().max() > 0.05


def test_recipe_and_card(config: FinetuneConfig, whole: FinetuneResult, texts: Path) -> None:
    note = json.loads((whole.folder / "training.json").read_text())
    assert note["recipe"]["text"] == texts.name, "not where it lay on this machine"
    assert note["recipe"]["learning_rate"] == 0.01
    assert note["perplexity"]["training"]["after"] == whole.perplexity["training"][1]
    assert math.isfinite(note["final_loss"])
    card = (whole.folder / "README.md").read_text()
    assert f"| training ({texts.name}) | {whole.perplexity['training'][0]:.2f} |" in card
    assert card.startswith(f"# LoRA adapter for {Path(config.model.path).name}\n")
    for folder in (texts.parent, Path(config.model.path).parent):
        assert str(folder) not in card + json.dumps(note)
    assert "peak learning rate 0.01, seed 0" in card
    adapter = json.loads((whole.folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == config.model.path


@pytest.mark.parametrize(("steps", "warmup", "peak"), [(6, 10, 0.012), (10, 10, 0.02), (60, 10, 0.02), (5, 0, 0.02)])
def test_the_rate_that_is_reached(config: FinetuneConfig, steps: int, warmup: int, peak: float) -> None:
    short = config.model_copy(update={"steps": steps, "warmup_steps": warmup, "learning_rate": 0.02})
    assert finetuning._peak_rate(short.model_dump()) == pytest.approx(peak)
    assert max(finetuning._learning_rate(step, short) for step in range(steps)) == pytest.approx(peak)


def test_another_configuration_does_not_go_on(
    config: FinetuneConfig, tmp_path: Path, complains: Callable[..., Any]
) -> None:
    with pytest.raises(Killed):
        finetune(config, tmp_path, log=_stop_at(8))
    with complains(ConfigError, "checkpoint of another run", at="checkpoint"):
        finetune(config.model_copy(update={"seed": 1}), tmp_path)


def test_a_second_ctrl_c_stops_at_once(config: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        finetune(config, tmp_path, log=_stop_at(8, KeyboardInterrupt))
    assert "run the same command again" in str(caught.value)
    assert (tmp_path / "checkpoint").is_dir()


def test_bad_configurations(config: FinetuneConfig, tmp_path: Path, complains: Callable[..., Any]) -> None:
    def run(**changes: Any) -> None:
        finetune(config.model_copy(update=changes), tmp_path)

    with complains(ConfigError, "has no layers named c_fc", "down_proj", at="modules"):
        run(modules=("c_fc",))
    (tmp_path / "short.txt").write_text("Too short.")
    with complains(EmptySelection, at="text"):
        run(text=str(tmp_path / "short.txt"))
    with complains(EmptySelection, at="control_text"):
        run(control_text=str(tmp_path / "short.txt"))
    with complains(BadFile, "the loss became", "lower learning_rate"):
        run(learning_rate=1e30)


def test_perplexity_by_hand() -> None:
    """The next token gets probability 1/2 where the current one is even, 1/8 where it is odd."""

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            probability = torch.where(input_ids % 2 == 0, 1 / 2, 1 / 8)
            logits = torch.log((1 - probability) / 7)[..., None].expand(*input_ids.shape, 8).clone()
            following = input_ids.roll(-1, dims=1)[..., None]
            return SimpleNamespace(logits=logits.scatter(2, following, probability.log()[..., None]))

    rows = np.array([[2, 1, 4], [6, 2, 3]], dtype=np.int32)  # 1/2 1/8; 1/2 1/2
    expected = (2 * 8 * 2 * 2) ** (1 / 4)
    for batch_size in (1, 8):
        assert perplexity(Half(), rows, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


def test_rows_longer_than_the_model_are_refused(config: FinetuneConfig, tmp_path: Path, complains: Any) -> None:
    with complains(ConfigError, "rows have 129 tokens", "takes 128", at="context_size"):
        finetune(config.model_copy(update={"context_size": 129}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_random_sample_of_documents(config: FinetuneConfig, tiny_llama: LanguageModel) -> None:
    rows = finetuning._pack_rows(config.model_copy(update={"documents": 5}), tiny_llama)
    every = finetuning._pack_rows(config, tiny_llama)
    assert 0 < len(rows[""].ids) < len(every[""].ids)
    np.testing.assert_array_equal(rows[""].ids, every[""].ids[: len(rows[""].ids)])
    np.testing.assert_array_equal(rows["training"].ids, every["training"].ids)
    other = finetuning._pack_rows(config.model_copy(update={"documents": 5, "seed": 1}), tiny_llama)
    assert not np.array_equal(rows[""].ids[0], other[""].ids[0])
