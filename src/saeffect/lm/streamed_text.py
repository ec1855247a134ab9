"""Rows of tokens that come from the corpus as they are asked for: the text may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from saeffect.config import TextSource
from saeffect.errors import EmptySelection, SaeffectError
from saeffect.io import fingerprint, hash_folder
from saeffect.lm.corpora import is_held_out, read_corpus
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.packing import interleave
from saeffect.paths import user_path

__all__ = ["RowSource", "StreamedText"]


class RowSource(Protocol):
    """Packed text that can be read again from the start, the same each time."""

    @property
    def context_size(self) -> int:
        """Tokens a row."""
        ...

    @property
    def n_rows(self) -> int | None:
        """How many rows there are; None where only the end will tell."""
        ...

    def identity(self) -> str:
        """SHA-256 of what decides the rows."""
        ...

    def rows(self) -> Iterator[NDArray[np.int32]]:
        """Token ids, int32 `[context_size]`, one row after the other."""
        ...


@dataclass(frozen=True, eq=False)
class StreamedText:
    """A corpus, read and tokenised on the way.

    Attributes:
        lm: Whose tokenizer reads it.
        sources: Rows are taken from each in turn, until the first of them ends.
        context_size: Tokens a row.
        tokens: How much to take, in tokens, over all sources; None for all there is.
        held_out: Share of the documents that is kept for measuring; they are left out.
        seed: Of the order of the documents.
        buffer: Documents of each source that are in memory, to be mixed; 1 leaves them in file order.
    """

    lm: LanguageModel
    sources: tuple[TextSource, ...]
    context_size: int
    tokens: int | None = None
    held_out: float = 0.0
    seed: int = 0
    buffer: int = 1000

    @property
    def n_rows(self) -> int | None:
        """How many rows `tokens` makes; None without it."""
        return None if self.tokens is None else max(1, self.tokens // self.context_size)

    def identity(self) -> str:
        """SHA-256 of the files (of a dataset on the hub: its name), the tokenizer, and how they are packed."""
        places = [user_path(source.path) for source in self.sources]
        files = [hash_folder(p) if p.exists() else s.path for p, s in zip(places, self.sources, strict=True)]
        fields = [source.field for source in self.sources]
        how = [self.context_size, self.n_rows, self.held_out, self.seed, self.buffer]
        bos = self.lm.bos_id
        return fingerprint([files, fields, self.lm.tokenizer_fingerprint(), how, *([] if bos is None else [bos])])

    def rows(self) -> Iterator[NDArray[np.int32]]:
        """Token ids, int32 `[context_size]`, one row after the other.

        Raises:
            SaeffectError: A source cannot be read, or is shorter than a row; `at` names it.
            EmptySelection: The text ends before `tokens` are there.
        """
        streams = [self._stream(index) for index in range(len(self.sources))]
        count = 0
        for _, row in islice(interleave(*streams), self.n_rows):
            count += 1
            yield row
        if self.n_rows is not None and count < self.n_rows:
            raise EmptySelection(
                f"the text gives {count * self.context_size:,} tokens in equal parts from each source;"
                f" {self.tokens:,} are wanted.",
                at="tokens",
                fix="give more text, or ask for fewer tokens.",
            )

    def _stream(self, index: int) -> Iterator[NDArray[np.int32]]:
        source = self.sources[index]
        try:
            texts = (t for t in read_corpus(source.path, field=source.field) if not is_held_out(t, self.held_out))
            mixed = _mixed(texts, self.buffer, np.random.default_rng([self.seed, index]))
            yield from self.lm.pack(mixed, self.context_size)
        except SaeffectError as error:
            raise error.placed(f"text.{index}") from None


def _mixed(texts: Iterable[str], size: int, generator: np.random.Generator) -> Iterator[str]:
    """The texts in a random order that looks `size` of them ahead."""
    held: list[str] = []
    for text in texts:
        if len(held) < size:
            held.append(text)
            continue
        at = int(generator.integers(size))
        yield held[at]
        held[at] = text
    yield from (held[i] for i in generator.permutation(len(held)))
