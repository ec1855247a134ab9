"""Which features belong to a domain (by the words of their top tokens), and which tokens may be top tokens."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.config import SCRIPTS
from saeffect.errors import BadFile, ConfigError, EmptySelection, unknown_name
from saeffect.features.embeddings import WordVectors
from saeffect.lm.tokens import normalise_token
from saeffect.paths import BUNDLED_FOLDER, decode_utf8, read_bytes, user_path

__all__ = [
    "MatchCounts",
    "Vocabulary",
    "bundled_vocabularies",
    "choosable_tokens",
    "count_matches",
    "load_vocabulary",
    "select",
]

_VOCABULARIES = BUNDLED_FOLDER / "vocabularies"
# Separators of table columns; a comma between two digits is part of a name ("1,25-dihydroxyvitamin").
_COLUMN_SEPARATOR = re.compile(r"[;|]|(?<![0-9]),|,(?![0-9])")
_UNKNOWN = "\ufffd"  # stands for part of a character, whose script is unknown
_QUOTES = frozenset("\"'“”„‘’«»")
_TOKEN_COLUMNS = ("top_tokens", "top_tokens_dot", "top_tokens_cosine")
_VERDICT_COLUMNS = ("feature", "n_yes", "n_no", "n_unsure", "label", "majority")


@dataclass(frozen=True)
class Vocabulary:
    """A domain's words, in lower case; its bundled name or path; and the hash of the file."""

    name: str
    words: frozenset[str]
    sha256: str

    def __contains__(self, token: object) -> bool:
        """Whether the word of a token is in the list; `token` may have a space mark and capitals."""
        return isinstance(token, str) and unicodedata.normalize("NFC", normalise_token(token)) in self.words

    def __len__(self) -> int:
        return len(self.words)

    def unmatched(self, tokens: Iterable[str]) -> list[str]:
        """The words, sorted, that are none of these tokens, so that no top token can match them."""
        return sorted(self.words - {unicodedata.normalize("NFC", normalise_token(token)) for token in tokens})


class MatchCounts(NamedTuple):
    """How many of each feature's top tokens are in a vocabulary, int64 [n_features], and which, in their order."""

    counts: np.ndarray
    matched: list[list[str]]


def bundled_vocabularies() -> list[str]:
    """Names of the bundled word lists, sorted."""
    return sorted(path.stem for path in _VOCABULARIES.glob("*.txt"))


def load_vocabulary(name_or_path: str | Path | None) -> Vocabulary:
    """Read a word list: a bundled one by its name, or a text file; None is one without words.

    A file holds one word a line, in UTF-8; `#` starts a comment. Case, leading space marks, quotation marks around a
    word and invisible characters are ignored. A bundled name wins over a file: write `./medical` for the file.
    UnknownName: neither a bundled name nor a path. NotFound: no such file. BadFile, with its line: not UTF-8, or
    several words or columns. ConfigError: not a possible path. EmptySelection: no words.

    Example:
        >>> medical = load_vocabulary("medical")
        >>> " Chemotherapy" in medical, " chess" in medical
        (True, False)
    """
    if name_or_path is None:
        return Vocabulary("", frozenset(), sha256="")
    name, bundled = str(name_or_path), bundled_vocabularies()
    if name in bundled:
        data = (_VOCABULARIES / f"{name}.txt").read_bytes()
    else:
        path = user_path(name)
        if len(path.parts) < 2 and not path.suffix and not path.is_file():
            raise unknown_name("vocabulary", name, bundled)
        data = read_bytes(path, "vocabulary")
    words = frozenset(_parse_words(decode_utf8(data, at=name), at=name))
    if not words:
        raise EmptySelection("the vocabulary holds not one word.", at=name, fix="write one word a line.")
    return Vocabulary(name=name, words=words, sha256=hashlib.sha256(data).hexdigest())


def count_matches(top_tokens: Iterable[Sequence[str]], vocabulary: Vocabulary) -> MatchCounts:
    """Count, for each feature, the top tokens whose word is in the vocabulary.

    The word (no leading space, lower case) must match exactly: "Cancer" and " cancer" count as two. The paper seems to
    match inside tokens ("hearth", "otherapy"). `ConfigError` if a feature's tokens are one string.

    Example:
        >>> words = Vocabulary("two", frozenset({"cancer", "tumor"}), sha256="")
        >>> matches = count_matches([[" cancer", "Cancer", " crab"], [" tumour"]], words)
        >>> matches.counts.tolist(), matches.matched
        ([2, 0], [[' cancer', 'Cancer'], []])
    """
    matched: list[list[str]] = []
    for row, tokens in enumerate(top_tokens):
        if isinstance(tokens, str):
            raise ConfigError(
                f"top_tokens must be one list of tokens a feature. Got the string {tokens!r} at position {row}.",
                fix="put the tokens of each feature in a list.",
            )
        matched.append([token for token in tokens if token in vocabulary])
    return MatchCounts(counts=np.array([len(tokens) for tokens in matched], dtype=np.int64), matched=matched)


