"""Token strings: the word that a token stands for, and a form of it that is safe to show.

A token is whatever a tokenizer's training made of its text, so it can be anything: half a character, markup,
a mark that reverses the direction of the page.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saeffect.config import BosRule
from saeffect.errors import ConfigError

__all__ = [
    "tokens_added_before",
    "with_bos",
    "find_bos_id",
    "decode_continuations",
    "known_tokens",
    "normalise_token",
    "ordinary_token",
    "resolve_prepend_bos",
    "printable_text",
    "printable_token",
    "special_tokens",
    "token_texts",
    "tokenizer_identity",
    "tokenizer_trouble",
]

# The leading space, as byte-level BPE (GPT-2, SmolLM2, Llama 3) and SentencePiece (Gemma, Llama 2) write it.
_SPACE_MARKS = "Ġ▁"
_LEADING = re.compile(rf"^[\s{_SPACE_MARKS}]+")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Control, format (bidirectional marks, zero-width characters, tags), surrogate, private, unassigned,
# line and paragraph separators, and every space that is not the plain one.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
# Characters that Unicode counts as letters or marks, yet draws as nothing: grapheme joiner, Hangul and Khmer
# fillers, Braille blank, Mongolian and general variation selectors.
_BLANK = frozenset(
    map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0))
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


def normalise_token(token: str) -> str:
    """The word of a token: no leading space or space mark, no trailing space, lower case.

    The vocabulary and the word embedding are both looked up by this form. A word that begins with the letter
    Ġ loses it: in a token list that letter is the space mark of byte-level BPE.

    Example:
        >>> [normalise_token(token) for token in ("ĠCancer", "▁cancer", " CANCER ", "\\ncancer")]
        ['cancer', 'cancer', 'cancer', 'cancer']
    """
    return _LEADING.sub("", token).rstrip().lower()


def printable_token(token: str) -> str:
    """The token as one line in which every character can be seen and none acts on the text around it.

    A leading space mark becomes the plain space it stands for, and plain spaces stay. Line feeds, carriage
    returns and tabs show as backslash escapes; other controls, bidirectional marks, zero-width and blank
    characters, lone surrogates and unassigned code points show as `U+` and their number. Markup is left
    alone: escaping `<` is the business of what writes the HTML.

    Example:
        >>> printable_token("Ġtumor")
        ' tumor'
        >>> print(printable_token("a\\nb\\u202ec\\u200bd"))
        a\\nbU+202EcU+200Bd
    """
    marks = len(token) - len(token.lstrip(_SPACE_MARKS))
    return " " * marks + "".join(_shown(character) for character in token[marks:])


# Controls but line feed and tab, soft hyphens and zero-width spaces, bidirectional marks, line and paragraph
# separators, byte order marks, annotations, surrogates, tags. Joiners stay: Persian, Indic scripts, emoji need them.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable_text(text: str) -> str:
    """The text without anything that acts on a terminal or on the page around it; it may have several lines.

    Controls other than line feeds and tabs, bidirectional marks and what else is not seen show as `U+` and their
    number. All else stays as it is, letters of any script among it.

    Example:
        >>> print(printable_text("\x1b[31mred \u202etxt.exe"))
        U+001B[31mred U+202Etxt.exe
    """
    return _ACTING.sub(lambda found: f"U+{ord(found[0]):04X}", text)


def _shown(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character == " ":
        return character
    if character in _BLANK or unicodedata.category(character) in _HIDDEN_CATEGORIES:
        return f"U+{ord(character):04X}"
    return character


_SENTENCEPIECE = ("sentencepiece", "google.protobuf")  # packages that read a tokenizer.model


def known_tokens(tokenizer: Any) -> dict[int, str]:
    """Every id that the tokenizer knows, with the token in its own notation, in the order of the ids.

    The ids may have holes, so the highest is not the number of tokens less one.
    """
    tokens = {int(i): token for token, i in tokenizer.get_vocab().items()}
    return {i: tokens[i] for i in sorted(tokens)}


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids that stand for no text: beginnings and ends of texts, marks of a chat, masks."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def ordinary_token(tokenizer: Any) -> int | None:
    """An id with a text of its own, to decode others behind: that of an "a" if there is one."""
    special = special_tokens(tokenizer)
    ids = (*tokenizer.encode("a", add_special_tokens=False)[-1:], *known_tokens(tokenizer))
    return next((i for i in ids if i not in special), None)


def decode_continuations(
    tokenizer: Any, texts: Iterable[Sequence[int]], before: int | None, *, skip_special_tokens: bool = False
) -> list[str]:
    """What each sequence of ids adds to the text before it.

    Decoders of SentencePiece drop the space at the very beginning of what they decode, so ids are decoded behind
    another token, whose text is taken off again.

    Args:
        tokenizer: Decodes.
        texts: Sequences of ids.
        before: The other token, see `ordinary_token`.
        skip_special_tokens: Whether special tokens are left out.
    """
    how = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    first = [] if before is None else [before]
    head = str(tokenizer.decode(first, **how)) if first else ""
    found = []
    for ids in texts:
        text = str(tokenizer.decode([*first, *ids], **how))
        found.append(text[len(head) :] if text.startswith(head) else str(tokenizer.decode(list(ids), **how)))
    return found


def token_texts(tokenizer: Any, n: int) -> list[str]:
    """The text of each id below `n`: a leading space stays; half a character is U+FFFD; `<unused i>` in the holes."""
    known = [i for i in known_tokens(tokenizer) if i < n]
    found = decode_continuations(tokenizer, ([i] for i in known), ordinary_token(tokenizer))
    texts = dict(zip(known, found, strict=True))
    return [texts.get(i, f"<unused {i}>") for i in range(n)]


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 of the tokens, their ids, and the rules by which text is cut into them."""
    digest = hashlib.sha256()
    for i, token in known_tokens(tokenizer).items():
        digest.update(f"{i}\0{token}\0".encode("utf-8", "surrogatepass"))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules["model"].pop("vocab", None)
        how = {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "model")}
        digest.update(json.dumps(how, sort_keys=True).encode())
    return digest.hexdigest()


