"""From text and a model to an SAE with its model card: what `saeffect train-sae` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from saeffect.activations.harvest import NormLimit, TokenRows, harvest
from saeffect.activations.shards import ActivationStore
from saeffect.config import ModelConfig, StrictModel, TextSource
from saeffect.errors import EmptySelection, SaeffectError
from saeffect.models.hooks import parse_hook
from saeffect.models.language_model import LanguageModel
from saeffect.models.loading import load_language_model
from saeffect.provenance import atomic_path, fingerprint, versions, write_json
from saeffect.sae.quality import SaeQuality, training_quality
from saeffect.sae.saelens_format import load_sae, save_sae
from saeffect.sae.splice import SplicedLosses, spliced_losses
from saeffect.sae.training import train_sae
from saeffect.sae.training_config import SaeTrainingConfig
from saeffect.text.corpora import is_held_out, read_corpus
from saeffect.text.packing import interleave, pack, separator_id

__all__ = ["SaeRecipe", "text_rows", "train_from_recipe"]


class SaeRecipe(StrictModel):
    """Model, hook, text and training: arms that are to be compared share all of it but the model."""

    model: ModelConfig
    hook: str
    text: tuple[TextSource, ...] = Field(min_length=1, description="Rows are taken from each in turn.")
    tokens: int = Field(1_048_576, ge=1, description="Tokens to train on, over all sources.")
    held_out_tokens: int = Field(81_920, ge=1, description="Tokens to measure on, from other documents.")
    held_out: float = Field(0.06, gt=0, lt=0.5, description="Share of documents kept for measuring.")
    context_size: int = Field(256, ge=8, description="Tokens a row.")
    text_seed: int = Field(0, description="Order of the documents.")
    ce_rows: int = Field(48, ge=1, description="Held-out rows for the cross-entropy.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float16", description="Of the saved weights.")
    sae: SaeTrainingConfig = SaeTrainingConfig()


def text_rows(recipe: SaeRecipe, lm: LanguageModel, *, held_out: bool) -> TokenRows:
    """Packed rows from each source in turn: training rows, or those of the held-out documents.

    Raises:
        SaeffectError: A source cannot be read, or has too little text.
    """
    wanted = recipe.held_out_tokens if held_out else recipe.tokens
    n_rows = max(1, wanted // recipe.context_size)
    separator = separator_id(lm.tokenizer)
    streams: list[Iterator[NDArray[np.int32]]] = []
    for index, source in enumerate(recipe.text):
        try:
            texts = [
                t for t in read_corpus(source.path, field=source.field) if is_held_out(t, recipe.held_out) == held_out
            ]
        except SaeffectError as error:
            raise error.placed(f"text.{index}") from None
        order = np.random.default_rng([recipe.text_seed, index]).permutation(len(texts))
        shuffled = [texts[i] for i in order]
        streams.append(pack(shuffled, lm.encode, context_size=recipe.context_size, separator=separator))
    ids: list[NDArray[np.int32]] = []
    sources: list[int] = []
    for index, row in interleave(*streams):
        ids.append(row)
        sources.append(index)
        if len(ids) == n_rows:
            return TokenRows(np.stack(ids), np.asarray(sources), tuple(s.name for s in recipe.text))
    raise EmptySelection(
        f"the text gives {len(ids) * recipe.context_size:,} tokens in equal parts from each source;"
        f" {wanted:,} are wanted.",
        at="held_out_tokens" if held_out else "tokens",
        fix="give more text, or ask for fewer tokens.",
    )


def train_from_recipe(
    recipe: SaeRecipe,
    out: Path | str,
    *,
    work: Path | str,
    say: Callable[[str], None] = lambda _: None,
) -> Mapping[str, Any]:
    """Harvest (or reuse a harvest), train, measure on held-out text, and write SAE, recipe and model card.

    Args:
        recipe: What to train.
        out: Folder for the SAE.
        work: Folder for activations; arms with the same model share them.
        say: Receives lines of progress.

    Returns:
        The measurements that the model card shows.
    """
    out = Path(out)
    lm = load_language_model(recipe.model, say=say, at="model")
    parse_hook(recipe.hook, lm.n_layers, at="hook")
    stores = {}
    rows = {}
    for part in ("train", "held-out"):
        rows[part] = text_rows(recipe, lm, held_out=part == "held-out")
        key = fingerprint([lm.identity, recipe.hook, rows[part].digest()])[:16]
        harvest(lm, recipe.hook, rows[part], Path(work) / f"{part}-{key}", say=say)
        stores[part] = ActivationStore.open(Path(work) / f"{part}-{key}")
    limit = NormLimit(**stores["train"].note["norm_limit"])
    metadata = {
        "model_name": recipe.model.path,
        "adapter": recipe.model.adapter,
        "hook_name": recipe.hook,
        "context_size": recipe.context_size,
        "prepend_bos": False,
        "training_tokens": recipe.tokens * recipe.sae.epochs,
        "unique_tokens": recipe.tokens,
        "epochs": recipe.sae.epochs,
        "training_text": "+".join(s.name for s in recipe.text),
        "training_text_sha256": rows["train"].digest(),
        "held_out_text_sha256": rows["held-out"].digest(),
        "seed": recipe.sae.seed,
        "trained_by": "saeffect",
        "mean_norm": limit.median_norm,
        "norm_limit": limit.limit,
        "training_normalisation": "expected_average_only_in (folded)",
        "activation_dtype": str(lm.dtype).removeprefix("torch."),
    }
    train_sae(stores["train"], recipe.sae, out, metadata=metadata, dtype=recipe.dtype, say=say)
    # Measured on what was saved, rounding to half precision included.
    sae = load_sae(out)
    quality = training_quality(sae, stores["held-out"])  # type: ignore[arg-type]
    losses = spliced_losses(lm, sae, recipe.hook, rows["held-out"].ids[: recipe.ce_rows], limit)
    return _write_card(recipe, out, metadata, quality=quality, losses=losses, say=say)


def _write_card(
    recipe: SaeRecipe,
    out: Path,
    metadata: dict[str, Any],
    *,
    quality: SaeQuality,
    losses: SplicedLosses,
    say: Callable[[str], None],
) -> Mapping[str, Any]:
    measured = asdict(quality) | {
        "ce_loss_score": losses.ce_loss_score,
        "ce_clean": losses.clean,
        "ce_sae": losses.sae,
        "ce_zero": losses.zero,
        "ce_tokens": losses.n_tokens,
    }
    plain = recipe.model_dump(mode="json")
    for source in plain["text"]:
        source["path"] = Path(source["path"]).name
    write_json(out / "training.json", {"recipe": plain, "held_out": measured, "versions": versions()})
    sae = load_sae(out)
    sae.cfg = replace(sae.cfg, metadata=metadata | {"held_out": measured})
    save_sae(sae, out, dtype=recipe.dtype)
    model = recipe.model.path + (f" + {recipe.model.adapter}" if recipe.model.adapter else "")
    s = recipe.sae
    lines = [
        f"# TopK SAE for {model} at {recipe.hook}",
        "",
        f"{s.d_sae:,} features, k = {s.k}, {recipe.tokens:,} tokens × {s.epochs} passes,"
        f" batches of {s.batch_size}, Adam, peak learning rate {s.learning_rate:g}, seed {s.seed};"
        f" decoder rows of unit length; saved in {recipe.dtype}, in SAELens' layout.",
        "",
        "The first position of each context and outliers of the norm (above"
        f" {metadata['norm_limit']:.0f}; median {metadata['mean_norm']:.0f}) were left out.",
        "",
        "| text | file | licence |",
        "|---|---|---|",
        *(f"| {t.name} | {Path(t.path).name} | {t.licence} |" for t in recipe.text),
        "",
        f"On {quality.n_tokens:,} held-out tokens (cross-entropy on {losses.n_tokens:,}):",
        "",
        "| measure | value |",
        "|---|---|",
        f"| explained variance | {quality.explained_variance:.4f} |",
        f"| CE loss score | {losses.ce_loss_score:.4f} ({losses.clean:.3f} clean,"
        f" {losses.sae:.3f} with the SAE, {losses.zero:.3f} with zeros) |",
        f"| l0 | {quality.l0:.1f} |",
        f"| l2 ratio | {quality.l2_ratio:.4f} |",
        f"| features that never fire | {quality.dead_share:.2%} |",
        f"| mean log10 density | {quality.mean_log10_density:.2f} |",
        "",
    ]
    with atomic_path(out / "README.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    say(f"explained variance {quality.explained_variance:.4f}, CE loss score {losses.ce_loss_score:.4f}")
    return measured
