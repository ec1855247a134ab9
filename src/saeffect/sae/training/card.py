"""The model card of a trained SAE: how it was made and how good it is, as README.md and training.json."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeffect.config_chat import ReadKeys
from saeffect.errors import BadFile, SaeffectError
from saeffect.io import atomic_path, hash_file, read_json, versions, write_json
from saeffect.paths import name_to_share
from saeffect.progress import SILENT, Log
from saeffect.sae.base import ARCHITECTURES
from saeffect.sae.formats import WEIGHTS, read_sparsity
from saeffect.sae.hub import is_sae_name
from saeffect.sae.trainable import TrainableSae
from saeffect.sae.training.config import SaeRecipe, SaeTrainingConfig
from saeffect.sae.training.figure import FIGURES

__all__ = ["card_is_current", "measured_before", "write_card"]

_NOTE = "training.json"
_CARD = "README.md"
_EMPTY = hashlib.sha256(b"").hexdigest()
# A log10 of the firing rate below this means that a feature never fired (SAELens adds 1e-10 to the rate).
_NEVER = -9.9


def card_is_current(recipe: SaeRecipe, folder: Path) -> bool:
    """Whether the folder has a model card of this recipe and its present weights."""
    note, card = _read_note(folder), folder / _CARD
    if note.get("recipe") != _shareable_recipe(recipe) or not (card.is_file() and card.stat().st_size):
        return False
    held_out = read_json(folder / "cfg.json")["metadata"].get("held_out")
    return bool(note.get("weights_sha256") == hash_file(folder / WEIGHTS) and note.get("held_out") == held_out)


def measured_before(folder: Path) -> Mapping[str, Any]:
    """The measurements in the folder's card; BadFile if it has none."""
    measured = _read_note(folder).get("held_out")
    if not isinstance(measured, dict):
        raise BadFile(f"{_NOTE} holds no measurements.", at=str(folder), fix="run the same command again.")
    return measured


def _read_note(folder: Path) -> Mapping[str, Any]:
    note = None
    with contextlib.suppress(SaeffectError):
        note = read_json(folder / _NOTE)
    return note if isinstance(note, dict) else {}


