"""The tokens of a study: every model uses the control's tokenizer, so that all see the same ids.

Top tokens are ranked over the tokens that every model has; tokens that a fine-tune added are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from saeffect.config import ModelConfig
from saeffect.errors import IncompatibleModels
from saeffect.io import fingerprint
from saeffect.lm.chat import ChatFormat, own_template
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_tokenizer, locate_model
from saeffect.lm.tokens import known_tokens, tokenizer_identity

__all__ = ["StudyTokens", "TokenizerDifference", "study_tokens"]

# Texts that tokenizers of one vocabulary have cut differently.
_PROBES = ("Two  spaces, a\ttab\nand a line.", " Don't", "naïve café ½ №", "1234567 3.14", "你好", "🩺")
_SHOWN = 8  # tokens


@dataclass(frozen=True)
class TokenizerDifference:
    """How an arm's own tokenizer differs from the control's: tokens that only the arm has, or only the control; ids
    with different tokens, (the control's, the arm's); and a text that is cut differently, with the control's and the
    arm's pieces.
    """

    added: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    cut: tuple[str, list[str], list[str]] | None = None

    def __bool__(self) -> bool:
        return bool(self.added or self.missing or self.renamed or self.cut)

    def words(self) -> str:
        """The differences in words, to follow the arm's name."""
        parts = []
        if self.added:
            parts.append(f"adds {_counted(self.added)}")
        if self.missing:
            parts.append(f"lacks {_counted(self.missing)}")
        if self.renamed:
            parts.append(f"renames {_counted([f'{old} to {new}' for old, new in self.renamed])}")
        if self.cut is not None:
            text, ours, theirs = self.cut
            parts.append(f"cuts {text[:40]!r} into {'|'.join(theirs)[:60]!r} where control has {'|'.join(ours)[:60]!r}")
        return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class StudyTokens:
    """The control's tokenizer, and the tokens that all models share.

    Attributes:
        shared: Ids that are the same token in every model; None if all have the same tokens.
        differences: By arm, for those whose own tokenizer differs.
        identity: SHA-256 of all tokenizers; None if all arms have identical files.
        templates: By arm, the chat template of its own tokenizer, None without one.
    """

    tokenizer: Any
    shared: frozenset[int] | None = None
    differences: Mapping[str, TokenizerDifference] = field(default_factory=dict)
    identity: str | None = None
    templates: Mapping[str, str | None] = field(default_factory=dict)

    def chat_format(self, given: str | None, arms: Sequence[str], at: str) -> ChatFormat:
        """The chat template that is `given`, else that of the first of `arms` with one (a base model often has none).

        ConfigError if there is none, NotFound without such a file.
        """
        whose = next((arm for arm in arms if self.templates[arm]), None)
        if given is not None or whose is None:
            return ChatFormat.of(self.tokenizer, given, at=at)
        return ChatFormat(self.tokenizer, str(self.templates[whose]), f"of {whose}'s tokenizer")

    def used_by(self, lm: LanguageModel) -> LanguageModel:
        """The model with the study's tokenizer instead of its own."""
        if self.identity is None:
            return lm
        return dataclasses.replace(lm, tokenizer=self.tokenizer, shared=self.shared)


def study_tokens(
    models: Mapping[str, ModelConfig], control: str, texts: Callable[[], Iterable[str]], at: Callable[[str], str]
) -> StudyTokens:
    """Load the tokenizer of every model, by arm, and compare it with the control's.

    `texts` gives texts that all should cut alike, called only if their rules differ; `at` an arm's place for messages.
    SaeffectError: a tokenizer cannot be loaded. IncompatibleModels: two models have different tokens, apart from added
    ones.
    """
    loaded: dict[tuple[str, str | None], Any] = {}
    of_arm = {}
    for arm in (control, *models):
        place = locate_model(models[arm], at=at(arm))
        key = (str(place), models[arm].revision)
        if key not in loaded:
            loaded[key] = load_tokenizer(place, models[arm], at=at(arm))
        of_arm[arm] = loaded[key]
    ours = of_arm[control]
    templates = {arm: own_template(tokenizer) for arm, tokenizer in of_arm.items()}
    if len(loaded) == 1:
        return StudyTokens(ours, templates=templates)
    identities = [tokenizer_identity(tokenizer) for tokenizer in loaded.values()]
    known = known_tokens(ours)
    shared, differences = set(known), {}
    for arm, theirs in of_arm.items():
        if theirs is ours or tokenizer_identity(theirs) == identities[0]:
            continue
        found = _difference(ours, theirs, texts)
        if found.renamed:
            _refuse_another_vocabulary(ours, theirs, (control, arm), at(arm))
        own = known_tokens(theirs)
        shared &= {i for i, token in known.items() if own.get(i) == token}
        if found:
            differences[arm] = found
    everywhere = len(shared) == len(known) and not any(found.added for found in differences.values())
    return StudyTokens(ours, None if everywhere else frozenset(shared), differences, fingerprint(identities), templates)


def _difference(ours: Any, theirs: Any, texts: Callable[[], Iterable[str]]) -> TokenizerDifference:
    mine, own = known_tokens(ours), known_tokens(theirs)
    return TokenizerDifference(
        added=tuple(token for i, token in own.items() if i not in mine),
        missing=tuple(token for i, token in mine.items() if i not in own),
        renamed=tuple((token, own[i]) for i, token in mine.items() if i in own and own[i] != token),
        cut=_cut(ours, theirs, [*texts(), *_PROBES]),
    )


def _cut(ours: Any, theirs: Any, texts: Iterable[str]) -> tuple[str, list[str], list[str]] | None:
    """The first text that they cut differently, from the first difference on."""
    for text in texts:
        a, b = (list(tokenizer.encode(text, add_special_tokens=False)) for tokenizer in (ours, theirs))
        if a != b:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
            a, b = a[same:][:_SHOWN], b[same:][:_SHOWN]
            return str(ours.decode(a)), ours.convert_ids_to_tokens(a), theirs.convert_ids_to_tokens(b)
    return None


def _refuse_another_vocabulary(ours: Any, theirs: Any, names: tuple[str, str], at: str) -> None:
    """Refuse ids with different tokens, except placeholders or special tokens that were only renamed."""
    mine, own = known_tokens(ours), known_tokens(theirs)
    added = {*getattr(ours, "added_tokens_decoder", {}), *getattr(theirs, "added_tokens_decoder", {})}
    other = [i for i, token in mine.items() if i in own and own[i] != token and i not in added]
    if other:
        i = other[0]
        raise IncompatibleModels(
            f"the models of {names[0]!r} and {names[1]!r} have different tokenizers: {len(other):,} of {len(mine):,}"
            f" ids are another token, such as {i}, which is {mine[i]!r} in one and {own[i]!r} in the other.",
            at=at,
            fix="compare a base model with its own fine-tune; features are named by tokens, so these must agree.",
        )


def _counted(tokens: Sequence[str]) -> str:
    shown = ", ".join(tokens[:3]) + (", ..." if len(tokens) > 3 else "")
    return f"{len(tokens):,} token{'s' if len(tokens) != 1 else ''} ({shown})"
