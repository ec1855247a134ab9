"""The model card of a trained SAE: how it was made and how good it is, for people and for programs."""

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
from saeffect.sae.trainable import TrainableSae
from saeffect.sae.training.config import SaeRecipe, SaeTrainingConfig
from saeffect.sae.training.figure import FIGURES

__all__ = ["card_is_current", "measured_before", "write_card"]

_NOTE = "training.json"
_CARD = "README.md"
_EMPTY = hashlib.sha256(b"").hexdigest()
# log10 of a firing rate below this: not once in the window (SAELens adds 1e-10 to the rate).
_NEVER = -9.9


def card_is_current(recipe: SaeRecipe, folder: Path) -> bool:
    """Whether the folder has its card, and it is this recipe's and these weights'."""
    note, card = _noted(folder), folder / _CARD
    if note.get("recipe") != _plain(recipe) or not (card.is_file() and card.stat().st_size):
        return False
    held_out = read_json(folder / "cfg.json")["metadata"].get("held_out")
    return bool(note.get("weights_sha256") == hash_file(folder / WEIGHTS) and note.get("held_out") == held_out)


def measured_before(folder: Path) -> Mapping[str, Any]:
    """The measurements in the folder's card; BadFile if it has none."""
    found = _noted(folder).get("held_out")
    if not isinstance(found, dict):
        raise BadFile(f"{_NOTE} holds no measurements.", at=str(folder), fix="run the same command again.")
    return found


def _noted(folder: Path) -> Mapping[str, Any]:
    note = None
    with contextlib.suppress(SaeffectError):
        note = read_json(folder / _NOTE)
    return note if isinstance(note, dict) else {}


