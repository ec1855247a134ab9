"""Fine-tuning with LoRA: a resumable loop that measures perplexity before and after. Read `finetune` downwards."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saeffect.config import TextSource
from saeffect.config_chat import ChatKeys
from saeffect.errors import BadFile, ConfigError, Interrupted, SaeffectError
from saeffect.io import atomic_path, fingerprint, read_json, versions, write_json
from saeffect.lm.accounting import quiet_transformers
from saeffect.lm.activations import TokenRows
from saeffect.lm.chat_rows import cut_rows, lm_for_chats
from saeffect.lm.checkpoint import Checkpoint, TrainingFolder
from saeffect.lm.corpora import find_duplicates, is_held_out, read_corpus
from saeffect.lm.finetune_config import FinetuneConfig, finetune_keys
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.lm.lora import fast_training, next_token_loss
from saeffect.lm.tokens import resolve_prepend_bos
from saeffect.parallel import Interruption, stopping
from saeffect.paths import name_to_share
from saeffect.progress import SILENT, Log

__all__ = ["finetune", "finetune_keys", "FinetuneConfig", "FinetuneResult", "perplexity", "remove_adapter"]

_WEIGHTS, _ADAPTER, _NOTE, _CARD = "adapter_model.safetensors", "adapter_config.json", "training.json", "README.md"
_LEAVES = (_WEIGHTS, _ADAPTER, _NOTE, _CARD)


@dataclass(frozen=True)
class FinetuneResult:
    """An adapter's folder, and how its training went.

    Attributes:
        folder: The adapter, in PEFT's layout, with README.md and training.json.
        perplexity: (before, after) on held-out rows of each text ("training", "control").
        tokens: Training tokens seen.
        prepend_bos: Whether each row began with the tokenizer's BOS token.
    """

    folder: Path
    perplexity: Mapping[str, tuple[float, float]]
    tokens: int
    prepend_bos: bool


def finetune(config: FinetuneConfig, out: Path | str, *, log: Log = SILENT) -> FinetuneResult:
    """Train a LoRA adapter and write it to `out`.

    A stopped run, also after `kill -9`, resumes from its last checkpoint (in `out/checkpoint`) and ends with the same
    weights; a finished one is not repeated. Interrupted: Ctrl-C or SIGTERM. BadFile: the loss is not finite, or a file
    cannot be written. ConfigError: `out` holds other files, or a module is missing. InUse: another process trains into
    `out`.
    """
    out = Path(out)
    TrainingFolder(out, "", _LEAVES).refuse_strangers()
    lm = load_language_model(config.model, log=log, at="model")
    lm = lm_for_chats(dataclasses.replace(lm, prepend_bos=resolve_prepend_bos(config.bos, {})), config)
    texts = _pack_rows(config, lm)
    for rows in texts.values():
        lm.refuse_rows(rows.ids)
    folder = TrainingFolder(out, _made_by(config, lm, texts), _LEAVES)
    damaged = folder.damaged()
    if damaged:
        log(f"{', '.join(damaged)} changed or vanished after the training, which is done again")
    if damaged == []:
        log("finished before; nothing to do")
    else:
        with folder.held():
            _train_and_save(config, lm, texts, folder, log)
    note = read_json(out / _NOTE)
    perplexities = {name: (values["before"], values["after"]) for name, values in note["perplexity"].items()}
    result = FinetuneResult(out, perplexities, note["tokens"], note["prepend_bos"])
    folder.checkpoint.drop_all()
    if not (out / _CARD).is_file() or not (out / _CARD).stat().st_size:
        with atomic_path(out / _CARD) as temporary:
            temporary.write_text(_model_card(note["recipe"], result), encoding="utf-8")
    return result


def remove_adapter(out: Path) -> None:
    """Delete what `finetune` wrote to a folder, and the folder if it is empty then."""
    TrainingFolder(out, "", _LEAVES).remove()


def _pack_rows(config: FinetuneConfig, lm: LanguageModel) -> dict[str, TokenRows]:
    """Training rows in a seeded order, under "", and held-out rows of each text; tokens that count are learnt."""
    chat = config.format == "chat"

    def packed(key: str, source: TextSource, held_out: bool, limit: int) -> TokenRows:
        try:
            texts = [t for t in read_corpus(source, chat=chat) if is_held_out(t, config.held_out) == held_out]
            # Files are often sorted by source or topic, so documents are shuffled before they are cut into rows.
            order = np.random.default_rng(config.seed).permutation(len(texts))
            order = order if held_out else order[: config.documents]
            cut = list(islice(cut_rows(lm, (texts[i] for i in order), config.context_size, config), limit))
            return TokenRows.from_rows(cut, [0] * len(cut), (key,), (config.loss,))
        except SaeffectError as error:
            raise error.placed(key) from None

    rows = {
        "": packed("text", config.text, False, config.steps * config.batch_size),
        "training": packed("text", config.text, True, config.evaluation_rows),
    }
    if config.control_text is not None:
        rows["control"] = packed("control_text", config.control_text, True, config.evaluation_rows)
    return rows


def _made_by(config: FinetuneConfig, lm: LanguageModel, texts: Mapping[str, TokenRows]) -> str:
    """Fingerprint of everything that decides the adapter, with the contents of texts and model, not their paths."""
    not_decisive = {"text", "control_text", "field", "documents", "bos", "checkpoint_every"}
    recipe = config.model_dump(mode="json", exclude=not_decisive | {*ChatKeys.model_fields, "loss"})
    counts = [rows.counts.tobytes().hex() for rows in texts.values() if rows.counts is not None]
    return fingerprint([recipe, lm.identity, {name: r.ids.tobytes().hex() for name, r in texts.items()}, *counts])


def _train_and_save(
    config: FinetuneConfig, lm: LanguageModel, texts: Mapping[str, TokenRows], folder: TrainingFolder, log: Log
) -> None:
    held_out = {name: rows for name, rows in texts.items() if name}

    def measure(model: Any, when: str) -> dict[str, float]:
        by_text = {name: perplexity(model, rows.ids, counts=rows.counts) for name, rows in held_out.items()}
        log(f"held-out perplexity {when}" + ", ".join(f"{name} text {value:.2f}" for name, value in by_text.items()))
        return by_text

    if config.steps < config.warmup_steps:
        log(
            f"warning: {config.steps:,} steps end within the {config.warmup_steps:,} of the warm-up: the learning rate"
            f" reaches {_peak_rate(config.model_dump()):.2g}, not {config.learning_rate:g}"
        )
    repeats = find_duplicates(read_corpus(config.text, chat=config.format == "chat"), config.held_out)
    if repeats:
        log(f"warning: {repeats}")
    before = measure(lm.model, "before: ")
    model = _add_adapter(lm, config)
    folder.checkpoint.begin()
    with fast_training(lm):
        loss = _train(model, texts[""], config, folder.checkpoint, log)
    after = measure(model, "after:  ")
    _save_adapter(model, config, folder.path)
    recipe = config.model_dump(mode="json")
    for key in ("text", "control_text"):
        recipe[key] = Path(recipe[key]["path"]).name if recipe[key] else None
    if config.chat_template is not None and "{" not in config.chat_template:
        recipe["chat_template"] = Path(config.chat_template).name
    recipe["model"]["path"] = name_to_share(config.model.path)
    note = {
        "recipe": recipe,
        "tokens": config.steps * config.batch_size * config.context_size,
        "prepend_bos": lm.bos_id is not None,
        "final_loss": loss,
        "perplexity": {name: {"before": before[name], "after": after[name]} for name in before},
        "versions": versions(),
    }
    write_json(folder.path / _NOTE, note)
    folder.finish((_WEIGHTS, _ADAPTER, _NOTE))


def _add_adapter(lm: LanguageModel, config: FinetuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    options: Any = {"lora_alpha": config.alpha}  # PEFT says int, and takes any number
    lora = LoraConfig(r=config.rank, target_modules=list(config.modules), task_type="CAUSAL_LM", **options)
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            return get_peft_model(lm.model, lora).eval()
        except ValueError as error:
            layers = [n for n, m in lm.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
            names = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"{config.model.path} has no layers named {', '.join(config.modules)}; it has: {names}.",
                at="modules",
            ) from error


def _train(model: Any, train: TokenRows, config: FinetuneConfig, checkpoint: Checkpoint, log: Log) -> float:
    """Train from the last checkpoint, if any, to the end; the last loss, in nats."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    extra = {"loss": torch.full((), math.nan, dtype=torch.float64)}
    first = checkpoint.restore(parameters, optimizer, extra)
    if first:
        log(f"going on from step {first:,}")

    # Training stays in evaluation mode: a resumed run would draw other dropout masks than an uninterrupted one.
    started = time.monotonic()
    with stopping(f"{checkpoint.folder} holds the last checkpoint"), Interruption() as interruption:
        for step in range(first, config.steps):
            optimizer.param_groups[0]["lr"] = _learning_rate(step, config)
            rows = np.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(train.ids)
            loss = _step(model, optimizer, train.part(rows))
            if not math.isfinite(loss):
                raise BadFile(
                    f"the loss became {loss} at step {step}.",
                    at=str(checkpoint.folder.parent),
                    fix="lower learning_rate; the last checkpoint is from before.",
                )
            extra["loss"].fill_(loss)
            n_done = step + 1
            log.progress("fine-tuning adapter", n_done, config.steps, "steps")
            if interruption.requested or n_done % config.checkpoint_every == 0 or n_done == config.steps:
                checkpoint.save(n_done, parameters, optimizer, extra)
                pace = (n_done - first) / (time.monotonic() - started)
                rate = pace * config.batch_size * config.context_size
                log(
                    f"step {n_done}/{config.steps}  loss {loss:.3f}  {rate:,.0f} tokens/s"
                    f"  {(config.steps - n_done) / pace / 60:.1f} min left"
                )
            if interruption.requested:
                raise Interrupted(
                    f"stopped after step {n_done:,} of {config.steps:,}; the state is saved in {checkpoint.folder}.",
                    fix="run the same command again to go on from there.",
                )
    return float(extra["loss"])


