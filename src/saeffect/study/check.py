"""Validate a study without running a model: names, files, shapes, tokenizers, disk space, design."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from saeffect.comparison import check_tests
from saeffect.comparison.design import design_check
from saeffect.config import ModelConfig
from saeffect.config_chat import Prompt, prompt_text
from saeffect.errors import ConfigError, EmptySelection, IncompatibleModels, placed
from saeffect.features.embeddings import load_embeddings
from saeffect.features.vocabulary import Vocabulary, load_vocabulary
from saeffect.lm.accounting import loading_errors, quiet_transformers
from saeffect.lm.adapters import read_adapter, require_fit
from saeffect.lm.architectures import HOOK_Z
from saeffect.lm.hooks import parse_hook
from saeffect.lm.loading import (
    ModelShape,
    check_weights,
    load_config,
    locate_adapter,
    locate_model,
    model_shape,
    resolve_device,
    usable_device,
)
from saeffect.lm.tokens import known_tokens, separator_id, token_texts
from saeffect.progress import SILENT, Log
from saeffect.sae.formats import load_sae
from saeffect.steering.operators import steered_tokens
from saeffect.study.check_text import chat_lines, check_text, duplicates_in_training, first_rows, template_words
from saeffect.study.finished import html_of
from saeffect.study.nulls import check_nulls
from saeffect.study.review import store_digest
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.compare import arm_facts
from saeffect.study.stages.dose_search import outcome_vectors
from saeffect.study.stages.features import open_seeds
from saeffect.study.stages.select import study_verdicts
from saeffect.study.study import Study, require_width
from saeffect.study.texts import beginning, study_rows
from saeffect.study.training import arm_recipe, check_training

__all__ = ["CheckResult", "check_context", "check_study"]


@dataclass(frozen=True, eq=False)
class CheckResult:
    """Result of a check without errors: what was checked, how the arms differ besides the model, and for each source of
    text a line and its first rows.
    """

    lines: tuple[str, ...]
    design: pd.DataFrame
    text: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        return html_of((*self.lines, *self.text), self.design)


def check_study(study: Study, out: Path | str | None = None, log: Log = SILENT) -> CheckResult:
    """Check all that can be checked without running a model; SaeffectError for the first problem."""
    config, lines = study.config, list[str]()
    training = check_training(study)
    if training is not None:
        lines.append(training)
    checked: list[ModelConfig] = []
    for name, arm in config.arms.items():
        lines += _check_arm(study, name, log)
        base = arm.model.model_copy(update={"adapter": None})
        if base not in checked:  # most arms share one
            checked.append(base)
            location = f"{study.at('arms', name)}.model"
            check_weights(locate_model(base, at=location), base, location)
        seeds = open_seeds(study, name) if config.arms[name].more_saes else []
        if seeds:
            lines.append(f"arm {name}: further seeds {', '.join(seed.name for seed in seeds)}")
    lines += _check_sizes(study)
    lines += _check_tokenizers(study)
    with placed(study.at("text")):
        start, conflicts = beginning(study.prepend_bos, study.bos_words, study.tokens.tokenizer, study.chat)
    lines.append(f"{start}; otherwise: {conflicts}" if conflicts else start)
    if study.chat is not None:
        lines.append(f"chats are written by {template_words(study)}")
    with placed(study.at("comparison", "tests")):
        check_tests(config.comparison.tests)
    lines.append(f"declared tests: {', '.join(config.comparison.tests)}")
    with placed(study.at("selection", "vocabulary")):
        vocabulary = load_vocabulary(config.selection.vocabulary)
    if vocabulary.words:
        lines.append(f"vocabulary {vocabulary.name}: {_vocabulary_words(study, vocabulary)}")
    with placed(study.at("coherence", "embeddings")):
        vectors = load_embeddings(config.coherence.embeddings)
    lines.append(f"embeddings {vectors.name}: {len(vectors):,} words")
    lines += _check_steering(study)
    lines.append(check_nulls(study))
    with placed(study.at("selection", "verdicts")):
        verdicts = study_verdicts(study)
    if verdicts is not None:
        lines.append(f"verdicts: {len(verdicts)} by {verdicts['rater'].nunique()} raters")
    elif out is not None and store_digest(out) is not None:
        lines.append("verdicts: those of the review in the run directory, once each candidate has one")
    lines.append(f"text: {check_text(study)}")
    if study.config.text.format == "chat":
        lines += chat_lines(study)
    repeats = duplicates_in_training(study)
    if repeats:
        lines.append(f"warning: training.text: {repeats}")
    if out is not None:
        RunFolder(out, study).refuse_foreign()
        lines.append(_check_disk(study, Path(out)))
    # Without SAEs, arms differ in the model alone.
    arms = {name: arm_facts(study, name) for name in config.arms} if study.has_saes else {}
    design = design_check(arms) if arms else pd.DataFrame(columns=["status"])
    return CheckResult(tuple(lines), design, tuple(first_rows(study)))


def _check_arm(study: Study, name: str, log: Log) -> list[str]:
    arm = study.config.arms[name]
    at = study.at("arms", name)
    model = locate_model(arm.model, log=log, at=f"{at}.model")
    adapter = _check_adapter(arm.model, model, f"{at}.model")
    sae = load_sae(study.sae_folder(name), at=f"{at}.sae") if study.has_saes else None
    hook = study.hook(name)
    parse_hook(hook, at=f"{at}.hook")
    shape = model_shape(model)
    if shape is not None:
        parse_hook(hook, shape.n_layers, at=f"{at}.hook")
    if shape is not None and sae is not None and not hook.endswith(HOOK_Z):  # whose width only the model shows
        require_width(sae.cfg, shape.d_model, hook, arm.model.path, at=f"{at}.sae")
    sae_text = "no SAE" if sae is None else f"{sae.cfg.architecture} SAE, {sae.cfg.d_in} × {sae.cfg.d_sae:,}"
    first = f"arm {name} ({arm.role}): {sae_text}, at {hook}"
    warnings = (adapter, _same_files(study, name, model), _missing_device(arm.model, f"{at}.model"))
    return [first, *(f"warning: arm {name}: {line}" for line in warnings if line)]


def _missing_device(config: ModelConfig, at: str) -> str | None:
    """A line if this machine lacks the model's device; no error, since the study may run on another one."""
    resolve_device(config.device, at=at)
    try:
        usable_device(config)
    except ConfigError as error:
        return error.message.rstrip(".")
    return None


