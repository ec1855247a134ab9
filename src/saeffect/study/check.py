"""Validate a study without computing: names, files, shapes, tokenizers, disk, and the design."""

from __future__ import annotations

import filecmp
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.comparison import check_tests
from saeffect.comparison.design import design_check
from saeffect.config import ModelConfig
from saeffect.errors import ConfigError, EmptySelection, SaeffectError
from saeffect.features.embeddings import load_embeddings
from saeffect.features.vocabulary import Vocabulary, load_vocabulary
from saeffect.io import SILENT, Log
from saeffect.lm.accounting import loading_errors, quiet_transformers
from saeffect.lm.adapters import read_adapter, require_fit
from saeffect.lm.corpora import read_corpus
from saeffect.lm.hooks import parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_config, locate_adapter, locate_model, model_shape
from saeffect.lm.tokens import known_tokens, token_texts
from saeffect.sae.formats import load_sae
from saeffect.study.arm_tables import arm_facts
from saeffect.study.check_tokenizers import check_prompt, check_tokenizers
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.seeds import open_seeds
from saeffect.study.stages.selection import study_verdicts
from saeffect.study.stages.steering_plan import outcome_vectors
from saeffect.study.study import Study, require_width
from saeffect.study.texts import beginning, shortage, study_rows
from saeffect.study.training import check_training

__all__ = ["CheckResult", "check_study"]

_COUNTED = 2_000_000  # tokens of text; more take minutes, and are hardly too few


@dataclass(frozen=True, eq=False)
class CheckResult:
    """What a check found; a study with an error does not get this far.

    Attributes:
        lines: What was checked, a line each.
        design: The design check: in what the arms differ besides the model.
    """

    lines: tuple[str, ...]
    design: pd.DataFrame


def check_study(study: Study, out: Path | str | None = None, log: Log = SILENT) -> CheckResult:
    """Check everything that can be checked without running a model.

    Args:
        study: The study.
        out: Where the run is to go.
        log: Receives a line if the embedded model must be fetched.

    Raises:
        SaeffectError: The first thing that is wrong.
    """
    lines: list[str] = []
    training = check_training(study)
    if training is not None:
        lines.append(training)
    for name in study.config.arms:
        lines += _check_arm(study, name, log)
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
    lines.append(f"vocabulary {vocabulary.name}: {_matchable(study, vocabulary)}")
    vectors = _placed(study, ("coherence", "embeddings"), lambda: load_embeddings(config.coherence.embeddings))
    lines.append(f"embeddings {vectors.name}: {len(vectors):,} words")
    lines += _check_steering(study)
    verdicts = _placed(study, ("selection", "verdicts"), lambda: study_verdicts(study))
    if verdicts is not None:
        lines.append(f"verdicts: {len(verdicts)} by {verdicts['rater'].nunique()} raters")
    lines.append(f"text: {_check_text(study)}")
    if out is not None:
        RunFolder(out, study).refuse_foreign()
        lines.append(_check_disk(study, Path(out)))
    design = design_check({name: arm_facts(study, name) for name in config.arms})
    return CheckResult(tuple(lines), design)


def _check_arm(study: Study, name: str, log: Log) -> list[str]:
    arm = study.config.arms[name]
    at = study.at("arms", name)
    model = locate_model(arm.model, log=log, at=f"{at}.model")
    adapter = _check_adapter(arm.model, model, f"{at}.model")
    sae = load_sae(study.sae_folder(name), at=f"{at}.sae")
    hook = study.hook(name)
    parse_hook(hook, at=f"{at}.hook")
    shape = model_shape(model)
    if shape is not None:
        parse_hook(hook, shape.n_layers, at=f"{at}.hook")
        require_width(sae.cfg, shape.d_model, hook, arm.model.path, at=f"{at}.sae")
    first = f"arm {name} ({arm.role}): {sae.cfg.architecture} SAE, {sae.cfg.d_in} × {sae.cfg.d_sae:,}, at {hook}"
    return [first, *(f"warning: arm {name}: {line}" for line in (adapter, _same_files(study, name, model)) if line)]


def _check_adapter(config: ModelConfig, model: Path | str, at: str) -> str | None:
    """Open an adapter, and compare it with a base model that is on this machine; a line if it names another one."""
    place, where = locate_adapter(config, at=at), f"{at}.adapter"
    if place is None:
        return None
    adapter = read_adapter(place, where)
    if isinstance(model, Path) and (model / "config.json").is_file() and not config.trust_remote_code:
        with quiet_transformers(), loading_errors(config, at, model):
            require_fit(adapter, load_config(model, config), where)
    return adapter.other_base(config.path)


def _same_files(study: Study, name: str, model: Path | str) -> str | None:
    """A line if the treatment's weights are, byte by byte, those of the control."""
    arms = study.config.arms
    control = arms[study.by_role("control")[0]].model
    if arms[name].role != "treatment" or control.adapter or arms[name].model.adapter:
        return None
    other = locate_model(control)
    if not isinstance(model, Path) or not isinstance(other, Path):
        return None
    ours, theirs = _weight_files(model), _weight_files(other)
    if not ours or len(ours) != len(theirs):
        return None
    if not all(filecmp.cmp(a, b, shallow=False) for a, b in zip(ours, theirs, strict=True)):
        return None
    return "its weights are those of the control, so nothing can come from fine-tuning"


def _weight_files(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(p for p in model.iterdir() if p.suffix in (".safetensors", ".gguf"))


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


def _matchable(study: Study, vocabulary: Vocabulary) -> str:
    """How many of the words can be found: a feature's top tokens are single tokens.

    Raises:
        EmptySelection: Not one can.
    """
    known = known_tokens(study.tokens.tokenizer)
    never = vocabulary.unmatched(token_texts(study.tokens.tokenizer, max(known) + 1))
    some = f"such as {', '.join(never[:3])}" if never else ""
    if len(never) == len(vocabulary):
        raise EmptySelection(
            f"not one of the {len(never):,} words is a token of these models, {some}; no feature could match.",
            at=study.at("selection", "vocabulary"),
            fix="use words as they stand in texts, one a line; most tokenizers have only common words whole.",
        )
    said = f"{len(vocabulary):,} words"
    return f"{said}, of which {len(never):,} can never match, no token being one of them, {some}" if never else said


def _check_text(study: Study) -> str:
    """Open every source, and count the tokens of those on this machine."""
    text = study.config.text
    for index, source in enumerate(text.sources):
        documents = read_corpus(source.path, field=source.field)
        _placed(study, ("text", "sources", str(index)), partial(next, documents))
    called = f"bundled {text.bundled}" if text.bundled else ", ".join(source.name for source in text.sources)
    if not all(Path(source.path).exists() for source in text.sources):
        return f"{called}; not counted, since it is on the hub"
    some = text.model_copy(update={"tokens": min(text.tokens, _COUNTED)})
    lm = LanguageModel(None, study.tokens.tokenizer, "control", prepend_bos=study.prepend_bos)
    rows = _placed(study, ("text",), lambda: study_rows(some, lambda: lm, prepend_bos=lm.prepend_bos))
    short = shortage(text, rows) if len(rows) * rows.ids.shape[1] < some.tokens else ""
    return f"{called}; only {short}" if short else called


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
