"""A study that says how its SAEs are trained: the arms' recipes, what `check` finds, and the paper's own study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from saeffect.config import StudyConfig
from saeffect.config_steering import PAPER_PROTOCOL
from saeffect.errors import ConfigError, NotFound, UnknownName
from saeffect.study.check import check_study
from saeffect.study.run import run_study
from saeffect.study.study import Study, bundled_studies
from saeffect.study.training import arm_folder, arm_recipe, check_training
from tiny_study import HOOK, make_study

GPT2 = ("gpt2-medical", "gpt2-medical-paper", "gpt2-medical-lora", "gpt2-medical-lora-paper")
TRAINING: dict[str, Any] = {
    "text": [{"name": "general", "path": "./other.jsonl"}],
    "tokens": 1024,
    "held_out_tokens": 128,
    "context_size": 16,
    "sae": {"d_sae": 64, "k": 4, "batch_size": 128},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_study(folder)
    return folder


def opened(folder: Path, **changes: Any) -> Study:
    raw = yaml.safe_load((folder / "study.yaml").read_text())
    for arm in raw["arms"].values():
        arm["hook"] = HOOK
    raw["training"] = TRAINING
    for key, value in changes.items():
        if key in raw["arms"]:
            raw["arms"][key] |= value
        else:
            raw[key] = value
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return Study.open(path)


def test_arm_recipe_has_model_hook_and_changes(folder: Path) -> None:
    study = opened(folder, placebo={"training": {"seed": 1}})
    control, placebo, treatment = (arm_recipe(study, arm) for arm in ("control", "placebo", "treatment"))
    assert control.hook == HOOK
    assert control.model.path == str(folder / "base")
    assert treatment.model.path == str(folder / "tuned")
    assert control.text[0].path == str(folder / "other.jsonl"), "paths are relative to the study file"
    assert (control.sae.seed, placebo.sae.seed) == (0, 1)
    assert placebo.sae.model_copy(update={"seed": 0}) == control.sae
    assert arm_folder(study, "control") == folder / "saes" / "control"
    assert check_training(study) == "training: control topk 64, treatment topk 64, placebo topk 64"
    checked = check_study(study)
    assert "training: control topk 64" in checked.lines[0]
    shown = checked.text.index(f"training, general: {folder / 'other.jsonl'}")
    assert len(checked.text[shown + 1 :]) == 3 and checked.text[shown + 1].startswith("  1  ")
    elsewhere = opened(folder, training=TRAINING | {"text": [{"name": "general", "path": "./not_here.jsonl"}]})
    assert "cannot be read here: there is no text file" in check_study(elsewhere).text[-1]


def test_a_study_without_the_section_trains_nothing(folder: Path, complains: Any) -> None:
    study = Study.open(folder / "study.yaml")
    assert check_training(study) is None
    with complains(ConfigError, "does not say how", at="study.yaml, training"):
        arm_recipe(study, "control")


@pytest.mark.parametrize(
    ("changes", "kind", "message", "at"),
    [
        ({"training": TRAINING | {"hook": HOOK}}, ConfigError, "the key hook", "changed.yaml, training.hook"),
        ({"training": TRAINING | {"saes": {"a": {}}}}, ConfigError, "the key saes", "training.saes"),
        ({"training": TRAINING | {"token": 5}}, UnknownName, "did you mean 'tokens'", "changed.yaml, training, token"),
        ({"training": TRAINING | {"sae": {"d_sae": 2}}}, ConfigError, "k=32 is more than", "changed.yaml, training"),
        ({"control": {"training": {"k": 65}}}, ConfigError, "k=65 is more than", "arms.control.training"),
        ({"control": {"training": {"kk": 1}}}, UnknownName, "'kk'", "arms.control.training"),
        ({"control": {"hook": None}}, ConfigError, "its hook must be known", "arms.control.hook"),
        ({"training": None, "control": {"training": {"k": 5}}}, ConfigError, "does not say how", "training"),
    ],
)
def test_check_finds_errors_in_training_section(
    changes: dict[str, Any], kind: type, message: str, at: str, folder: Path, complains: Any
) -> None:
    with complains(kind, message, at=at):
        check_study(opened(folder, **changes))


def test_missing_sae_error_names_the_training_command(folder: Path, tmp_path: Path, complains: Any) -> None:
    study = opened(folder, treatment={"sae": "./saes/not yet"})
    command = f"train it: saeffect train-sae {folder / 'changed.yaml'} --arm treatment"
    with complains(NotFound, "no SAE folder", command, at="changed.yaml, arms.treatment.sae"):
        run_study(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with complains(NotFound, "train it: saeffect train-sae bundled:gpt2-medical --arm control"):
        Study.open("bundled:gpt2-medical").sae_folder("control")
    with complains(NotFound, "relative to the study file"):
        opened(folder, training=None, treatment={"sae": "./saes/not yet"}).sae_folder("treatment")


def test_every_bundled_study_is_valid() -> None:
    assert bundled_studies() == sorted([*GPT2, "smollm2-medical"])
    for name in bundled_studies():
        study = Study.open(f"bundled:{name}")
        check_training(study)
        assert study.reference == f"bundled:{name}"
        for arm in study.config.arms.values():
            assert not arm.sae.startswith(str(study.source.parent)), "nothing is written into the package"


# The number, and where it stands: the paper's methods, results or appendix ("Custom SAE Training", by item), the
# cfg.json of the SAE that its authors published, or that of their steering runs.
PAPER: dict[str, tuple[Any, str]] = {
    "context_size": (512, "appendix 4"),
    "activations": ("streamed", "appendix 4"),
    "text.0.path": ("monology/pile-uncopyrighted", "appendix 4"),
    "pool_rows": (64 * 16, "cfg.json: n_batches_in_buffer, store_batch_size_prompts"),
    "sae.architecture": ("standard", "methods: squared error and an L1 penalty"),
    "sae.d_sae": (24_576, "results: the same number of features, 24,576; cfg.json"),
    "sae.steps": (30_000, "appendix 1"),
    "sae.batch_size": (2_048, "appendix 1: 61,440,000 tokens; cfg.json"),
    "sae.learning_rate": (5e-5, "appendix 1"),
    "sae.schedule": ("constant", "appendix 1"),
    "sae.warmup_share": (0.0, "cfg.json: lr_warm_up_steps"),
    "sae.adam_beta1": (0.9, "appendix 1"),
    "sae.adam_beta2": (0.999, "appendix 1"),
    "sae.l1_coefficient": (5.0, "appendix 3"),
    "sae.penalty_warmup_share": (1 / 20, "appendix 3"),
    "sae.b_dec_init": ("zeros", "methods (1)"),
    "sae.decoder_rows": ("free", "methods (2)"),
    "sae.decoder_init_norm": (0.1, "methods (3): SAELens' heuristic"),
    "sae.normalise_inputs": ("expected_average_only_in", "methods (4)"),
    "sae.apply_b_dec_to_input": (False, "cfg.json"),
    "sae.dead_window": (1_000, "methods"),
    "sae.dead_threshold": (1e-4, "methods"),
    "sae.dead_after": (1_000 * 2_048, "cfg.json: dead_feature_window"),
    "sae.metrics_every": (30, "appendix 6"),
    "sae.evaluate_every": (20 * 30, "appendix 6"),
    "sae.seed": (42, "cfg.json"),
}


@pytest.mark.parametrize("key", PAPER)
def test_the_paper_s_numbers(key: str) -> None:
    recipe = arm_recipe(Study.open("bundled:gpt2-medical"), "treatment")
    value: Any = recipe.model_dump()
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    expected, source = PAPER[key]
    assert value == pytest.approx(expected) if isinstance(expected, float) else value == expected, source


def test_the_paper_s_tokens_warm_up_and_resampling() -> None:
    study = Study.open("bundled:gpt2-medical")
    recipes = {arm: arm_recipe(study, arm) for arm in study.config.arms}
    sae = recipes["control"].sae
    assert sae.steps is not None
    assert sae.steps * sae.batch_size == 61_440_000
    assert int(sae.penalty_warmup_share * sae.steps) == 1_500
    assert sae.d_sae == 768 * 32
    assert sae.resample_every is not None
    assert recipes["control"].tokens is None, "the text is as long as it is"
    alike = [
        r.model_copy(update={"model": None, "sae": r.sae.model_copy(update={"seed": 0})}) for r in recipes.values()
    ]
    assert alike[0] == alike[1] == alike[2], "arms differ in model and seed alone"
    assert {r.hook for r in recipes.values()} == {"blocks.8.hook_resid_pre"}
    assert recipes["placebo"].sae.seed != sae.seed


@pytest.mark.parametrize("name", ["gpt2-medical-paper", "gpt2-medical-lora-paper"])
def test_the_paper_s_own_protocol(name: str) -> None:
    config: StudyConfig = Study.open(f"bundled:{name}").config
    assert {arm.role for arm in config.arms.values()} == {"control", "treatment"}, "the paper has no placebo"
    assert config.arms["control"].model.path == "gpt2"
    assert str(config.arms["control"].sae).endswith("saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert (config.features.top_k, config.features.projection) == (10, "dot")
    assert (config.selection.min_matches, config.coherence.embeddings) == (2, "glove-wiki-gigaword-100")
    assert config.text.bos == "always"
    steering = config.steering
    assert steering is not None
    assert steering.protocol == "paper"
    assert all(getattr(steering, key) == value for key, value in PAPER_PROTOCOL.items())
    assert "paper_pass_rate" in config.comparison.tests


@pytest.mark.parametrize("name", ["gpt2-medical", "gpt2-medical-lora"])
def test_the_same_pairs_by_ours(name: str) -> None:
    config: StudyConfig = Study.open(f"bundled:{name}").config
    assert "placebo" in {arm.role for arm in config.arms.values()}
    steering = config.steering
    assert steering is not None
    assert (steering.protocol, steering.unit, steering.positions) == ("rigorous", "residual_norm", "all")
    assert len(steering.prompts) >= 6, "prompts are the units of the test"
    assert {"random", "matched"} <= set(steering.placebos)


def test_the_pairs_are_the_paper_s_two() -> None:
    arms = {name: Study.open(f"bundled:{name}").config.arms["treatment"].model for name in GPT2}
    assert {n: m.path for n, m in arms.items()} == {
        n: "gpt2" if "lora" in n else "Sharathhebbar24/Med_GPT2" for n in GPT2
    }
    assert {str(m.adapter).endswith("/adapters/gpt2-medical-lora") for n, m in arms.items() if "lora" in n} == {True}


def test_all_four_train_by_one_recipe() -> None:
    recipes = [Study.open(f"bundled:{name}").config.training for name in GPT2]
    assert all(recipe == recipes[0] for recipe in recipes)