def select(
    features: pd.DataFrame,
    *,
    vocabulary: str | Path | Vocabulary = "medical",
    min_matches: int = 2,
    verdicts: pd.DataFrame | None = None,
    arm: str | None = None,
) -> pd.DataFrame:
    """Mark the domain features of an arm.

    Args:
        features: One row a feature: feature, top_tokens, top_tokens_dot, top_tokens_cosine.
        vocabulary: A bundled list's name, a path, or a loaded list.
        min_matches: How many top tokens must be in it, at least 1; 2 in the paper.
        verdicts: As `summarise_verdicts` gives. A domain feature then also needs a majority of yes.
        arm: For error messages.

    Returns:
        One row a feature, in the order given, domain or not: feature; matches (int64) and matched (list of str), under
            the projection of `top_tokens`; matches_dot, matches_cosine; in_vocabulary (matches >= min_matches); n_yes,
            n_no, n_unsure (0 where not reviewed); label (str); is_domain (bool).

    Raises `ConfigError` (also for verdicts that repeat a feature or name an unknown one), and as `load_vocabulary`.
    """
    if isinstance(min_matches, bool) or not isinstance(min_matches, int | np.integer) or min_matches < 1:
        raise ConfigError(f"min_matches must be an integer >= 1. Got {min_matches!r} instead.", at="min_matches")
    _require_columns(features, ("feature", *_TOKEN_COLUMNS), "the feature table", arm)
    words = vocabulary if isinstance(vocabulary, Vocabulary) else load_vocabulary(vocabulary)
    ranked, dot, cosine = (count_matches(features[column], words) for column in _TOKEN_COLUMNS)
    selection = pd.DataFrame(
        {
            "feature": features["feature"].to_numpy(dtype=np.int64),
            "matches": ranked.counts,
            "matched": pd.Series(ranked.matched, dtype=object),
            "matches_dot": dot.counts,
            "matches_cosine": cosine.counts,
            "in_vocabulary": ranked.counts >= min_matches,
        }
    )
    return _add_verdicts(selection, verdicts, arm)


def _add_verdicts(selection: pd.DataFrame, verdicts: pd.DataFrame | None, arm: str | None) -> pd.DataFrame:
    counts = ["n_yes", "n_no", "n_unsure"]
    if verdicts is None:
        return selection.assign(**dict.fromkeys(counts, 0), label="", is_domain=selection["in_vocabulary"])
    _require_columns(verdicts, _VERDICT_COLUMNS, "the summary of the verdicts", arm)
    at = f"arms.{arm}" if arm else None
    if verdicts["feature"].duplicated().any():
        message = "the summary of the verdicts names a feature twice."
        raise ConfigError(message, at=at, fix="summarise one arm at a time.")
    unknown = sorted(set(verdicts["feature"]) - set(selection["feature"]))
    if unknown:
        shown = ", ".join(str(feature) for feature in unknown[:5]) + (" …" if len(unknown) > 5 else "")
        raise ConfigError(
            f"{len(unknown)} verdicts are about features that the arm does not have: {shown}.",
            at=at,
            fix="use verdicts that were given on this SAE.",
        )
    by_feature = verdicts.set_index("feature").reindex(selection["feature"])
    return selection.assign(
        **{column: by_feature[column].fillna(0).to_numpy(dtype=np.int64) for column in counts},
        label=by_feature["label"].astype(object).where(by_feature["label"].notna(), "").to_numpy(),
        is_domain=selection["in_vocabulary"].to_numpy() & by_feature["majority"].eq(True).to_numpy(dtype=bool),
    )


def _require_columns(table: pd.DataFrame, columns: Sequence[str], what: str, arm: str | None) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ConfigError(
            f"{what} lacks the columns: {', '.join(missing)}.",
            at=f"arms.{arm}" if arm else None,
            fix=f"it needs: {', '.join(columns)}.",
        )


def _parse_words(text: str, *, at: str) -> list[str]:
    words = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = _normalise_word(line.split("#", 1)[0])
        if len(entry.split()) > 1 or _COLUMN_SEPARATOR.search(entry):
            raise BadFile(
                f"a line holds one word, as a top token is one word at most. Got {entry[:60]!r} instead.",
                at=f"{at}, line {number}",
                fix="put each word on a line of its own; of a table, keep the column of words alone.",
            )
        if entry:
            words.append(entry)
    return words


def _normalise_word(entry: str) -> str:
    """The compared form of a word: NFC, lower case, without invisible characters and surrounding quotation marks."""
    visible = "".join(c for c in unicodedata.normalize("NFC", entry) if c.isascii() or unicodedata.category(c) != "Cf")
    word = normalise_token(visible)
    if len(word) > 2 and word[0] in _QUOTES and word[-1] in _QUOTES:
        word = normalise_token(word[1:-1])
    return word


def choosable_tokens(tokens: Sequence[str], choice: Sequence[str], vectors: WordVectors | None = None) -> Tensor:
    """Which tokens of a (multilingual) vocabulary can be top tokens, bool [d_vocab].

    `choice` is ("all",); ("embeddings",): tokens whose word (`normalise_token`) is in `vectors`; or names of scripts:
    tokens all of whose letters are of these (by the names of the Unicode character database, after NFKC). Digits and
    punctuation are of every script, parts of a character of none. `UnknownName`: a script that is not in
    `saeffect.config.SCRIPTS`.

    Example:
        >>> choosable_tokens([" Fieber", "fièvre", "лихорадка", "熱", "42"], ["latin"]).tolist()
        [True, True, False, False, True]
    """
    if tuple(choice) == ("all",):
        return torch.ones(len(tokens), dtype=torch.bool)
    if tuple(choice) == ("embeddings",):
        if vectors is None:
            raise TypeError("word vectors are needed to choose the tokens that they know")
        return torch.tensor([vectors.row(normalise_token(token)) >= 0 for token in tokens])
    for name in choice:
        if name not in SCRIPTS:
            raise unknown_name("script", name, SCRIPTS)
    wanted = {*choice, ""}
    return torch.tensor(
        [
            _UNKNOWN not in token and all(_script_of(c) in wanted for c in unicodedata.normalize("NFKC", token))
            for token in tokens
        ]
    )


@cache
def _script_of(character: str) -> str:
    """The script of a letter, lower case, as in "hangul"; "" for other characters."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "unknown").lower().replace("-", " ").split()[0]
    return "han" if name == "cjk" else name
