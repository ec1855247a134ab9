"""Tokens as shown to people, and properties of a tokenizer: its ids, their texts, the tokens it adds before a text."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeffect.errors import ConfigError, first_line

if TYPE_CHECKING:
    from saeffect.config import BosRule

__all__ = [
    "ContinuationDecoder",
    "find_bos_id",
    "known_tokens",
    "normalise_token",
    "printable_text",
    "printable_token",
    "resolve_prepend_bos",
    "separator_id",
    "special_tokens",
    "token_texts",
    "tokenizer_identity",
    "tokenizer_trouble",
    "tokens_added_before",
    "with_bos",
]

# The leading space, as byte-level BPE (GPT-2, SmolLM2, Llama 3) and SentencePiece (Gemma, Llama 2) write it.
_SPACE_MARKS = "Ġ▁"
_LEADING = re.compile(rf"^[\s{_SPACE_MARKS}]+")
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Control, format (bidirectional marks, zero-width characters, tags), surrogate, private, unassigned,
# line and paragraph separators, and every space that is not the plain one.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
# Invisible characters that Unicode classes as letters or marks: grapheme joiner, Hangul and Khmer fillers, Braille
# blank, Mongolian and general variation selectors.
_BLANK = frozenset(
    map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0))
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


def normalise_token(token: str) -> str:
    """The word of a token, as looked up in vocabulary and word embedding: without leading spaces and space marks (also
    a literal leading Ġ) and trailing spaces, lower case.

    Example:
        >>> [normalise_token(token) for token in ("ĠCancer", "▁cancer", " CANCER ", "\\ncancer")]
        ['cancer', 'cancer', 'cancer', 'cancer']
    """
    return _LEADING.sub("", token).rstrip().lower()


def printable_token(token: str) -> str:
    """The token on one line, every character visible, none a control character.

    A leading space mark becomes a space; line feeds, carriage returns and tabs become backslash escapes; other
    invisible or control characters become `U+` and their number. Markup stays: escape it when writing HTML.

    Example:
        >>> printable_token("Ġtumor")
        ' tumor'
        >>> print(printable_token("a\\nb\\u202ec\\u200bd"))
        a\\nbU+202EcU+200Bd
    """
    if token.isascii() and token.isprintable():  # as most are
        return token
    marks = len(token) - len(token.lstrip(_SPACE_MARKS))
    return " " * marks + "".join(_visible(character) for character in token[marks:])


# Controls except line feed and tab, soft hyphens, zero-width spaces, bidirectional marks, line and paragraph
# separators, byte order marks, annotations, surrogates, tags; not joiners, which Persian, Indic scripts, emoji need.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable_text(text: str) -> str:
    """The text with control characters shown as `U+` and their number; line feeds and tabs stay.

    Example:
        >>> print(printable_text("\x1b[31mred \u202etxt.exe"))
        U+001B[31mred U+202Etxt.exe
    """
    if (text.isascii() and text.isprintable()) or _CONTROLS.search(text) is None:  # as most are
        return text
    return _CONTROLS.sub(lambda match: f"U+{ord(match[0]):04X}", text)


def _visible(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character == " ":
        return character
    if character in _BLANK or unicodedata.category(character) in _HIDDEN_CATEGORIES:
        return f"U+{ord(character):04X}"
    return character


_PROBES = ("a", "the", "1")  # whichever the tokenizer has a token for


def known_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokenizer's ids, ascending, each with its token in the tokenizer's notation; there may be gaps."""
    tokens = {int(i): token for token, i in tokenizer.get_vocab().items()}
    return dict(sorted(tokens.items()))


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids of tokens that are not text: beginnings and ends of texts, chat marks, masks."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


class ContinuationDecoder:
    """Decodes ids as a continuation, with the leading space that SentencePiece drops at the beginning of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        special = special_tokens(tokenizer)
        ids = (*tokenizer.encode("a", add_special_tokens=False)[-1:], *known_tokens(tokenizer))
        self._before = [i for i in ids if i not in special][:1]
        self._text_before = self._decode(self._before) if self._before else ""

    def __call__(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text = self._decode([*self._before, *ids], skip_special_tokens)
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        return self._decode(list(ids), skip_special_tokens)

    def _decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each id: leading spaces stay, partial characters are U+FFFD, unknown ids give `<unused i>`."""
    known, decode = known_tokens(tokenizer), ContinuationDecoder(tokenizer)
    return [decode([i]) if i in known else f"<unused {i}>" for i in ids]


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 of the tokens, their ids, and the tokenizer's rules."""
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


def tokenizer_trouble(source: Path | str, message: str) -> tuple[str, str]:
    """Why transformers cannot load a folder's or hub id's tokenizer, from its error message, and the fix."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    why = first_line(ValueError(message)) if message.strip() else "no reason is given"
    if "trust_remote_code" in message:
        return why, "set trust_remote_code: true if you trust the code that comes with the model."
    files = {file.name for file in source.iterdir()} if isinstance(source, Path) and source.is_dir() else set()
    model_only = any(name.endswith(".model") for name in files) and "tokenizer.json" not in files
    if model_only or any(name in message.lower() for name in ("sentencepiece", "tiktoken", "protobuf")):
        if not (is_sentencepiece_available() and is_protobuf_available()):
            why = "it is a tokenizer.model alone, and sentencepiece or protobuf, which read it, are not installed"
            return why, "pip install 'saeffect[sentencepiece]', or put the base model's tokenizer.json into the folder."
        return why, "tokenizer.model is no SentencePiece model; put the base model's tokenizer.json into the folder."
    if isinstance(source, Path):
        return why, "save the tokenizer beside the model: tokenizer.save_pretrained(folder)."
    return why, "check the name and your connection, or save the tokenizer beside the model."


def separator_id(tokenizer: Any) -> int:
    """The id between documents: `<|endoftext|>` if known, else end of sequence, else [SEP]; else ConfigError."""
    ids = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("eos", "sep"))
    separator = next((i for i in (tokenizer.get_vocab().get("<|endoftext|>"), *ids) if i is not None), None)
    if separator is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token to put between documents.",
            at="tokenizer.eos_token",
            fix="name one of its tokens as eos_token in the tokenizer_config.json beside the model.",
        )
    return int(separator)


def tokens_added_before(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer adds before a text: none, BOS, or (a few tokenizers) several; measured."""
    for probe in _PROBES if tokenizer is not None else ():
        plain = list(tokenizer.encode(probe, add_special_tokens=False))
        if not plain:
            continue
        whole = list(tokenizer.encode(probe, add_special_tokens=True))
        n_added = max(0, len(whole) - len(plain))
        n_before = next((n for n in range(n_added + 1) if whole[n : n + len(plain)] == plain), n_added)
        return whole[:n_before]
    return []


def find_bos_id(tokenizer: Any, prepend: bool | None) -> int | None:
    """The BOS id of rows of text and prompts, or None. `prepend`: whether there is one; None: as the tokenizer does
    (Gemma, Llama and Mistral were trained with one and are far worse without it; SmolLM2 and GPT-2 were not).
    ConfigError if BOS is required and the tokenizer has none, or if it adds several tokens before a text.
    """
    if prepend is False:
        return None
    bos = getattr(tokenizer, "bos_token_id", None)
    if prepend and bos is not None:
        return int(bos)
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
    """Token ids with BOS in front, if there is one; not twice.

    Example:
        >>> with_bos([5, 6], 2), with_bos([2, 5, 6], 2), with_bos([5, 6], None)
        ([2, 5, 6], [2, 5, 6], [5, 6])
    """
    return [*([] if bos is None or list(ids[:1]) == [bos] else [bos]), *ids]


def resolve_prepend_bos(rule: BosRule, prepend_bos: Mapping[str, Any]) -> bool | None:
    """Whether texts begin with BOS; None: as the tokenizer does. "auto" follows the SAEs: `prepend_bos` maps each
    SAE's name to that key of its cfg.json (or None). ConfigError if they contradict each other.

    Example:
        >>> [resolve_prepend_bos("auto", saes) for saes in ({"control": True, "treatment": None}, {"control": None})]
        [True, None]
    """
    if rule != "auto":
        return rule == "always"
    settings = {name: word for name, word in prepend_bos.items() if isinstance(word, bool)}
    if len(set(settings.values())) > 1:
        having, lacking = (", ".join(n for n, word in settings.items() if word is value) for value in (True, False))
        raise ConfigError(
            f"these SAEs were trained on texts with a BOS token in front: {having}; these on texts without: {lacking}.",
            at="bos",
            fix="use SAEs that were trained alike, or read all of them one way with bos: always or bos: never.",
        )
    return next(iter(settings.values()), None)
