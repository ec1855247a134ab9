"""The token that a text begins with (BOS): which one it is, and who says whether it is there.

Gemma, Llama and Mistral were trained on texts that all begin with one, and without it are other, far worse models;
SmolLM2 and GPT-2 were not. What a tokenizer does is measured, not read off an attribute: many have a `bos_token` that
they never use, and some have none but put a token of another name first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saeffect.config import BosRule
from saeffect.errors import ConfigError

__all__ = ["added_before", "begun", "bos_of", "prepends"]

_PROBES = ("a", "the", "1")  # whichever the tokenizer has a token for


def added_before(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text of its own accord: none, or BOS; a few put several there.

    What it puts behind the text (an end of sequence) does not count.
    """
    if tokenizer is None:
        return []
    for probe in _PROBES:
        plain = list(tokenizer.encode(probe, add_special_tokens=False))
        if not plain:
            continue
        whole = list(tokenizer.encode(probe, add_special_tokens=True))
        n_added = max(0, len(whole) - len(plain))
        n_before = next((n for n in range(n_added + 1) if whole[n : n + len(plain)] == plain), n_added)
        return whole[:n_before]
    return []


def bos_of(tokenizer: Any, prepend: bool | None) -> int | None:
    """The id that rows of text and prompts begin with; None for none.

    Args:
        tokenizer: The transformers tokenizer.
        prepend: Whether there is to be one; None for the tokenizer's own way.

    Raises:
        ConfigError: There is to be one, and the tokenizer has none; or it puts several there.
    """
    if prepend is False:
        return None
    named = getattr(tokenizer, "bos_token_id", None)
    if prepend and named is not None:
        return int(named)
    added = added_before(tokenizer)
    if len(added) > 1:
        raise ConfigError(
            f"the tokenizer puts {len(added)} tokens before a text ({tokenizer.decode(added)!r}), not one at most.",
            at="bos",
            fix="say bos: always for its bos_token alone, or bos: never for none.",
        )
    if not added and prepend:
        raise ConfigError(
            "texts are to begin with a BOS token (bos: always, or prepend_bos: true in an SAE's cfg.json), and the"
            " tokenizer has none.",
            at="bos",
            fix="say bos: never, or give a tokenizer with a bos_token.",
        )
    return int(added[0]) if added else None


def begun(ids: Sequence[int], bos: int | None) -> list[int]:
    """Token ids with BOS in front, if there is to be one; not twice, where a text brings its own.

    Example:
        >>> begun([5, 6], 2), begun([2, 5, 6], 2), begun([5, 6], None)
        ([2, 5, 6], [2, 5, 6], [5, 6])
    """
    return [*([] if bos is None or list(ids[:1]) == [bos] else [bos]), *ids]


def prepends(rule: BosRule, words: Mapping[str, Any]) -> bool | None:
    """Whether texts are to begin with BOS; None for the tokenizer's own way.

    Args:
        rule: "always", "never", or "auto": what the SAEs say, and where they say nothing what the tokenizer does.
        words: `prepend_bos` of each SAE's cfg.json by the SAE's name; what is neither true nor false says nothing.

    Raises:
        ConfigError: The SAEs contradict each other.

    Example:
        >>> prepends("auto", {"control": True, "treatment": None}), prepends("auto", {"control": None})
        (True, None)
    """
    if rule != "auto":
        return rule == "always"
    said = {name: word for name, word in words.items() if isinstance(word, bool)}
    if len(set(said.values())) > 1:
        with_bos, without = (", ".join(n for n, word in said.items() if word is value) for value in (True, False))
        raise ConfigError(
            f"these SAEs were trained on texts with a BOS token in front: {with_bos}; these on texts without:"
            f" {without}.",
            at="bos",
            fix="use SAEs that were trained alike, or read all of them one way with bos: always or bos: never.",
        )
    return next(iter(said.values()), None)
