"""The text of a study: token rows from bundled ids or files, and an arm that reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from saeffect.checksums import read_tensors
from saeffect.config import TextConfig
from saeffect.errors import EmptySelection, SaeffectError, placed
from saeffect.io import read_json
from saeffect.lm.activations import NormLimit, TokenRows, first_limit, kept_positions
from saeffect.lm.architectures import heads_to_residual
from saeffect.lm.chat import ChatFormat
from saeffect.lm.chat_rows import Row, cut_rows
from saeffect.lm.corpora import interleave, read_corpus
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import bundled_path
from saeffect.lm.residuals import Residuals
from saeffect.lm.tokens import find_bos_id, tokens_added_before
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder

__all__ = ["Arm", "ReadRows", "beginning", "first_texts", "require_rows", "shortage", "study_rows"]


def study_rows(text: TextConfig, model: Callable[[], LanguageModel], *, prepend_bos: bool | None) -> TokenRows:
    """Rows of text, sources in turn, at most `text.tokens` tokens, each with the model's BOS token in front, if any.

    `model`, whose tokenizer cuts files and whose `chat_format` writes chats, is not called for bundled ids without BOS.
    SaeffectError if a source cannot be read, or has less than one row of text.
    """
    if text.bundled is None:
        return _packed(text, model())
    return _bundled(text, None if prepend_bos is False else model().bos_id)


def require_rows(rows: TokenRows) -> None:
    """EmptySelection for a single row: nothing could be said of its scatter."""
    if len(rows) < 2:
        raise EmptySelection(
            f"the text has one row of {rows.context_size} tokens; expected at least two.",
            fix="give more text, or shorter rows: text.context_size.",
        )


def shortage(text: TextConfig, rows: TokenRows) -> str:
    """How many of the requested tokens the rows hold, in words; "" if all."""
    if len(rows) >= max(1, text.tokens // rows.ids.shape[1]):
        return ""
    amount = f"{rows.ids.size:,} of the {text.tokens:,} tokens that text.tokens asks for"
    if len(rows.names) == 1 or text.bundled is not None:
        return amount
    return (
        f"{amount}: rows are taken from each source in turn, and {rows.names[len(rows) % len(rows.names)]!r} ends first"
    )


def first_texts(text: TextConfig) -> list[str]:
    """The beginnings of a few documents of each source; unreadable sources are skipped."""
    texts: list[str] = []
    for source in text.sources:
        with contextlib.suppress(SaeffectError):
            texts += [document[:2_000] for document in islice(read_corpus(source, chat=text.format == "chat"), 20)]
    return texts


def beginning(
    study_prepends: bool | None, words: Mapping[str, Any], tokenizer: Any, chat: ChatFormat | None = None
) -> tuple[str, str]:
    """How rows and prompts begin, in words, and which settings disagree ("" for none).

    `study_prepends` is as `LanguageModel.prepend_bos`; `words` is `prepend_bos` of each arm's SAE, if recorded;
    `chat` writes the study's conversations, if any.
    """
    bos, added = find_bos_id(tokenizer, study_prepends), tokens_added_before(tokenizer)
    disagreeing = [name for name, word in words.items() if isinstance(word, bool) and word != (bos is not None)]
    conflicts = []
    if disagreeing:
        trained = "without" if bos is not None else "with"
        conflicts.append(f"SAEs trained on texts {trained} BOS (prepend_bos): {', '.join(disagreeing)}")
    if chat is not None and chat.writes_bos != (bos is not None):
        word = "with" if chat.writes_bos else "without"
        conflicts.append(f"the chat template begins a conversation {word} a BOS token")
    if bool(added) != (bos is not None):
        conflicts.append(
            f"the tokenizer by itself begins a text with {tokenizer.decode(added)!r}"
            if added
            else "the tokenizer by itself puts no BOS there"
        )
    start = "without a BOS token" if bos is None else f"with {tokenizer.decode([bos])!r}"
    return f"every row and prompt begins {start}", "; ".join(conflicts)


def _bundled(text: TextConfig, bos: int | None) -> TokenRows:
    folder = bundled_path("texts", text.bundled or "", at="bundled")
    tensors, _ = read_tensors(folder / "tokens.safetensors", "the bundled text", fix="install again.")
    names = tuple(read_json(folder / "sources.json")["names"])
    ids = tensors["ids"].numpy().astype(np.int32)[:, : text.context_size]
    if bos is not None:
        ids = np.concatenate([np.full_like(ids[:, :1], bos), ids[:, :-1]], axis=1)
    rows = TokenRows(ids, tensors["sources"].numpy().astype(np.int64), names)
    return rows.head(max(1, text.tokens // rows.ids.shape[1]))


def _packed(text: TextConfig, lm: LanguageModel) -> TokenRows:
    streams: list[Iterator[Row]] = []
    for source in text.sources:
        documents = read_corpus(source, chat=text.format == "chat")
        streams.append(_place_errors(source.name, cut_rows(lm, documents, text.context_size, text)))
    n_rows = max(1, text.tokens // text.context_size)
    rows: list[Row] = []
    sources: list[int] = []
    for index, row in interleave(*streams):
        rows.append(row)
        sources.append(index)
        if len(rows) == n_rows:
            break
    if not rows:
        raise EmptySelection("a source has less than one row of text.", at="sources", fix="give more text.")
    return TokenRows.from_rows(rows, sources, tuple(s.name for s in text.sources), text.positions)


def _place_errors(name: str, rows: Iterator[Row]) -> Iterator[Row]:
    with placed(f"source {name!r}"):
        yield from rows


class ReadRows(NamedTuple):
    """A batch of rows from `start` on: ids int64 `[batch, sequence]`, activations `[batch, sequence, d_in]`, which
    positions count (bool `[batch, sequence]`, see `kept_positions`), and the name of each row's source.
    """

    start: int
    ids: Tensor
    x: Tensor
    kept: Tensor
    sources: list[str]


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm with its model and SAE (float32) in memory; `hook` is where the SAE reads."""

    name: str
    role: str
    lm: LanguageModel
    sae: SparseAutoencoder
    hook: str

    @property
    def W_dec(self) -> Tensor:
        """The SAE's decoder, `[d_sae, d_in]`."""
        return self.sae.W_dec.detach()

    def added(self, features: list[int] | None = None) -> Tensor:
        """What features (default: all) add to the residual stream, `[n, d_model]`: decoder rows, mapped through W_O if
        the SAE reads attention heads.
        """
        return heads_to_residual(self.lm, self.hook, self.W_dec if features is None else self.W_dec[features])

    def norm_limit(self, rows: TokenRows) -> NormLimit:
        """Norm above which residuals are outliers: the SAE's recorded limit, else measured on `rows`."""
        meta = self.sae.cfg.metadata
        if meta.get("norm_limit") and meta.get("mean_norm"):
            return NormLimit(float(meta["mean_norm"]), float(meta["norm_limit"]))
        return first_limit(self.lm, self.hook, rows.ids[:8])

    def read(self, rows: TokenRows, residuals: Residuals, log: Log = SILENT, what: str = "") -> Iterator[ReadRows]:
        """The text at the arm's hook, batch by batch; reports rows as the progress of `what`, if given."""
        limit = self.norm_limit(rows)
        for start, ids, x in residuals.batches(self.lm, self.hook, rows):
            sources = [rows.names[i] for i in rows.sources[start : start + len(ids)]]
            yield ReadRows(start, ids, x, kept_positions(x, limit, rows.counts_of(start, len(ids))), sources)
            if what:
                log.progress(what, start + len(ids), len(rows), "rows")