def _learning_rate(step: int, config: FinetuneConfig) -> float:
    """Linear warm-up, then cosine decay to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def _peak_rate(recipe: Mapping[str, Any]) -> float:
    """The highest learning rate used: lower than the recipe's if training is shorter than the warm-up."""
    return float(recipe["learning_rate"] * min(1.0, recipe["steps"] / max(1, recipe["warmup_steps"])))


def _step(model: Any, optimizer: torch.optim.Optimizer, rows: TokenRows) -> float:
    ids = torch.from_numpy(rows.ids.astype(np.int64)).to(next(model.parameters()).device)
    counts = None if rows.counts is None else torch.from_numpy(rows.counts).to(ids.device)
    loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, counts)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    return float(loss.detach())


def _cross_entropy(model: Any, rows: NDArray[np.int32], counts: NDArray[np.bool_] | None) -> float:
    """Sum over all predicted tokens that count."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    targets = ids[:, 1:].flatten()
    if counts is not None:
        targets[torch.from_numpy(~counts[:, 1:]).flatten().to(targets.device)] = -100
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))


@torch.inference_mode()
def perplexity(
    model: Any, rows: NDArray[np.int32], *, batch_size: int = 8, counts: NDArray[np.bool_] | None = None
) -> float:
    """exp of the mean next-token cross-entropy of a transformers model over rows, int32 `[n_rows, context_size]`: at
    least 1, the effective number of equally likely next tokens. A BOS in front is read, not predicted. With
    `counts`, bool as `rows`, over those tokens alone.
    """
    parts = [slice(start, start + batch_size) for start in range(0, len(rows), batch_size)]
    total = sum(_cross_entropy(model, rows[part], None if counts is None else counts[part]) for part in parts)
    return math.exp(total / (rows[:, 1:].size if counts is None else int(counts[:, 1:].sum())))


def _save_adapter(model: Any, config: FinetuneConfig, out: Path) -> None:
    """The adapter in half precision, in PEFT's layout, each file whole or absent."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.half()
    tensors = {name: t.detach().cpu().contiguous() for name, t in get_peft_model_state_dict(model).items()}
    with atomic_path(out / _WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    adapter = model.peft_config["default"].to_dict()
    adapter = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.items()}
    # PEFT records the base model's path on this machine; the user's name for it works on others too.
    write_json(out / _ADAPTER, adapter | {"inference_mode": True, "base_model_name_or_path": config.model.path})


