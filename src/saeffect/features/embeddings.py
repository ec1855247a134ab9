"""Word vectors: the bundled GloVe subset, or the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saeffect.errors import NotFound, ShapeMismatch, unknown_name
from saeffect.features.vector_files import VECTOR_SUFFIXES, read_vectors
from saeffect.paths import BUNDLED_FOLDER, user_path

__all__ = ["BUNDLED_EMBEDDINGS", "DEFAULT_EMBEDDINGS", "WordVectors", "load_embeddings"]

FloatArray = NDArray[np.float32]

DEFAULT_EMBEDDINGS = "glove-wiki-gigaword-100"
BUNDLED_EMBEDDINGS = (DEFAULT_EMBEDDINGS,)

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_WORD_PART = re.compile(r"[^\W_]+")


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Words, spelled as in the source, with their rows in `vectors`, float32 [n, dim], finite, read-only; `name` is
    a bundled name, or the source file. Tokens are looked up in lower case.

    Example:
        >>> toy = WordVectors.from_rows(["cat", "dog"], [[3.0, 4.0], [4.0, 3.0]], name="toy")
        >>> len(toy), toy.dim, "cat" in toy, "Cat" in toy
        (2, 2, True, False)
    """

    words: Mapping[str, int]
    vectors: FloatArray
    name: str

    def __post_init__(self) -> None:
        vectors = np.asarray(self.vectors, dtype=np.float32).view()
        vectors.flags.writeable = False
        object.__setattr__(self, "vectors", vectors)

    @classmethod
    def from_rows(cls, words: Sequence[str], vectors: object, *, name: str) -> WordVectors:
        """One row a word, `vectors` [len(words), dim]; of a repeated word the first row counts."""
        matrix = np.asarray(vectors, dtype=np.float32)
        if matrix.ndim != 2 or len(matrix) != len(words):
            message = f"vectors must be [{len(words)}, dim], one row a word. Got {list(matrix.shape)} instead."
            raise ShapeMismatch(message, at=name)
        rows: dict[str, int] = {}
        for row, word in enumerate(words):
            rows.setdefault(word, row)
        return cls(rows, matrix, name)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.words

    def get(self, word: str) -> FloatArray | None:
        """The vector [dim] of exactly this word (case-sensitive), or None."""
        row = self.words.get(word)
        return None if row is None else self.vectors[row]

    def row(self, word: str) -> int:
        """Row of exactly this word; -1 if it is unknown or its vector is 0."""
        row = self.words.get(word, -1)
        return row if row >= 0 and self.vectors[row].any() else -1

    def mean_vector(self, text: str) -> FloatArray | None:
        """Mean of the vectors of the text's known words, each occurrence counted: float32 [dim]; None if none is
        known. Words are runs of letters and digits, lower-cased; a compound ("well-known", "patient's") is one word
        if known, else its parts.
        """
        rows: list[int] = []
        for match in _WORD.finditer(text.lower()):
            word = match.group()
            parts = (word,) if word in self.words else _WORD_PART.findall(word)
            rows.extend(self.words[part] for part in parts if part in self.words)
        return self.vectors[rows].mean(axis=0, dtype=np.float64).astype(np.float32) if rows else None


def load_embeddings(name_or_path: str | Path = DEFAULT_EMBEDDINGS) -> WordVectors:
    """Load word vectors by name (one of `BUNDLED_EMBEDDINGS`) or from a file; the last few are cached.

    Formats, detected from the content: GloVe text (`word x1 ... xd` a line), word2vec text (the same after a line
    `count dim`), both also gzipped; word2vec binary (`.bin`, `.bin.gz`); `.npz` with arrays `words` and `vectors`;
    `.safetensors` as bundled here (`vectors`, with the words in a `.words.txt` beside it). Pickles, including gensim's
    `.kv`, are refused. UnknownName: neither a bundled name nor a path; NotFound: no such file; otherwise as
    `read_vectors`.

    Example:
        >>> glove = load_embeddings("glove-wiki-gigaword-100")
        >>> glove.dim, glove.get("treatment").shape, glove.get("reatment") is None
        (100, (100,), True)
    """
    text = str(name_or_path)
    if text in BUNDLED_EMBEDDINGS:
        path = BUNDLED_FOLDER / "embeddings" / f"{text}.safetensors"
    else:
        path = user_path(name_or_path)
        is_path = isinstance(name_or_path, Path) or len(path.parts) > 1 or path.suffix.lower() in VECTOR_SUFFIXES
        if not path.exists() and not is_path:
            raise unknown_name("embedding", text, BUNDLED_EMBEDDINGS)
    try:
        stat = path.stat()
    except OSError as error:
        raise NotFound(f"there is no file {path.name!r}.", at=str(path), fix="check the path.") from error
    return _load_cached(path.resolve(), text, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _load_cached(path: Path, name: str, mtime_ns: int, size: int) -> WordVectors:  # noqa: ARG001
    # Time and size are part of the key, so that a changed file is read again.
    words, vectors = read_vectors(path)
    return WordVectors.from_rows(words, vectors, name=name)