def write_card(recipe: SaeRecipe, folder: Path, measured: Mapping[str, float], *, log: Log = SILENT) -> None:
    """Write README.md and training.json beside an SAE, and the measurements into its cfg.json; a README.md that was
    edited, or not written here, stays. `recipe` is that of this one SAE. `measured`, on held-out text: as
    `reconstruction` returns, and ce_loss_score, ce_clean, ce_sae, ce_zero, ce_tokens.
    """
    cfg = read_json(folder / "cfg.json")
    cfg["metadata"]["held_out"] = dict(measured)
    write_json(folder / "cfg.json", cfg)
    lines = [
        f"# {recipe.sae.kind.label}{'' if recipe.sae.kind.sides else ' SAE'} for {_models(recipe)} at {recipe.hook}",
        "",
        _training_words(recipe, cfg["metadata"]),
        "",
        "The first position of each context and outliers of the norm (above"
        f" {cfg['metadata']['norm_limit']:.3g}; median {cfg['metadata']['mean_norm']:.3g}) were left out."
        f" {'Every row begins' if cfg['metadata'].get('prepend_bos') else 'No row begins'} with a BOS token.",
        "",
        "| text | file | licence |",
        "|---|---|---|",
        *(f"| {t.name} | {Path(t.path).name} | {t.licence} |" for t in recipe.text),
        "",
        *_quality_lines(recipe, folder, measured),
    ]
    if (folder / FIGURES[1]).is_file():
        lines += [f"![Loss, explained variance, l0 and dead features during training]({FIGURES[1]})", ""]
    text = "\n".join(lines)
    if not (folder / _CARD).is_file() or hash_file(folder / _CARD) in (
        *(_EMPTY, hashlib.sha256(text.encode()).hexdigest()),
        _read_note(folder).get("card_sha256"),
    ):
        with atomic_path(folder / _CARD) as temporary:
            temporary.write_text(text, encoding="utf-8")
    else:
        log(f"{folder / _CARD} is not as it was written here, so it stays")
    # Written last: a card without this note is written again.
    write_json(
        folder / _NOTE,
        {
            "recipe": _shareable_recipe(recipe),
            "held_out": dict(measured),
            "versions": versions(),
            "weights_sha256": hash_file(folder / WEIGHTS),
            "card_sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
    )
    log(
        f"explained variance {measured['explained_variance']:.4f}, CE loss score {measured['ce_loss_score']:.4f},"
        f" l0 {measured['l0']:.1f}, never firing {measured['dead_share']:.2%}"
    )


def _shareable_recipe(recipe: SaeRecipe) -> dict[str, Any]:
    """The recipe without this machine's folders."""
    shareable: dict[str, Any] = recipe.model_dump(mode="json")
    if shareable["tuned"] is None:  # earlier notes have neither this key nor those of chats
        del shareable["tuned"]
    if recipe.format == "text":
        shareable = {key: value for key, value in shareable.items() if key not in ReadKeys.model_fields}
    elif recipe.chat_template is not None and "{" not in recipe.chat_template:
        shareable["chat_template"] = Path(recipe.chat_template).name
    for source in shareable["text"]:
        if Path(source["path"]).expanduser().exists():
            source["path"] = Path(source["path"]).name
    if shareable["sae"]["init_from"] is not None:
        shareable["sae"]["init_from"] = _start_name(shareable["sae"]["init_from"])
    for key, model in (("model", recipe.model), ("tuned", recipe.tuned)):
        if model is not None:
            shareable[key]["path"] = name_to_share(model.path)
            if model.adapter is not None:
                shareable[key]["adapter"] = name_to_share(model.adapter)
    return shareable


def _start_name(source: str) -> str:
    return source if is_sae_name(source) else Path(source).name


def _models(recipe: SaeRecipe) -> str:
    names = [
        " + ".join(name_to_share(name) for name in (model.path, model.adapter) if name)
        for model in (recipe.model, recipe.tuned)
        if model is not None
    ]
    if recipe.combination == "difference":
        return f"the activations of {names[1]} minus those of {names[0]}"
    return " and ".join(names)


def _training_words(recipe: SaeRecipe, metadata: Mapping[str, Any]) -> str:
    config = recipe.sae
    parts = [f"{config.d_sae:,} features", *_architecture_words(config)]
    if config.steps is None:
        parts.append(f"{recipe.tokens_a_pass:,} tokens × {config.epochs} passes")
        parts.append(f"batches of {config.batch_size}")
    else:
        parts.append(f"{config.steps:,} steps of {config.batch_size:,} tokens ({metadata['training_tokens']:,} in all)")
    decay = "constant" if config.schedule == "constant" or not config.decay_share else f"{config.schedule} decay"
    parts.append(
        f"Adam({config.adam_beta1:g}, {config.adam_beta2:g}), peak learning rate {config.learning_rate:g}, {decay}"
    )
    parts.append(f"seed {config.seed}")
    rows = "decoder rows of unit length" if config.unit_decoder else "decoder rows free"
    start = f"; weights started from {_start_name(config.init_from)}" if config.init_from is not None else ""
    source = "streamed" if recipe.activations == "streamed" else "from shards"
    label = ARCHITECTURES[config.kind.saved_as].label if config.kind.saved_as else ""
    saved_form = f" as {label} with the threshold found in training" if label else ""
    saved = f"saved in {recipe.dtype}, in SAELens' layout{saved_form}"
    return f"{', '.join(parts)}; {rows}{start}; activations {source}; {saved}."


def _architecture_words(config: SaeTrainingConfig) -> list[str]:
    kind = config.kind
    words = kind.in_words(config) if issubclass(kind, TrainableSae) else []
    if config.resample_every is not None:
        words.append(
            f"features firing on less than {config.dead_threshold:g} of {config.dead_window:,} steps' tokens resampled"
            f" every {config.resample_every:,} steps"
        )
    return words


def _quality_lines(recipe: SaeRecipe, folder: Path, measured: Mapping[str, float]) -> list[str]:
    of = "" if recipe.tuned is None else " of the tuned model, its activations rebuilt from those of both"
    lines = [
        f"On {measured['n_tokens']:,} held-out tokens (cross-entropy{of} on {measured['ce_tokens']:,}):",
        "",
        "| measure | value |",
        "|---|---|",
        f"| explained variance | {measured['explained_variance']:.4f} |",
        *(
            f"| explained variance, {side} model | {measured[f'explained_variance_{side}']:.4f} |"
            for side in recipe.sae.kind.sides
        ),
        f"| CE loss score | {measured['ce_loss_score']:.4f} ({measured['ce_clean']:.3f} clean,"
        f" {measured['ce_sae']:.3f} with the SAE, {measured['ce_zero']:.3f} with zeros) |",
        f"| l0 | {measured['l0']:.1f} |",
        f"| l2 ratio | {measured['l2_ratio']:.4f} |",
        f"| features that never fire | {measured['dead_share']:.2%} |",
        f"| mean log10 density | {measured['mean_log10_density']:.2f} |",
    ]
    sparsity = read_sparsity(folder)
    if sparsity is not None:
        dead = int((sparsity < _NEVER).sum())
        steps = f"last {recipe.sae.dead_window:,} to {2 * recipe.sae.dead_window:,} steps"
        lines.append(f"| dead at the end of training (not once in the {steps}) | {dead:,} of {recipe.sae.d_sae:,} |")
    return [*lines, ""]
