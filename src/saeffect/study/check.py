"""Validate a study without computing: names, files, shapes, tokenizers, disk, and the design."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.comparison import check_tests
from saeffect.comparison.design import design_check
from saeffect.errors import ConfigError, NotFound, SaeffectError
from saeffect.features.embeddings import load_embeddings
from saeffect.features.vocabulary import load_vocabulary
from saeffect.models.hooks import parse_hook
from saeffect.models.loading import (
    bundled_path,
    locate_adapter,
    locate_model,
    model_shape,
)
from saeffect.sae.saelens_format import load_sae
from saeffect.study.arm_tables import arm_facts
from saeffect.study.check_tokenizers import check_prompt, check_tokenizers
from saeffect.study.seeds import open_seeds
from saeffect.study.selection import study_verdicts
from saeffect.study.steering_plan import outcome_vectors
from saeffect.study.study import Say, Study, require_width
from saeffect.study.texts import beginning
from saeffect.study.training import check_training

__all__ = ["CheckResult", "check_study"]


@dataclass(frozen=True, eq=False)
class CheckResult:
    """What a check found; a study with an error does not get this far.

    Attributes:
        lines: What was checked, a line each.
        design: The design check: in what the arms differ besides the model.
    """

    lines: tuple[str, ...]
    design: pd.DataFrame


def check_study(study: Study, out: Path | str | None = None, say: Say = lambda line: None) -> CheckResult:
    """Check everything that can be checked without running a model.

    Args:
        study: The study.
        out: Where the run is to go.
        say: Receives a line if the embedded model must be fetched.

    Raises:
        SaeffectError: The first thing that is wrong.
    """
    lines: list[str] = []
    training = check_training(study)
    if training is not None:
        lines.append(training)
    for name in study.config.arms:
        lines.append(_check_arm(study, name, say))
        further = open_seeds(study, name)
        if further:
            lines.append(f"arm {name}: further seeds {', '.join(one.name for one in further)}")
    lines += check_tokenizers(study)
    begins, others = _placed(
        study, ("text",), lambda: beginning(study.prepend_bos, study.bos_words, study.tokens.tokenizer)
    )
    lines.append(f"{begins}; otherwise: {others}" if others else begins)
    config = study.config
    _placed(study, ("comparison", "tests"), lambda: check_tests(config.comparison.tests))
    lines.append(f"declared tests: {', '.join(config.comparison.tests)}")
    vocabulary = _placed(study, ("selection", "vocabulary"), lambda: load_vocabulary(config.selection.vocabulary))
    lines.append(f"vocabulary {vocabulary.name}: {len(vocabulary):,} words")
    vectors = _placed(study, ("coherence", "embeddings"), lambda: load_embeddings(config.coherence.embeddings))
    lines.append(f"embeddings {vectors.name}: {len(vectors):,} words")
    lines += _check_steering(study)
    verdicts = _placed(study, ("selection", "verdicts"), lambda: study_verdicts(study))
    if verdicts is not None:
        lines.append(f"verdicts: {len(verdicts)} by {verdicts['rater'].nunique()} raters")
    lines.append(_check_text(study))
    if out is not None:
        lines.append(_check_disk(study, Path(out)))
    design = design_check({name: arm_facts(study, name) for name in config.arms})
    return CheckResult(tuple(lines), design)


def _check_arm(study: Study, name: str, say: Say) -> str:
    arm = study.config.arms[name]
    at = study.at("arms", name)
    model = locate_model(arm.model, say=say, at=f"{at}.model")
    locate_adapter(arm.model, at=f"{at}.model")
    sae = load_sae(study.sae_folder(name), at=f"{at}.sae")
    hook = study.hook(name)
    parse_hook(hook, at=f"{at}.hook")
    shape = model_shape(model)
    if shape is not None:
        parse_hook(hook, shape.n_layers, at=f"{at}.hook")
        require_width(sae.cfg, shape.d_model, hook, arm.model.path, at=f"{at}.sae")
    return f"arm {name} ({arm.role}): {sae.cfg.architecture} SAE, {sae.cfg.d_in} × {sae.cfg.d_sae:,}, at {hook}"


def _check_steering(study: Study) -> list[str]:
    """What is declared, the prompts, the encoder of texts, and whether the features to steer together are there."""
    steering = study.config.steering
    if steering is None:
        return []
    for key in ("prompts", "search_prompts"):
        for prompt in getattr(steering, key):
            check_prompt(study, key, prompt, study.tokens.tokenizer.encode(prompt, add_special_tokens=False))
    for name, sets in steering.together.items():
        d_sae = study.sae_config(name).d_sae
        beyond = [f for some in sets for f in some if not 0 <= f < d_sae]
        if beyond:
            raise ConfigError(
                f"there is no feature {beyond[0]}; the SAE has features 0 to {d_sae - 1}.",
                at=study.at("steering", "together", name),
            )
    if steering.outcome_encoder is not None:
        _placed(study, ("steering", "outcome_encoder"), lambda: outcome_vectors(study))
    placebos = " and ".join(steering.placebos) or "nothing"
    return [f"steering: {steering.operator}, tested against {placebos}; outcomes: {', '.join(steering.outcomes)}"]


def _check_text(study: Study) -> str:
    text = study.config.text
    if text.bundled is not None:
        bundled_path("texts", text.bundled, at=study.at("text", "bundled"))
        return f"text: bundled {text.bundled}"
    for index, source in enumerate(text.sources):
        path = Path(source.path)
        if (path.suffix or path.is_absolute() or source.path.count("/") != 1) and not path.is_file():
            raise NotFound(f"there is no text file {source.path!r}.", at=study.at("text", "sources", str(index)))
    return f"text: {', '.join(s.name for s in text.sources)}"


def _check_disk(study: Study, out: Path) -> str:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(
            f"{place} is a file, so no run can be written there.", at="--out", fix="choose another folder."
        )
    # Six contexts of some 33 tokens a feature dominate: about 2 kB each after compression.
    needed = 2_000 * sum(study.sae_config(name).d_sae for name in study.config.arms) + 50_000_000
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"{free / 1e6:.0f} MB are free, about {needed / 1e6:.0f} MB are needed.",
            at=str(place),
            fix="make room.",
        )
    return f"disk: about {needed / 1e6:.0f} MB needed, {free / 1e9:.0f} GB free"


def _placed(study: Study, keys: tuple[str, ...], load: Any) -> Any:
    try:
        return load()
    except SaeffectError as error:
        raise error.placed(study.at(*keys)) from None