def tokenizer_trouble(place: Path | str, said: str) -> tuple[str, str]:
    """Why transformers cannot load a tokenizer, and what to do about it.

    Args:
        place: The folder, or a hub id.
        said: What transformers says; it names the last of several things that it tried.
    """
    why = said.strip().splitlines()[0] if said.strip() else "no reason is given"
    if "trust_remote_code" in said:
        return why, "set trust_remote_code: true if you trust the code that comes with the model."
    there = {file.name for file in place.iterdir()} if isinstance(place, Path) and place.is_dir() else set()
    alone = any(name.endswith(".model") for name in there) and "tokenizer.json" not in there
    if alone or any(name in said.lower() for name in ("sentencepiece", "tiktoken", "protobuf")):
        if not all(map(_installed, _SENTENCEPIECE)):
            why = "it is a tokenizer.model alone, and sentencepiece or protobuf, which read it, are not installed"
            return why, "pip install 'saeffect[sentencepiece]', or put the base model's tokenizer.json into the folder."
        return why, "tokenizer.model is no SentencePiece model; put the base model's tokenizer.json into the folder."
    if isinstance(place, Path):
        return why, "save the tokenizer beside the model: tokenizer.save_pretrained(folder)."
    return why, "check the name and your connection, or save the tokenizer beside the model."


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


_PROBES = ("a", "the", "1")  # whichever the tokenizer has a token for


def tokens_added_before(tokenizer: Any) -> list[int]:
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


def find_bos_id(tokenizer: Any, prepend: bool | None) -> int | None:
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
    added = tokens_added_before(tokenizer)
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


def with_bos(ids: Sequence[int], bos: int | None) -> list[int]:
    """Token ids with BOS in front, if there is to be one; not twice, where a text brings its own.

    Example:
        >>> with_bos([5, 6], 2), with_bos([2, 5, 6], 2), with_bos([5, 6], None)
        ([2, 5, 6], [2, 5, 6], [5, 6])
    """
    return [*([] if bos is None or list(ids[:1]) == [bos] else [bos]), *ids]


def resolve_prepend_bos(rule: BosRule, words: Mapping[str, Any]) -> bool | None:
    """Whether texts are to begin with BOS; None for the tokenizer's own way.

    Args:
        rule: "always", "never", or "auto": what the SAEs say, and where they say nothing what the tokenizer does.
        words: `prepend_bos` of each SAE's cfg.json by the SAE's name; what is neither true nor false says nothing.

    Raises:
        ConfigError: The SAEs contradict each other.

    Example:
        >>> [resolve_prepend_bos("auto", words) for words in ({"control": True, "treatment": None}, {"control": None})]
        [True, None]
    """
    if rule != "auto":
        return rule == "always"
    said = {name: word for name, word in words.items() if isinstance(word, bool)}
    if len(set(said.values())) > 1:
        with_one, without = (", ".join(n for n, word in said.items() if word is value) for value in (True, False))
        raise ConfigError(
            f"these SAEs were trained on texts with a BOS token in front: {with_one}; these on texts without:"
            f" {without}.",
            at="bos",
            fix="use SAEs that were trained alike, or read all of them one way with bos: always or bos: never.",
        )
    return next(iter(said.values()), None)
