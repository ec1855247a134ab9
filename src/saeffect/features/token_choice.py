"""Which tokens can be top tokens, in a vocabulary of many languages.

A large vocabulary holds words of a hundred languages, and the tokens that a direction promotes most come from all of
them. Word vectors and word lists of one language then know few of a feature's top tokens. So the ranking can be left
to the tokens of some scripts, or to those that the vectors know.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from saeffect.config import SCRIPTS
from saeffect.errors import unknown_name
from saeffect.features.embeddings import WordVectors
from saeffect.lm.tokens import normalise_token

__all__ = ["choosable_tokens", "script_of"]

_HALF = "\ufffd"  # a part of a character, of which the script is not known


def choosable_tokens(tokens: Sequence[str], choice: Sequence[str], vectors: WordVectors | None = None) -> Tensor:
    """Which tokens of a vocabulary can be top tokens.

    Args:
        tokens: The text of each token, [d_vocab].
        choice: ("all",); ("embeddings",): tokens whose word (`normalise_token`) the vectors have; or names of scripts:
            tokens all of whose letters are of these. Digits and punctuation are of every script, parts of a character
            of none.
        vectors: Needed for ("embeddings",).

    Returns:
        Bool [d_vocab].

    Raises:
        UnknownName: A script that is not in `saeffect.config.SCRIPTS`.

    Source:
        Scripts are read off the names of characters in the Unicode character database, after NFKC.

    Example:
        >>> choosable_tokens([" Fieber", "fièvre", "лихорадка", "熱", "42"], ["latin"]).tolist()
        [True, True, False, False, True]
    """
    if tuple(choice) == ("all",):
        return torch.ones(len(tokens), dtype=torch.bool)
    if tuple(choice) == ("embeddings",):
        if vectors is None:
            raise TypeError("word vectors are needed to choose the tokens that they know")
        known = vectors.words
        return torch.tensor([_row_is_set(vectors, known.get(normalise_token(token), -1)) for token in tokens])
    for name in choice:
        if name not in SCRIPTS:
            raise unknown_name("script", name, SCRIPTS)
    wanted = {*choice, ""}
    return torch.tensor(
        [
            _HALF not in token and all(script_of(c) in wanted for c in unicodedata.normalize("NFKC", token))
            for token in tokens
        ]
    )


@cache
def script_of(character: str) -> str:
    """The script of a letter, lower case; "" for what is no letter.

    Example:
        >>> [script_of(c) for c in "aλд熱カ한7"]
        ['latin', 'greek', 'cyrillic', 'han', 'katakana', 'hangul', '']
    """
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "unknown").lower().replace("-", " ").split()[0]
    return "han" if name == "cjk" else name


def _row_is_set(vectors: WordVectors, row: int) -> bool:
    return row >= 0 and bool(vectors.vectors[row].any())