def _check_adapter(config: ModelConfig, model: Path | str, at: str) -> str | None:
    """Open an adapter and compare it with a local base model; a line if it names another base."""
    folder, location = locate_adapter(config, at=at), f"{at}.adapter"
    if folder is None:
        return None
    adapter = read_adapter(folder, location)
    if isinstance(model, Path) and (model / "config.json").is_file() and not config.trust_remote_code:
        with quiet_transformers(), loading_errors(config, at, model):
            require_fit(adapter, load_config(model, config, at), location)
    return adapter.other_base(config.path)


def _same_files(study: Study, name: str, model: Path | str) -> str | None:
    """A line if the treatment's weights are byte for byte the control's."""
    arms = study.config.arms
    control = arms[study.control].model
    if arms[name].role != "treatment" or control.adapter or arms[name].model.adapter:
        return None
    control_path = locate_model(control)
    if not isinstance(model, Path) or not isinstance(control_path, Path):
        return None
    model_files, control_files = _weight_files(model), _weight_files(control_path)
    if not model_files or len(model_files) != len(control_files):
        return None
    if not all(filecmp.cmp(a, b, shallow=False) for a, b in zip(model_files, control_files, strict=True)):
        return None
    return "its weights are those of the control, so nothing can come from fine-tuning"


def _weight_files(model: Path) -> list[Path]:
    files = [model] if model.is_file() else sorted(p for p in model.iterdir() if p.suffix in (".safetensors", ".gguf"))
    return [path for path in files if path.is_file()]


