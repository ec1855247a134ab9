"""Text vectors: word vectors averaged, or an encoder mean-pooled (the paper's bert-base-uncased)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from saeffect.errors import BadFile, NotFound, UnknownName
from saeffect.features.embeddings import load_embeddings
from saeffect.paths import user_path

__all__ = ["MeanPooledEncoder", "RememberedVectors", "TextVectors", "load_text_vectors"]

Vector = npt.NDArray[np.floating]


class TextVectors(Protocol):
    """Anything that turns a text into one vector."""

    def mean_vector(self, text: str) -> Vector | None:
        """The vector of a text, `[dim]`; None if nothing in the text is known."""
        ...


class RememberedVectors:
    """Caches text vectors; vectors that already have a cache are used directly."""

    def __init__(self, vectors: TextVectors) -> None:
        self._vectors = vectors
        self._known: dict[str, Vector | None] = vectors._known if isinstance(vectors, RememberedVectors) else {}

    def mean_vector(self, text: str) -> Vector | None:
        if text not in self._known:
            self._known[text] = self._vectors.mean_vector(text)
        return self._known[text]


class MeanPooledEncoder:
    """Last hidden states of an encoder, averaged over a text's tokens, special ones included (Gupta & Sica 2024).

    `name` is a hub id or folder of a model that transformers' AutoModel opens; sentence encoders that pool by the mean
    give their own vectors up to length. `NotFound`: neither a folder nor a model that can be downloaded; `BadFile`: no
    encoder with a tokenizer in the folder.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._model: Any = AutoModel.from_pretrained(name, use_safetensors=True).eval()
        except (OSError, ValueError, KeyError) as error:
            missing = not Path(name).exists()
            kind = NotFound if missing else BadFile
            raise kind(
                f"no text encoder can be loaded from {name!r}: {str(error).splitlines()[0]}",
                at="embeddings",
                fix="give a hub id that can be reached, or a folder with model and tokenizer."
                if missing
                else "the folder needs config.json, a tokenizer, and safetensors weights (pickles are never loaded).",
            ) from error

    @torch.inference_mode()
    def mean_vector(self, text: str) -> Vector | None:
        """Float32 `[hidden_size]`; None for a text without tokens. Texts beyond the model's maximum length are cut."""
        longest = getattr(self._model.config, "max_position_embeddings", None)
        encoded = self._tokenizer(
            text, return_tensors="pt", truncation=longest is not None, max_length=longest, add_special_tokens=True
        )
        inner = len(encoded["input_ids"][0]) - self._tokenizer.num_special_tokens_to_add()
        if not text.strip() or inner < 1:
            return None
        hidden = self._model(**encoded).last_hidden_state[0].float()
        pooled: Vector = hidden.mean(dim=0).numpy()
        return pooled


def load_text_vectors(name: str) -> TextVectors:
    """Word vectors averaged, or else a mean-pooled encoder: `name` is "glove-wiki-gigaword-100", a vectors file, a
    folder of a transformers model, or a hub id. Errors as `load_embeddings` and `MeanPooledEncoder`.
    """
    if user_path(name, at="embeddings").is_dir():
        return MeanPooledEncoder(name)
    try:
        return load_embeddings(name)
    except (UnknownName, NotFound) as unknown:
        if Path(name).suffix in {".txt", ".vec", ".gz", ".bin", ".zip", ".npz", ".safetensors"}:
            raise
        try:
            return MeanPooledEncoder(name)
        except NotFound as error:
            raise type(unknown)(
                f"{unknown.message} Nor can a text encoder of that name be loaded: {error.message}",
                at="embeddings",
                fix="use a bundled name, a vectors file, or a model folder.",
            ) from error
