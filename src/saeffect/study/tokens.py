"""The tokens of a study: every model uses the control's tokenizer, so that all read the same ids.

Top tokens are ranked over the tokens that every model has, without those that a fine-tune added.
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

# Texts that tokenizers with the same vocabulary can cut differently.
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
            parts.append(f"adds {_list_tokens(self.added)}")
        if self.missing:
            parts.append(f"lacks {_list_tokens(self.missing)}")
        if self.renamed:
            parts.append(f"renames {_list_tokens([f'{old} to {new}' for old, new in self.renamed])}")
        if self.cut is not None:
            text, base, own = self.cut
            parts.append(f"cuts {text[:40]!r} into {'|'.join(own)[:60]!r} where control has {'|'.join(base)[:60]!r}")
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

    def chat_format(self, template: str | None, arms: Sequence[str], at: str) -> ChatFormat:
        """The given chat template, else that of the first of `arms` with one (a base model often has none).

        ConfigError if there is none, NotFound without such a file.
        """
        source_arm = next((arm for arm in arms if self.templates[arm]), None)
        if template is not None or source_arm is None:
            return ChatFormat.of(self.tokenizer, template, at=at)
        return ChatFormat(self.tokenizer, str(self.templates[source_arm]), f"of {source_arm}'s tokenizer")

    def used_by(self, lm: LanguageModel) -> LanguageModel:
        """The model with the study's tokenizer instead of its own."""
        if self.identity is None:
            return lm
        return dataclasses.replace(lm, tokenizer=self.tokenizer, shared=self.shared)


def study_tokens(
    models: Mapping[str, ModelConfig], control: str, texts: Callable[[], Iterable[str]], at: Callable[[str], str]
) -> StudyTokens:
    """Load the tokenizer of every model, by arm, and compare it with the control's.

    `texts` gives texts to compare tokenizers on, called only if their files differ; `at` gives an arm's place for
    messages. SaeffectError: a tokenizer cannot be loaded. IncompatibleModels: two models have different tokens, apart
    from added ones.
    """
    loaded: dict[tuple[str, str | None], Any] = {}
    tokenizers = {}
    for arm in (control, *models):
        location = locate_model(models[arm], at=at(arm))
        key = (str(location), models[arm].revision)
        if key not in loaded:
            loaded[key] = load_tokenizer(location, models[arm], at=at(arm))
        tokenizers[arm] = loaded[key]
    reference = tokenizers[control]
    templates = {arm: own_template(tokenizer) for arm, tokenizer in tokenizers.items()}
    if len(loaded) == 1:
        return StudyTokens(reference, templates=templates)
    identities = [tokenizer_identity(tokenizer) for tokenizer in loaded.values()]
    control_tokens = known_tokens(reference)
    shared, differences = set(control_tokens), {}
    for arm, tokenizer in tokenizers.items():
        if tokenizer is reference or tokenizer_identity(tokenizer) == identities[0]:
            continue
        difference = _difference(reference, tokenizer, texts)
        if difference.renamed:
            _refuse_another_vocabulary(reference, tokenizer, (control, arm), at(arm))
        arm_tokens = known_tokens(tokenizer)
        shared &= {i for i, token in control_tokens.items() if arm_tokens.get(i) == token}
        if difference:
            differences[arm] = difference
    all_shared = len(shared) == len(control_tokens) and not any(difference.added for difference in differences.values())
    shared_ids = None if all_shared else frozenset(shared)
    return StudyTokens(reference, shared_ids, differences, fingerprint(identities), templates)


def _difference(reference: Any, other: Any, texts: Callable[[], Iterable[str]]) -> TokenizerDifference:
    base, own = known_tokens(reference), known_tokens(other)
    return TokenizerDifference(
        added=tuple(token for i, token in own.items() if i not in base),
        missing=tuple(token for i, token in base.items() if i not in own),
        renamed=tuple((token, own[i]) for i, token in base.items() if i in own and own[i] != token),
        cut=_first_difference(reference, other, [*texts(), *_PROBES]),
    )


def _first_difference(reference: Any, other: Any, texts: Iterable[str]) -> tuple[str, list[str], list[str]] | None:
    """The first text that they cut differently, from the first differing token on, and each one's pieces."""
    for text in texts:
        a, b = (list(tokenizer.encode(text, add_special_tokens=False)) for tokenizer in (reference, other))
        if a != b:
            n_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
            a, b = a[n_same:][:_SHOWN], b[n_same:][:_SHOWN]
            return str(reference.decode(a)), reference.convert_ids_to_tokens(a), other.convert_ids_to_tokens(b)
    return None


def _refuse_another_vocabulary(reference: Any, other: Any, names: tuple[str, str], at: str) -> None:
    """Refuse ids with different tokens, except placeholders or special tokens that were only renamed."""
    base, own = known_tokens(reference), known_tokens(other)
    added = {*getattr(reference, "added_tokens_decoder", {}), *getattr(other, "added_tokens_decoder", {})}
    different = [(i, token, own[i]) for i, token in base.items() if i in own and own[i] != token and i not in added]
    if different:
        i, token, own_token = different[0]
        raise IncompatibleModels(
            f"the models of {names[0]!r} and {names[1]!r} have different tokenizers: {len(different):,} of"
            f" {len(base):,} ids are another token, such as {i}, which is {token!r} in one and {own_token!r} in the"
            " other.",
            at=at,
            fix="compare a base model with its own fine-tune; features are named by tokens, so these must agree.",
        )


def _list_tokens(tokens: Sequence[str]) -> str:
    shown = ", ".join(tokens[:3]) + (", ..." if len(tokens) > 3 else "")
    return f"{len(tokens):,} token{'s' if len(tokens) != 1 else ''} ({shown})"