def _check_steering(study: Study) -> list[str]:
    """Check the declared tests, the prompts, the text encoder, and the features to steer together."""
    steering = study.config.steering
    if steering is None:
        return []
    for key in ("prompts", "search_prompts"):
        for prompt in getattr(steering, key):
            _check_prompt(study, key, prompt)
    for name, sets in steering.together.items():
        d_sae = study.sae_config(name).d_sae
        invalid = [feature for members in sets for feature in members if not 0 <= feature < d_sae]
        if invalid:
            raise ConfigError(
                f"there is no feature {invalid[0]}; the SAE has features 0 to {d_sae - 1}.",
                at=study.at("steering", "together", name),
            )
    if steering.outcome_encoder is not None:
        with placed(study.at("steering", "outcome_encoder")):
            outcome_vectors(study)
    placebos = " and ".join(steering.placebos) or "nothing"
    return [f"steering: {steering.operator}, tested against {placebos}; outcomes: {', '.join(steering.outcomes)}"]


def _vocabulary_words(study: Study, vocabulary: Vocabulary) -> str:
    """How many words can be a top token; the others are not single tokens."""
    names = known_tokens(study.tokens.tokenizer)  # of which the highest may be in the billions
    unmatched = vocabulary.unmatched(token_texts(study.tokens.tokenizer, names))
    examples = f"such as {', '.join(unmatched[:3])}" if unmatched else ""
    if len(unmatched) == len(vocabulary):
        raise EmptySelection(
            f"not one of the {len(unmatched):,} words is a token of these models, {examples}; no feature could match.",
            at=study.at("selection", "vocabulary"),
            fix="use words as they stand in texts, one a line; most tokenizers have only common words whole.",
        )
    text = f"{len(vocabulary):,} words"
    return (
        f"{text}, of which {len(unmatched):,} can never match, no token being one of them, {examples}"
        if unmatched
        else text
    )


def _check_disk(study: Study, out: Path) -> str:
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        message = f"{existing} is a file, so no run can be written there."
        raise ConfigError(message, at="--out", fix="choose another folder.")
    # Six contexts of some 33 tokens a feature dominate: about 2 kB each after compression.
    arms = study.config.arms if study.has_saes else ()
    needed = 2_000 * sum(study.sae_config(name).d_sae for name in arms) + 50_000_000
    free = shutil.disk_usage(existing).free
    if free < needed:
        message = f"{free / 1e6:.0f} MB are free, about {needed / 1e6:.0f} MB are needed."
        raise ConfigError(message, at=str(existing), fix="make room.")
    return f"disk: about {needed / 1e6:.0f} MB needed, {free / 1e9:.0f} GB free"


def _check_tokenizers(study: Study) -> list[str]:
    """Lines comparing the tokenizers of the arms, and the text with the models' vocabularies."""
    tokens = study.tokens
    lines = [f"arm {arm}'s own tokenizer {difference.words()}" for arm, difference in tokens.differences.items()]
    if tokens.differences:
        n = len(known_tokens(tokens.tokenizer) if tokens.shared is None else tokens.shared)
        lines.append(f"every arm reads the control's tokens; top tokens are ranked over the {n:,} that all have")
    else:
        lines.append("every arm has the same tokens and cuts text alike")
    if study.config.text.sources:
        with placed(study.at("text", "sources")):
            separator_id(tokens.tokenizer)
    shapes = _shapes(study)
    check_context(study)
    return lines + _check_embedded(study, shapes)


