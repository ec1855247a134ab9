"""Token strings: the word that a token stands for, and a form of it that is safe to show.

A token is whatever a tokenizer's training made of its text, so it can be anything: half a character, markup,
a mark that reverses the direction of the page.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["normalise_token", "printable_text", "printable_token"]

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
