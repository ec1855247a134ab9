"""Train SAEs with model cards from a recipe, as `saeffect train-sae` does. Read `train_from_recipe`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from saeffect.errors import BadFile, ConfigError, EmptySelection, IncompatibleSae, SaeffectError
from saeffect.io import fingerprint
from saeffect.lm.activations import ActivationSource, NormLimit, StreamedActivations, TokenRows
from saeffect.lm.chat_rows import Row, cut_rows, lm_for_chats
from saeffect.lm.corpora import (
    StreamedText,
    documents_of,
    find_duplicates,
    interleave,
    is_held_out,
    is_local,
    read_corpus,
)
from saeffect.lm.harvest import (
    ActivationStore,
    ShardSource,
    check_disk_space,
    harvest,
    harvest_bytes,
    harvest_made_by,
)
from saeffect.lm.hooks import capture, edited, parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model, locate_model, model_shape
from saeffect.lm.paired import PairedStore, PairedStream, combined, paired_identity, paired_width, refuse_unlike
from saeffect.lm.tokens import resolve_prepend_bos
from saeffect.parallel import barrier, is_first
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.sae.crosscoder import TUNED, side
from saeffect.sae.formats import load_sae, read_sae_config
from saeffect.sae.metrics import reconstruction, spliced_losses
from saeffect.sae.training.card import card_is_current, measured_before, write_card
from saeffect.sae.training.config import SaeRecipe, SaeTrainingConfig
from saeffect.sae.training.loggers import LoggerName, check_logger
from saeffect.sae.training.run import copy_weights
from saeffect.sae.training.step import new_sae
from saeffect.sae.training.train import SaeJob, train_saes

__all__ = ["harvest_from_recipe", "text_rows", "train_from_recipe"]


def train_from_recipe(
    recipe: SaeRecipe,
    out: Path | str,
    *,
    work: Path | str,
    logger: LoggerName = "none",
    log: Log = SILENT,
) -> Mapping[str, Any]:
    """Harvest (or reuse a harvest, or stream), train, measure on held-out text, and write SAEs with model cards.

    `out` is the folder for the SAE (for several, the parent of their folders); `work` that for activations, which arms
    with the same model share. If stopped, the same call resumes. Under `torchrun` every process calls it; the first one
    logs, measures and writes. Returns the measurements in the model card; for several SAEs, by name. SaeffectError:
    anything wrong, if possible before the harvest, and then nothing is written. Interrupted: Ctrl-C.
    """
    out, work = Path(out), Path(work)
    log = log if is_first() else SILENT
    _refuse_unwritable_folders({"--out": out, "--work": work})
    folders, trainings = recipe.folders(out), recipe.trainings()
    for name, config in trainings.items():
        SaeJob(config, folders[name]).refuse_strangers()
    _refuse_before_loading(recipe, logger)
    models = _load_models(recipe, log)

    def refuse_others(activations: str) -> None:
        for name, config in trainings.items():
            SaeJob(config, folders[name], dtype=recipe.dtype).folder(activations).refuse_others()

    data = _prepare_data(recipe, models, work, log, refuse=refuse_others)
    jobs = {
        name: SaeJob(config, folders[name], _sae_metadata(recipe, config, data), recipe.dtype)
        for name, config in trainings.items()
    }
    _warn_of_duplicates(recipe, log)
    device = recipe.model.device
    train_saes(data.source, list(jobs.values()), evaluate=data.while_training, device=device, logger=logger, log=log)
    for name, job in jobs.items() if is_first() else ():
        single = recipe.of_one(name)
        if not card_is_current(single, job.out):
            with job.folder(data.source.identity()).held():
                # Measured on the saved SAE, rounding to half precision included.
                write_card(single, job.out, data.at_the_end(load_sae(job.out)), log=log)
    barrier()
    measured = {name: measured_before(folder) for name, folder in folders.items()}
    return measured if recipe.saes else measured[""]


def _warn_of_duplicates(recipe: SaeRecipe, log: Log) -> None:
    local = [source for source in recipe.text if is_local(source)] if is_first() else []
    repeats = find_duplicates(documents_of(local, recipe), recipe.held_out)
    if repeats:
        log(f"warning: {repeats}")


def harvest_from_recipe(recipe: SaeRecipe, *, work: Path | str, log: Log = SILENT) -> list[Path]:
    """Harvest only, for every SAE of this model, hook and text; returns the folders of training and held-out
    activations (for two models, the base model's first). ConfigError if the recipe streams its activations; other
    errors as `train_from_recipe`.
    """
    if recipe.activations == "streamed":
        raise ConfigError(
            "this recipe streams its activations, so there is nothing to harvest.",
            at="activations",
            fix="set activations: shards.",
        )
    log = log if is_first() else SILENT
    _refuse_unwritable_folders({"--work": Path(work)})
    _refuse_before_loading(recipe)
    data = _prepare_data(recipe, _load_models(recipe, log), Path(work), log)
    folders = []
    for source in (data.source, data.held_out):
        stores = (source.base, source.tuned) if isinstance(source, PairedStore) else (source,)
        folders += [store.folder for store in stores if isinstance(store, ActivationStore)]
    return folders


def text_rows(recipe: SaeRecipe, lm: LanguageModel, *, held_out: bool) -> TokenRows:
    """Packed rows from each source in turn, of training or held-out documents; SaeffectError if a source fails.
    Documents are shuffled, unless the activations are streamed: then held-out documents keep their order.
    """
    n_tokens = recipe.held_out_tokens if held_out else recipe.tokens_a_pass
    if n_tokens is None:
        raise ConfigError("rows of all the text there is would not fit into memory.", at="tokens", fix="give tokens.")
    n_rows = max(1, n_tokens // recipe.context_size)
    rows: list[Row] = []
    sources: list[int] = []
    for index, row in interleave(*(_row_stream(recipe, lm, i, held_out=held_out) for i in range(len(recipe.text)))):
        rows.append(row)
        sources.append(index)
        if len(rows) == n_rows:
            return TokenRows.from_rows(rows, sources, tuple(s.name for s in recipe.text), recipe.positions)
    raise EmptySelection(
        f"the text gives {len(rows) * recipe.context_size:,} tokens in equal parts from each source;"
        f" {n_tokens:,} are wanted.",
        at="held_out_tokens" if held_out else "tokens",
        fix="give more text, or ask for fewer tokens.",
    )


def _row_stream(recipe: SaeRecipe, lm: LanguageModel, index: int, *, held_out: bool) -> Iterator[Row]:
    source = recipe.text[index]
    try:
        documents = read_corpus(source, chat=recipe.format == "chat")
        texts = (t for t in documents if is_held_out(t, recipe.held_out) == held_out)
        if recipe.activations == "shards":
            all_texts = list(texts)
            order = np.random.default_rng([recipe.text_seed, index]).permutation(len(all_texts))
            texts = (all_texts[i] for i in order)
        yield from cut_rows(lm, texts, recipe.context_size, recipe)
    except SaeffectError as error:
        raise error.placed(f"text.{index}") from None


def _load_models(recipe: SaeRecipe, log: Log) -> list[LanguageModel]:
    """The model, or the base and the tuned model, both with the base model's tokenizer."""
    configs = {"model": recipe.model} | ({} if recipe.tuned is None else {"tuned": recipe.tuned})
    if is_first():
        for key, config in configs.items():
            locate_model(config, log=log, at=key)  # only one process downloads
    barrier()
    sources = {name: config.init_from for name, config in recipe.trainings().items() if config.init_from is not None}
    saes = {name or "init_from": read_sae_config(source).metadata for name, source in sources.items()}
    bos = resolve_prepend_bos(recipe.bos, {name: metadata.get("prepend_bos") for name, metadata in saes.items()})
    lms: list[LanguageModel] = []
    for key, config in configs.items():
        lm = replace(load_language_model(config, log=log, at=key), prepend_bos=bos)
        if lms:
            refuse_unlike(lms[0], lm)
            lm = replace(lm, tokenizer=lms[0].tokenizer)
        lm = lm_for_chats(lm, recipe)
        _refuse_unfit_model(recipe, lm)
        lms.append(lm)
    return lms


@dataclass(frozen=True, eq=False)
class _Data:
    recipe: SaeRecipe
    lms: list[LanguageModel]  # the model, or the base and the tuned model
    source: ActivationSource  # for training
    limits: list[NormLimit]  # of each model
    held_out: ShardSource  # for measuring
    rows: TokenRows  # the held-out text
    text: str  # SHA-256 of the training text

    def while_training(self, sae: SparseAutoencoder) -> dict[str, float]:
        """Measures during training, on a part of the held-out text."""
        measured = self._measure(sae, self.recipe.evaluation_tokens, self.recipe.evaluation_rows)
        names = ("explained_variance", "l2_ratio", "l0", "mean_log10_density", "ce_loss_score")
        return {"dead": round(measured["dead_share"] * sae.cfg.d_sae)} | {name: measured[name] for name in names}

    def at_the_end(self, sae: SparseAutoencoder) -> dict[str, float]:
        return self._measure(sae, self.recipe.held_out_tokens, self.recipe.ce_rows)

    def _measure(self, sae: SparseAutoencoder, n_tokens: int, n_rows: int) -> dict[str, float]:
        head = self.rows.head(n_rows)
        splice = sae if self.recipe.tuned is None else partial(self._reconstruct, sae)
        losses = spliced_losses(self.lms[-1], splice, self.recipe.hook, head.ids, self.limits[-1], counts=head.counts)
        return reconstruction(sae, self.held_out.sample(n_tokens)) | {
            "ce_loss_score": losses.ce_loss_score,
            "ce_clean": losses.clean,
            "ce_sae": losses.sae,
            "ce_zero": losses.zero,
            "ce_tokens": losses.n_tokens,
        }

    def _reconstruct(self, sae: SparseAutoencoder, ids: Tensor, x: Tensor) -> Tensor:
        """The tuned model's activations `x`, reconstructed by an SAE that also reads the base model's."""
        base, how = capture(self.lms[0], self.recipe.hook, ids).to(x.device), self.recipe.combination
        assert how is not None
        sae_out = sae(combined(base, x, how))
        return base + sae_out if how == "difference" else side(sae_out, TUNED)


def _prepare_data(
    recipe: SaeRecipe,
    lms: list[LanguageModel],
    work: Path,
    log: Log,
    *,
    refuse: Callable[[str], None] = lambda _: None,
) -> _Data:
    """Tokenise all text, run the checks (`refuse` gets the activations' identity), then harvest or open streams."""
    lm, how, streamed = lms[0], recipe.combination, recipe.activations == "streamed"
    rows = {} if streamed else {"train": text_rows(recipe, lm, held_out=False)}
    rows["held-out"] = text_rows(recipe, lm, held_out=True)
    corpus = lm, recipe.text, recipe.context_size, recipe.tokens_a_pass, recipe.held_out, recipe.text_seed
    text = StreamedText(*corpus, how=recipe)
    _refuse_before_harvest(recipe, lms, rows.values(), work, n_training_rows=text.n_rows)
    streams = [StreamedActivations.open(m, recipe.hook, text, pool_rows=recipe.pool_rows) for m in lms if streamed]
    identities = [stream.identity() for stream in streams] or [
        fingerprint(harvest_made_by(m, recipe.hook, rows["train"])) for m in lms
    ]
    refuse(identities[0] if how is None else paired_identity(identities[0], identities[1], how))
    stores = {}
    for split, part in rows.items():
        folders = [work / f"{split}-{fingerprint([m.identity, recipe.hook, part.identity()])[:16]}" for m in lms]
        stores[split] = [harvest(m, recipe.hook, part, out, log=log) for m, out in zip(lms, folders, strict=True)]
    shards: dict[str, ShardSource] = {
        split: pair[0] if how is None else PairedStore.open(pair[0], pair[1], how) for split, pair in stores.items()
    }
    source: ActivationSource
    if streamed:
        source = streams[0] if how is None else PairedStream.from_streams(streams[0], streams[1], how)
        limits, digest = [stream.limit for stream in streams], text.identity()
    else:
        source, limits = shards["train"], [store.norm_limit() for store in stores["train"]]
        digest = rows["train"].identity()
    return _Data(recipe, lms, source, limits, shards["held-out"], rows["held-out"], digest)


def _sae_metadata(recipe: SaeRecipe, config: SaeTrainingConfig, data: _Data) -> dict[str, Any]:
    a_pass = recipe.tokens_a_pass
    n_tokens = config.steps * config.batch_size if config.steps is not None else (a_pass or 0) * config.epochs
    metadata: dict[str, Any] = {
        "model_name": recipe.model.path,
        "adapter": recipe.model.adapter,
        "hook_name": recipe.hook,
        "context_size": recipe.context_size,
        "prepend_bos": data.lms[0].bos_id is not None,
        "training_tokens": n_tokens,
        "unique_tokens": None if a_pass is None else min(a_pass, n_tokens),
        "training_text": "+".join(s.name for s in recipe.text),
        "training_text_sha256": data.text,
        "held_out_text_sha256": data.rows.identity(),
        "seed": config.seed,
        "trained_by": "saeffect",
        "training_architecture": config.architecture,
        "mean_norm": data.limits[0].median_norm,
        "norm_limit": data.limits[0].limit,
        "training_normalisation": f"{config.normalise_inputs}"
        + (" (folded)" if config.normalise_inputs != "none" else ""),
        "activation_dtype": str(data.lms[0].dtype).removeprefix("torch."),
    }
    if recipe.tuned is not None:
        metadata |= {"tuned_name": recipe.tuned.path, "tuned_adapter": recipe.tuned.adapter}
        metadata["reads"] = recipe.combination
    if config.steps is None:
        metadata["epochs"] = config.epochs
    if recipe.format == "chat":
        metadata |= {"text_format": "chat", "positions": list(recipe.positions)}
    return metadata


# Checks before anything heavy starts and before anything is written.


def _refuse_before_loading(recipe: SaeRecipe, logger: LoggerName = "none") -> None:
    """Checks that need no weights: logger, texts; `init_from`, hook and rows against the model's sizes."""
    check_logger(logger)
    for index, source in enumerate(recipe.text):
        try:
            next(read_corpus(source, chat=recipe.format == "chat"))
        except SaeffectError as error:
            raise error.placed(f"text.{index}") from None
    if recipe.tuned is not None:
        locate_model(recipe.tuned, at="tuned")
    location = locate_model(recipe.model, at="model")
    shape = model_shape(location)
    if shape is not None:
        parse_hook(recipe.hook, shape.n_layers, at="hook")
        if shape.n_positions and recipe.context_size > shape.n_positions:
            raise ConfigError(
                f"rows have {recipe.context_size:,} tokens; {recipe.model.path} takes {shape.n_positions:,}.",
                at="context_size",
                fix=f"set context_size to {shape.n_positions} or less.",
            )
    for section, config in _sections(recipe):
        if config.init_from is None:
            continue
        cfg = read_sae_config(config.init_from, at=f"{section}.init_from")
        for name, stored, expected in (
            ("d_sae", cfg.d_sae, config.d_sae),
            ("d_in", cfg.d_in, cfg.d_in if shape is None else paired_width(shape.d_model, recipe.combination)),
        ):
            if stored != expected:
                raise IncompatibleSae(
                    f"this SAE has {name}={stored}, but the one to be trained has {name}={expected}.",
                    at=f"{section}.init_from",
                    fix="start from an SAE of the same size, trained at a hook of this model.",
                )


def _refuse_unfit_model(recipe: SaeRecipe, lm: LanguageModel) -> None:
    """Checks on the loaded model: it has the hook, and `init_from` fits."""
    parse_hook(recipe.hook, lm.n_layers, at="hook")
    try:
        with edited(lm, recipe.hook, lambda x: x):
            pass
    except SaeffectError as error:
        error.at = "hook"
        raise
    for section, config in _sections(recipe):
        if config.init_from is not None:
            # Copied as at the start of training, so that it cannot fail there.
            sae = new_sae(config, paired_width(lm.d_model, recipe.combination))
            copy_weights(config.init_from, sae, 1.0, unit_decoder=config.unit_decoder, at=f"{section}.init_from")


def _refuse_before_harvest(
    recipe: SaeRecipe, lms: list[LanguageModel], rows: Iterable[TokenRows], work: Path, *, n_training_rows: int | None
) -> None:
    """Checks on the tokenised text: it fills a batch, and the disk has space for the activations."""
    max_tokens = None if n_training_rows is None else n_training_rows * (recipe.context_size - 1)
    if max_tokens is not None and max_tokens < recipe.sae.batch_size:
        raise EmptySelection(
            f"the text gives at most {max_tokens:,} activations, fewer than one batch of {recipe.sae.batch_size:,}.",
            at="sae.batch_size",
            fix="give more text, or a smaller batch_size.",
        )
    total = sum(harvest_bytes(lm, part) for part in rows for lm in lms)
    check_disk_space(work, total, recipe.max_disk_bytes)


def _refuse_unwritable_folders(folders: Mapping[str, Path]) -> None:
    """BadFile for folders (by their option) that could not be created or written; none is created."""
    for option, folder in folders.items():
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            continue
        why = f"{str(existing)!r} is a file" if not existing.is_dir() else f"{str(existing)!r} may not be written"
        raise BadFile(f"nothing can be put into {str(folder)!r}: {why}.", at=option, fix="choose another folder.")


def _sections(recipe: SaeRecipe) -> Iterable[tuple[str, SaeTrainingConfig]]:
    return [(f"saes.{name}" if name else "sae", config) for name, config in recipe.trainings().items()]
