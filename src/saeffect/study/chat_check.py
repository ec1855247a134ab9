"""What `saeffect check` says of chats: the template, what counts, and one conversation as read."""

from __future__ import annotations

from itertools import islice

from saeffect.errors import EmptySelection, placed
from saeffect.lm.chat import Encoded, has_part, messages_of, segments
from saeffect.lm.chat_rows import with_system
from saeffect.lm.corpora import is_local, read_corpus
from saeffect.lm.tokens import printable_text
from saeffect.study.study import Study

__all__ = ["chat_lines", "template_words"]

_COUNTED = 50  # conversations of each source
_SHOWN = 160  # characters of a piece


def template_words(study: Study) -> str:
    """Whose chat template writes the study's conversations, and which arms have another or none of their own."""
    assert study.chat is not None
    ours, others = study.chat.template.strip(), []
    for arm, own in study.tokens.templates.items():
        if own is None:
            others.append(f"{arm} has none of its own")
        elif own.strip() != ours:
            others.append(f"{arm}'s own is another one")
    return "; ".join([f"the chat template {study.chat.whose}", *others])


def chat_lines(study: Study) -> list[str]:
    """What share of the conversations is at the chosen positions, and the first conversation, piece by piece.

    Raises:
        EmptySelection: None of the first tokens of rows that the study compares models on is at the positions.
        SaeffectError: A conversation is none, or the template refuses it.
    """
    text = study.config.text
    lm = study.reader
    n_tokens = n_counted = n_early = n_beyond = n = 0
    early = study.config.changes.tokens_per_row
    first: Encoded | None = None
    for index, source in enumerate(text.sources):
        if not is_local(source):
            continue
        with placed(study.at("text", "sources", str(index))):
            for document in islice(read_corpus(source, chat=True), _COUNTED):
                found = lm.encode_chat(with_system(messages_of(document), text.system))
                first = first or found
                n += 1
                n_tokens += len(found.ids)
                n_counted += int(has_part(found.parts, text.positions).sum())
                n_early += int(has_part(found.parts[:early], text.positions).sum())
                n_beyond += max(0, len(found.ids) - text.context_size)
    if first is None:
        return []
    if not n_counted:
        raise EmptySelection(
            f"no token of the first {n} conversations is at positions: {', '.join(text.positions)}.",
            at=study.at("text", "positions"),
            fix="choose others.",
        )
    if not n_early:
        raise EmptySelection(
            f"models are compared on the first {early} tokens of rows, and no conversation has a token at positions:"
            f" {', '.join(text.positions)} there.",
            at=study.at("changes", "tokens_per_row"),
            fix="make it larger.",
        )
    lines = [
        f"chats: {n_tokens / n:,.0f} tokens on average, {n_counted / n_tokens:.0%} of them at positions:"
        f" {', '.join(text.positions)} (first {n:,} conversations)"
    ]
    if n_beyond:
        lines.append(
            f"warning: {n_beyond / n_tokens:.0%} of the tokens lie beyond a row's {text.context_size:,} and are not"
            " read; text.context_size makes rows longer"
        )
    counted = has_part(first.parts, text.positions)
    lines.append("the first conversation as it is read (* counts):")
    at = 0
    for piece in segments(lm.tokenizer, first):
        shown = printable_text(piece.text).replace("\n", "\\n")
        shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN // 2]} ... {shown[-_SHOWN // 2 :]}"
        mark = "*" if counted[at : at + piece.n].any() else " "
        lines.append(f" {mark} {piece.who:9} | {shown}")
        at += piece.n
    return lines