def _check_prompt(study: Study, key: str, prompt: Prompt) -> None:
    """Refuse a prompt without positions to steer and write at."""
    steering, at, text = study.steering, study.at("steering", key), prompt_text(prompt)
    lm = study.reader
    with placed(at):
        ids = lm.encode_prompt(prompt)
        if steering.positions not in ("all", "generated", "prompt"):
            steered = steered_tokens(steering.positions, lm.prompt_parts(prompt), lm.n_bos(ids))
            if not steered.any():
                raise ConfigError(
                    f"no token of the prompt {text[:60]!r} is at positions: {steering.positions}.",
                    fix="give prompts that have such a turn, or choose other positions.",
                )
    n_tokens = len(ids) - lm.n_bos(ids)
    if n_tokens == 0:
        fix = "write something, or leave it out."
        raise ConfigError(f"the prompt {text!r} has no tokens; expected at least one.", at=at, fix=fix)
    if n_tokens == 1 and steering.positions == "prompt":
        raise ConfigError(
            f"the prompt {text!r} is one token, and positions: prompt steers at all of its tokens but the last;"
            " expected at least two tokens.",
            at=at,
            fix="use a longer prompt, or positions: all or generated.",
        )
    shapes = _shapes(study)
    n_total = len(ids) + steering.max_new_tokens
    positions = min((shape.n_positions for shape in shapes.values() if shape.n_positions), default=None)
    if positions is not None and n_total > positions:
        raise ConfigError(
            f"the prompt {text[:40]!r} and its text come to {n_total:,} tokens, but the model takes {positions:,}.",
            at=at,
            fix="use a shorter prompt, or fewer max_new_tokens.",
        )
    for arm, shape in shapes.items():
        _refuse_unembedded(study, arm, shape, ids, f"the prompt {text[:40]!r}", at)


def _shapes(study: Study) -> dict[str, ModelShape]:
    """Shapes by arm, where a config.json gives them."""
    shapes = {name: model_shape(locate_model(arm.model)) for name, arm in study.config.arms.items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _check_sizes(study: Study) -> list[str]:
    """A line if the models differ in width or depth; without SAEs, IncompatibleModels: nothing could be compared."""
    widths = {name: (shape.d_model, shape.n_layers) for name, shape in _shapes(study).items()}
    if len(set(widths.values())) <= 1:
        return []
    sizes = ", ".join(f"{name} {width} × {layers}" for name, (width, layers) in widths.items())
    if not study.has_saes:
        raise IncompatibleModels(
            f"the models differ in width or depth: {sizes}.",
            at=study.at("arms"),
            fix="compare a model with its own fine-tune.",
        )
    return [f"the models differ in width or depth ({sizes}): only their separate SAEs are compared, nothing is named"]


def check_context(study: Study) -> None:
    """ConfigError if rows of the study's or the training text are longer than a model's positions."""
    for arm, shape in _shapes(study).items():
        context_sizes = {"text": study.config.text.context_size} if study.config.text.sources else {}
        if study.config.training is not None:
            context_sizes["training"] = arm_recipe(study, arm).context_size
        for section, size in context_sizes.items():
            if shape.n_positions and size > shape.n_positions:
                raise ConfigError(
                    f"rows of text have {size:,} tokens, but the model of {arm} takes {shape.n_positions:,}.",
                    at=study.at(section, "context_size"),
                    fix=f"set context_size to {shape.n_positions} or less.",
                )


def _check_embedded(study: Study, shapes: dict[str, ModelShape]) -> list[str]:
    """Refuse texts with a token that a model has no embedding for; report such tokens that no text has."""
    strings = known_tokens(study.tokens.tokenizer)
    too_small = {arm: shape for arm, shape in shapes.items() if shape.d_vocab and max(strings) >= shape.d_vocab}
    if not too_small:
        return []
    lm = study.reader
    rows = study_rows(study.config.text, lambda: lm, prepend_bos=study.prepend_bos)
    for arm, shape in too_small.items():
        _refuse_unembedded(study, arm, shape, rows.ids.flatten().tolist(), "the text", study.at("text"))
    arm, shape = next(iter(too_small.items()))
    extra = [token for i, token in strings.items() if i >= (shape.d_vocab or 0)]
    shown = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
    return [
        f"{len(extra):,} tokens of the tokenizer ({shown}) are without embedding in the model of {arm}"
        f" ({shape.d_vocab:,} rows); no text has them"
    ]


def _refuse_unembedded(study: Study, arm: str, shape: ModelShape, ids: Iterable[int], what: str, at: str) -> None:
    highest = max(ids, default=0)
    if shape.d_vocab and highest >= shape.d_vocab:
        token = known_tokens(study.tokens.tokenizer).get(highest, "")
        raise ConfigError(
            f"{what} holds the token {token!r} (id {highest:,}), but the embedding of {arm}'s model has"
            f" {shape.d_vocab:,} rows.",
            at=at,
            fix="take the tokenizer that was saved with the model, or resize the model's embedding and save it.",
        )