def write_card(recipe: SaeRecipe, folder: Path, measured: Mapping[str, float], *, log: Log = SILENT) -> None:
    """Write README.md and training.json beside an SAE, and the measurements into its cfg.json; a README.md that
    somebody else wrote, or changed, stays. `recipe` is that of this one SAE. `measured`, on held-out text: as
    `reconstruction` gives, and ce_loss_score, ce_clean, ce_sae, ce_zero, ce_tokens.
    """
    cfg = read_json(folder / "cfg.json")
    cfg["metadata"]["held_out"] = dict(measured)
    write_json(folder / "cfg.json", cfg)
    lines = [
        f"# {recipe.sae.kind.label}{'' if recipe.sae.kind.sides else ' SAE'} for {_model(recipe)} at {recipe.hook}",
        "",
        _how(recipe, cfg["metadata"]),
        "",
        "The first position of each context and outliers of the norm (above"
        f" {cfg['metadata']['norm_limit']:.3g}; median {cfg['metadata']['mean_norm']:.3g}) were left out."
        f" {'Every row begins' if cfg['metadata'].get('prepend_bos') else 'No row begins'} with a BOS token.",
        "",
        "| text | file | licence |",
        "|---|---|---|",
        *(f"| {t.name} | {Path(t.path).name} | {t.licence} |" for t in recipe.text),
        "",
        *_quality(recipe, folder, measured),
    ]
    if (folder / FIGURES[1]).is_file():
        lines += [f"![Loss, explained variance, l0 and dead features during training]({FIGURES[1]})", ""]
    text = "\n".join(lines)
    if not (folder / _CARD).is_file() or hash_file(folder / _CARD) in (
        *(_EMPTY, hashlib.sha256(text.encode()).hexdigest()),
        _noted(folder).get("card_sha256"),
    ):
        with atomic_path(folder / _CARD) as temporary:
            temporary.write_text(text, encoding="utf-8")
    else:
        log(f"{folder / _CARD} is not as it was written here, so it stays")
    # Last: a card without this note is written again.
    write_json(
        folder / _NOTE,
        {
            "recipe": _plain(recipe),
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


def _plain(recipe: SaeRecipe) -> dict[str, Any]:
    """The recipe without this machine's folders."""
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    if plain["tuned"] is None:  # as notes were before there were two models
        del plain["tuned"]
    if recipe.format == "text":  # or chats
        plain = {key: value for key, value in plain.items() if key not in ReadKeys.model_fields}
    elif recipe.chat_template is not None and "{" not in recipe.chat_template:
        plain["chat_template"] = Path(recipe.chat_template).name
    for source in plain["text"]:
        if Path(source["path"]).expanduser().exists():
            source["path"] = Path(source["path"]).name
    if plain["sae"]["init_from"] is not None:
        plain["sae"]["init_from"] = Path(plain["sae"]["init_from"]).name
    for key, model in (("model", recipe.model), ("tuned", recipe.tuned)):
        if model is not None:
            plain[key]["path"] = name_to_share(model.path)
            if model.adapter is not None:
                plain[key]["adapter"] = name_to_share(model.adapter)
    return plain


def _model(recipe: SaeRecipe) -> str:
    names = [
        " + ".join(name_to_share(name) for name in (model.path, model.adapter) if name)
        for model in (recipe.model, recipe.tuned)
        if model is not None
    ]
    if recipe.combination == "difference":
        return f"the activations of {names[1]} minus those of {names[0]}"
    return " and ".join(names)


def _how(recipe: SaeRecipe, metadata: Mapping[str, Any]) -> str:
    s = recipe.sae
    parts = [f"{s.d_sae:,} features", *_architecture_words(s)]
    if s.steps is None:
        parts.append(f"{recipe.tokens_a_pass:,} tokens × {s.epochs} passes")
        parts.append(f"batches of {s.batch_size}")
    else:
        parts.append(f"{s.steps:,} steps of {s.batch_size:,} tokens ({metadata['training_tokens']:,} in all)")
    fall = "constant" if s.schedule == "constant" or not s.decay_share else f"{s.schedule} decay"
    parts.append(f"Adam({s.adam_beta1:g}, {s.adam_beta2:g}), peak learning rate {s.learning_rate:g}, {fall}")
    parts.append(f"seed {s.seed}")
    rows = "decoder rows of unit length" if s.unit_decoder else "decoder rows free"
    start = f"; weights started from {Path(s.init_from).name}" if s.init_from is not None else ""
    how = "streamed" if recipe.activations == "streamed" else "from shards"
    label = ARCHITECTURES[s.kind.saved_as].label if s.kind.saved_as else ""
    form = f" as {label} with the threshold found in training" if label else ""
    return f"{', '.join(parts)}; {rows}{start}; activations {how}; saved in {recipe.dtype}, in SAELens' layout{form}."


def _architecture_words(s: SaeTrainingConfig) -> list[str]:
    kind = s.kind
    words = kind.in_words(s) if issubclass(kind, TrainableSae) else []
    if s.resample_every is not None:
        words.append(
            f"features firing on less than {s.dead_threshold:g} of {s.dead_window:,} steps' tokens resampled"
            f" every {s.resample_every:,} steps"
        )
    return words


def _of_which(recipe: SaeRecipe) -> str:
    return "" if recipe.tuned is None else " of the tuned model, its activations rebuilt from those of both"


def _quality(recipe: SaeRecipe, folder: Path, m: Mapping[str, float]) -> list[str]:
    lines = [
        f"On {m['n_tokens']:,} held-out tokens (cross-entropy{_of_which(recipe)} on {m['ce_tokens']:,}):",
        "",
        "| measure | value |",
        "|---|---|",
        f"| explained variance | {m['explained_variance']:.4f} |",
        *(
            f"| explained variance, {side} model | {m[f'explained_variance_{side}']:.4f} |"
            for side in recipe.sae.kind.sides
        ),
        f"| CE loss score | {m['ce_loss_score']:.4f} ({m['ce_clean']:.3f} clean,"
        f" {m['ce_sae']:.3f} with the SAE, {m['ce_zero']:.3f} with zeros) |",
        f"| l0 | {m['l0']:.1f} |",
        f"| l2 ratio | {m['l2_ratio']:.4f} |",
        f"| features that never fire | {m['dead_share']:.2%} |",
        f"| mean log10 density | {m['mean_log10_density']:.2f} |",
    ]
    sparsity = read_sparsity(folder)
    if sparsity is not None:
        dead = int((sparsity < _NEVER).sum())
        steps = f"last {recipe.sae.dead_window:,} to {2 * recipe.sae.dead_window:,} steps"
        lines.append(f"| dead at the end of training (not once in the {steps}) | {dead:,} of {recipe.sae.d_sae:,} |")
    return [*lines, ""]