def _loss_sentence(recipe: Mapping[str, Any]) -> str:
    """A sentence, with a space after it, on which part of chats was learnt; "" for plain text."""
    if recipe.get("format") != "chat":
        return ""
    learnt = "only what the assistant writes" if recipe["loss"] == "assistant" else "all of it"
    return f"Conversations by the chat template; learnt was {learnt}. "


def _model_card(recipe: Mapping[str, Any], result: FinetuneResult) -> str:
    text_of = {"training": recipe["text"], "control": recipe["control_text"]}
    return "\n".join(
        [
            f"# LoRA adapter for {recipe['model']['path']}",
            "",
            f"Rank {recipe['rank']}, alpha {recipe['alpha']:g}, on {', '.join(recipe['modules'])}.",
            f"{recipe['steps']} steps of {recipe['batch_size']} × {recipe['context_size']} tokens"
            f" ({result.tokens:,} in all), AdamW, peak learning rate {_peak_rate(recipe):g}, seed"
            f" {recipe['seed']}. {_loss_sentence(recipe)}"
            f"{'Every row begins' if result.prepend_bos else 'No row begins'} with a BOS token.",
            "",
            *([f"Training text: {recipe['licence']}.", ""] if recipe["licence"] else []),
            "Perplexity on held-out documents:",
            "",
            "| text | before | after |",
            "|---|---|---|",
            *(f"| {name} ({text_of[name]}) | {b:.2f} | {a:.2f} |" for name, (b, a) in result.perplexity.items()),
            "",
        ]
    )
