"""Documents into rows of equal length, so that no token is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm.bos import begun

__all__ = ["interleave", "pack", "separator_id"]


def separator_id(tokenizer: Any) -> int:
    """The id that stands between documents: `<|endoftext|>` if the vocabulary has it, else end of sequence.

    Models with a vocabulary of BERT have no end of a sequence; [SEP] does its work.

    Raises:
        ConfigError: The tokenizer has none of these.
    """
    named = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("eos", "sep"))
    found = next((i for i in (tokenizer.get_vocab().get("<|endoftext|>"), *named) if i is not None), None)
    if found is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token to put between documents.",
            at="tokenizer.eos_token",
            fix="name one of its tokens as eos_token in the tokenizer_config.json beside the model.",
        )
    return int(found)


def pack(
    texts: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    *,
    context_size: int,
    separator: int,
    bos: int | None = None,
) -> Iterator[NDArray[np.int32]]:
    """Join documents with a separator and cut the stream into rows; the last, short piece is dropped.

    Args:
        texts: Documents.
        encode: Text to token ids.
        context_size: Tokens a row.
        separator: Id put after each document.
        bos: Id that each row begins with, as the first of its tokens; None for none.

    Yields:
        Token ids, int32 `[context_size]`.

    Raises:
        EmptySelection: The whole text is shorter than one row.

    Example:
        >>> letters = lambda text: [ord(letter) for letter in text]
        >>> [row.tolist() for row in pack(["ab", "c"], letters, context_size=2, separator=0)]
        [[97, 98], [0, 99]]
        >>> [row.tolist() for row in pack(["ab", "c"], letters, context_size=2, separator=0, bos=1)]
        [[1, 97], [1, 98], [1, 0], [1, 99], [1, 0]]
    """
    held: list[int] = []
    rows = 0
    for text in texts:
        held.extend(encode(text))
        held.append(separator)
        while len(row := begun(held[:context_size], bos)[:context_size]) == context_size:
            yield np.asarray(row, dtype=np.int32)
            rows += 1
            del held[: context_size - (row[0] != held[0])]  # a BOS put in front is none of the text
    if not rows:
        raise EmptySelection(
            f"the text has {len(held)} tokens, fewer than one context of {context_size}.",
            fix="give more text, or a smaller context_size.",
        )


def interleave(*streams: Iterator[NDArray[np.int32]]) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Take one row from each stream in turn, until the first of them ends; yields (stream index, row)."""
    while True:
        for index, stream in enumerate(streams):
            row = next(stream, None)
            if row is None:
                return
            yield index, row
