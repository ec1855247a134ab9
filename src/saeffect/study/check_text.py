"""The text of a study, looked at: sources are opened, first rows shown, repeats found; one chat as it is read."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from saeffect.config import TextSource
from saeffect.errors import EmptySelection, SaeffectError, placed
from saeffect.lm.chat import Encoded, has_part, messages_of, segments
from saeffect.lm.chat_rows import with_system
from saeffect.lm.corpora import documents_of, find_duplicates, is_local, read_corpus, source_files
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.text_files import format_of
from saeffect.lm.tokens import printable_text
from saeffect.paths import user_path
from saeffect.study.study import Study
from saeffect.study.texts import shortage, study_rows
from saeffect.study.training import arm_recipe

__all__ = ["chat_lines", "check_text", "duplicates_in_training", "first_rows", "template_words"]

_COUNTED = 2_000_000  # tokens of text; more take minutes, and are hardly too few
_ROWS = 3  # shown of each source
_WIDTH = 76  # characters of a row


def check_text(study: Study) -> str:
    """What the text is called, and what is missing of it; SaeffectError for a source that cannot be read."""
    text = study.config.text
    for index, source in enumerate(text.sources):
        documents = read_corpus(source, chat=text.format == "chat")
        with placed(study.at("text", "sources", str(index))):
            next(documents)
    called = f"bundled {text.bundled}" if text.bundled else text.called
    if not all(map(is_local, text.sources)):
        return f"{called}; not counted, since it is on the hub"
    start = text.model_copy(update={"tokens": min(text.tokens, _COUNTED)})
    lm = study.reader
    with placed(study.at("text")):
        rows = study_rows(start, lambda: lm, prepend_bos=lm.prepend_bos)
    short = shortage(text, rows) if len(rows) * rows.ids.shape[1] < start.tokens else ""
    return f"{called}; only {short}" if short else called


def first_rows(study: Study) -> list[str]:
    """Lines: for each source of text what it consists of, and its first three documents, one a line."""
    text = study.config.text
    if text.bundled is not None:
        lm = LanguageModel(None, study.tokens.tokenizer, "control", prepend_bos=False)
        start = text.model_copy(update={"tokens": max(256, 16 * text.context_size)})
        rows = study_rows(start, lambda: lm, prepend_bos=False)
        lines = []
        for index, name in enumerate(rows.names):
            lines.append(f"{name}: bundled token ids")
            of_source = rows.ids[rows.sources == index][:_ROWS]
            lines += [_shown(number, lm.decode(row.tolist())) for number, row in enumerate(of_source, start=1)]
        return lines
    lines = []
    for index, source in enumerate(text.sources):
        lines.append(f"{source.name}: {_consists_of(source)}")
        with placed(study.at("text", "sources", str(index))):
            shown = islice(read_corpus(source, chat=text.format == "chat"), _ROWS)
            said = map(_talk, shown) if text.format == "chat" else shown
            lines += [_shown(number, document) for number, document in enumerate(said, start=1)]
    return lines


def duplicates_in_training(study: Study) -> str:
    """A warning where held-out documents of the SAEs' training text stand in its training documents; "" for none."""
    if study.config.training is None:
        return ""
    recipe = arm_recipe(study, study.control)
    local = [source for source in recipe.text if is_local(source)]
    try:
        return find_duplicates(documents_of(local, recipe), recipe.held_out)
    except SaeffectError as error:
        raise error.placed(study.at("training", "text")) from None


def _consists_of(source: TextSource) -> str:
    how = "" if source.field == "text" else f", text from {source.field!r}"
    if not is_local(source):
        subset = f", subset {source.subset}" if source.subset else ""
        return f"dataset {source.path} on the hub, split {source.split}{subset}{how}"
    if user_path(source.path).is_file():
        return f"{source.path}{how}"
    try:
        kinds = Counter(format_of(file) for file in source_files(source))
    except SaeffectError:
        return f"the saved dataset {source.path}{how}"
    counted = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
    return f"{source.path} ({counted}){how}"


def _talk(document: str) -> str:
    return " | ".join(f"{message['role']}: {message['content']}" for message in messages_of(document))


def _shown(number: int, document: str) -> str:
    line = printable_text(" ".join(document[: 20 * _WIDTH].split()))
    return f"  {number}  {line if len(line) <= _WIDTH else line[: _WIDTH - 1] + '…'}"


_CHATS_COUNTED = 50  # conversations of each source
_PIECE = 160  # characters of a piece


def template_words(study: Study) -> str:
    """Whose chat template writes the study's conversations, and which arms have another or none of their own."""
    assert study.chat is not None
    ours, others = study.chat.template.strip(), []
    for arm, own in study.tokens.templates.items():
        if own is None:
            others.append(f"{arm} has none of its own")
        elif own.strip() != ours:
            others.append(f"{arm}'s own is another one")
    return "; ".join([f"the chat template {study.chat.origin}", *others])


def chat_lines(study: Study) -> list[str]:
    """What share of the conversations is at the chosen positions, and the first conversation, piece by piece.

    EmptySelection: none of the first tokens of rows is at the positions. SaeffectError: a conversation is none.
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
            for document in islice(read_corpus(source, chat=True), _CHATS_COUNTED):
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
        shown = shown if len(shown) <= _PIECE else f"{shown[: _PIECE // 2]} ... {shown[-_PIECE // 2 :]}"
        mark = "*" if counted[at : at + piece.n].any() else " "
        lines.append(f" {mark} {piece.who:9} | {shown}")
        at += piece.n
    return lines
