"""A recipe: everything that decides an SAE, text and model included. Its YAML keys are the fields below."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from saeffect.config import BosRule, ModelConfig, StrictModel, TextSource
from saeffect.errors import ConfigError
from saeffect.lm.hooks import parse_hook
from saeffect.sae.training.config import SaeTrainingConfig

__all__ = ["SaeRecipe"]

_TOKENS_IN_SHARDS = 1_048_576
# SAEs in one pass over the activations take the same batches.
_SHARED = ("batch_size", "steps", "epochs", "checkpoint_every", "normalise_inputs", "data_seed")


class SaeRecipe(StrictModel):
    """Model, hook, text and training: arms that are to be compared share all of it but the model."""

    model: ModelConfig = Field(description="Hub id, folder or .gguf file, or a mapping with path, adapter, dtype, ...")
    hook: str = Field(description="TransformerLens name, such as blocks.8.hook_resid_pre.")
    text: tuple[TextSource, ...] = Field(
        min_length=1, description="Sources, each with name, path, field, licence; rows are taken from each in turn."
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of text to train on, over all sources. None: 1,048,576; if streamed, all there is.",
    )
    held_out_tokens: int = Field(81_920, ge=1, description="Tokens to measure on, from other documents.")
    held_out: float = Field(0.06, gt=0, lt=0.5, description="Share of documents kept for measuring.")
    context_size: int = Field(256, ge=8, description="Tokens a row.")
    bos: BosRule = Field(
        "auto",
        description="Whether every row begins with the tokenizer's BOS token, such as `<bos>`. auto: as the SAE of"
        " `init_from` says (prepend_bos); else as the tokenizer does.",
    )
    text_seed: int = Field(0, description="Order of the documents.")
    activations: Literal["shards", "streamed"] = Field(
        "shards",
        description="shards: harvested to disk first, and shared by all SAEs of the model. streamed: the model runs"
        " while the SAE trains; only the held-out activations are written.",
    )
    max_disk_gb: float | None = Field(
        None, gt=0, description="The most that activations may take on disk, in GB of 10^9 bytes. None: what is free."
    )
    pool_rows: int = Field(512, ge=1, description="Rows of text in the shuffled buffer, if streamed.")
    evaluation_rows: int = Field(8, ge=1, description="Held-out rows for the CE loss score during training.")
    evaluation_tokens: int = Field(16_384, ge=1, description="Held-out tokens for the other measures during training.")
    ce_rows: int = Field(48, ge=1, description="Held-out rows for the cross-entropy at the end.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float16", description="Of the saved weights.")
    sae: SaeTrainingConfig = Field(SaeTrainingConfig(), description="How to train; the keys are below.")
    saes: dict[str, dict[str, Any]] | None = Field(
        None,
        description="Several SAEs in one pass over the activations, by name: changes of `sae`, such as"
        " {seed-0: {seed: 0}, wide: {d_sae: 9216}}. Each goes to a folder of its name. They share the order of the"
        " data (`data_seed`, by default the seed in `sae`), and what else makes a batch.",
    )

    @model_validator(mode="after")
    def _sound(self) -> Self:
        parse_hook(self.hook, at="hook")
        self.trainings()
        if self.activations == "streamed" and self.tokens is None and self.sae.steps is None:
            raise ValueError("streamed text has no known length: give tokens, or sae.steps")
        return self

    @property
    def tokens_a_pass(self) -> int | None:
        """Tokens of text in one pass over it; None where only the end will tell."""
        return _TOKENS_IN_SHARDS if self.tokens is None and self.activations == "shards" else self.tokens

    @property
    def max_disk_bytes(self) -> int | None:
        """The cap in bytes."""
        return None if self.max_disk_gb is None else int(self.max_disk_gb * 1e9)

    def trainings(self) -> dict[str, SaeTrainingConfig]:
        """How each SAE is trained, by name; one alone is called "".

        Raises:
            ConfigError: A name that is no folder, or SAEs that cannot share batches.
            UnknownName: A change of a key that does not exist.
        """
        if self.saes is None:
            return {"": self.sae}
        if not self.saes:
            raise ConfigError("no SAE is named.", at="saes", fix="name one, or leave saes out.")
        base = self.sae.model_dump(exclude_unset=True)
        base["data_seed"] = self.sae.seed if self.sae.data_seed is None else self.sae.data_seed
        found = {}
        for name, changes in self.saes.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
                raise ConfigError(
                    f"{name!r} is no name for a folder.", at="saes", fix="use letters, digits, dot, dash, underscore."
                )
            found[name] = config = SaeTrainingConfig.read(base | changes, at=f"saes.{name}")
            for key in _SHARED:
                mine, all_of_them = getattr(config, key), getattr(found[next(iter(found))], key)
                if mine != all_of_them:
                    raise ConfigError(
                        f"SAEs that are trained side by side share {key}; got {all_of_them} and {mine}.",
                        at=f"saes.{name}.{key}",
                        fix="set it in sae alone, or give this SAE a recipe of its own: shards are shared anyway.",
                    )
        return found

    def folders(self, out: Path) -> dict[str, Path]:
        """Where each SAE goes, by name."""
        return {name: out / name if name else out for name in self.trainings()}

    def of_one(self, name: str) -> SaeRecipe:
        """The recipe of one of the SAEs as if it were alone."""
        return self.model_copy(update={"sae": self.trainings()[name], "saes": None})
