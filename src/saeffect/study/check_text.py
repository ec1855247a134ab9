"""Check the text of a study: open the sources, show first rows, find repeats, show how one chat is read."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from saeffect.config import TextSource
from saeffect.errors import EmptySelection, SaeffectError, placed
from saeffect.lm.chat import Encoded, has_part, messages_of, segments
from saeffect.lm.chat_rows import with_system
from saeffect.lm.corpora import documents_of, find_duplicates, is_local, is_saved_dataset, read_corpus, source_files
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.text_files import format_of
from saeffect.lm.tokens import printable_text
from saeffect.paths import user_path
from saeffect.study.study import Study
from saeffect.study.texts import require_rows, shortage, study_rows
from saeffect.study.training import arm_recipe

__all__ = ["chat_lines", "check_text", "duplicates_in_training", "first_rows", "template_words"]

_MAX_COUNTED = 2_000_000  # tokens of text; counting more takes minutes, and more is hardly too little
_N_SHOWN = 3  # shown of each source
_WIDTH = 76  # characters of a row


def check_text(study: Study) -> str:
    """The text's name and how many tokens it lacks; SaeffectError for a source that cannot be read."""
    text = study.config.text
    for index, source in enumerate(text.sources):
        documents = read_corpus(source, chat=text.format == "chat")
        with placed(study.at("text", "sources", str(index))):
            next(documents)
    name = f"bundled {text.bundled}" if text.bundled else text.label
    if not all(map(is_local, text.sources)):
        return f"{name}; not counted, since it is on the hub"
    sample = text.model_copy(update={"tokens": min(text.tokens, _MAX_COUNTED)})
    lm = study.reader
    with placed(study.at("text")):
        rows = study_rows(sample, lambda: lm, prepend_bos=lm.prepend_bos)
        require_rows(rows)
    short = shortage(text, rows) if len(rows) * rows.ids.shape[1] < sample.tokens else ""
    return f"{name}; only {short}" if short else name


def first_rows(study: Study) -> list[str]:
    """For each source of text, of the study and of its training, a line about its files and one for each of its first
    three documents. Training text that cannot be read is no error, since the SAEs may come from another machine.
    """
    text, lines = study.config.text, list[str]()
    if text.bundled is not None:
        lm = LanguageModel(None, study.tokens.tokenizer, "control", prepend_bos=False)
        sample = text.model_copy(update={"tokens": max(256, 16 * text.context_size)})
        rows = study_rows(sample, lambda: lm, prepend_bos=False)
        for index, name in enumerate(rows.names):
            lines.append(f"{name}: bundled token ids")
            of_source = rows.ids[rows.sources == index][:_N_SHOWN]
            lines += [_row_line(number, lm.decode(row.tolist())) for number, row in enumerate(of_source, start=1)]
    else:
        for index, source in enumerate(text.sources):
            with placed(study.at("text", "sources", str(index))):
                lines += _source_lines(source, text.format == "chat")
    if study.config.training is None:
        return lines
    recipe = arm_recipe(study, study.control)
    for source in recipe.text:
        try:
            lines += _source_lines(source, recipe.format == "chat", "training, ")
        except SaeffectError as error:
            lines += [f"training, {source.name}: {source.path}", f"  cannot be read here: {error.message}"]
    return lines


def _source_lines(source: TextSource, chat: bool, where: str = "") -> list[str]:
    lines = [f"{where}{source.name}: {_describe_source(source)}"]
    for number, document in enumerate(islice(read_corpus(source, chat=chat), _N_SHOWN), start=1):
        turns = messages_of(document) if chat else []
        lines.append(_row_line(number, " | ".join(f"{turn['role']}: {turn['content']}" for turn in turns) or document))
    return lines


def duplicates_in_training(study: Study) -> str:
    """A warning if held-out documents of the SAEs' training text are among its training documents; else ""."""
    if study.config.training is None:
        return ""
    recipe = arm_recipe(study, study.control)
    local = [source for source in recipe.text if is_local(source)]
    try:
        return find_duplicates(documents_of(local, recipe), recipe.held_out)
    except SaeffectError as error:
        raise error.placed(study.at("training", "text")) from None


def _describe_source(source: TextSource) -> str:
    field_words = "" if source.field == "text" else f", text from {source.field!r}"
    if not is_local(source):
        subset = f", subset {source.subset}" if source.subset else ""
        return f"dataset {source.path} on the hub, split {source.split}{subset}{field_words}"
    if is_saved_dataset(source):
        return f"the saved dataset {source.path}, split {source.split}{field_words}"
    if user_path(source.path).is_file():
        return f"{source.path}{field_words}"
    kinds = Counter(format_of(file) for file in source_files(source))
    counts = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
    return f"{source.path} ({counts}){field_words}"


def _row_line(number: int, document: str) -> str:
    line = printable_text(" ".join(document[: 20 * _WIDTH].split()))
    return f"  {number}  {line if len(line) <= _WIDTH else line[: _WIDTH - 1] + '…'}"


_CHATS_COUNTED = 50  # conversations of each source
_PIECE = 160  # characters of a piece


def template_words(study: Study) -> str:
    """Which chat template writes the study's conversations, and which arms have another one or none."""
    assert study.chat is not None
    study_template, notes = study.chat.template.strip(), []
    for arm, template in study.tokens.templates.items():
        if template is None:
            notes.append(f"{arm} has none of its own")
        elif template.strip() != study_template:
            notes.append(f"{arm}'s own is another one")
    return "; ".join([f"the chat template {study.chat.origin}", *notes])


def chat_lines(study: Study) -> list[str]:
    """What share of the conversations' tokens is at the chosen positions, and the first conversation, piece by piece.

    EmptySelection: none of the first tokens of rows is at the positions. SaeffectError: a document is no conversation.
    """
    text = study.config.text
    lm = study.reader
    n_tokens = n_counted = n_counted_early = n_unread = n = 0
    n_read = study.config.changes.tokens_per_row
    first: Encoded | None = None
    for index, source in enumerate(text.sources):
        if not is_local(source):
            continue
        with placed(study.at("text", "sources", str(index))):
            for document in islice(read_corpus(source, chat=True), _CHATS_COUNTED):
                encoded = lm.encode_chat(with_system(messages_of(document), text.system))
                first = first or encoded
                n += 1
                n_tokens += len(encoded.ids)
                n_counted += int(has_part(encoded.parts, text.positions).sum())
                n_counted_early += int(has_part(encoded.parts[:n_read], text.positions).sum())
                n_unread += max(0, len(encoded.ids) - text.context_size)
    if first is None:
        return []
    if not n_counted:
        raise EmptySelection(
            f"no token of the first {n} conversations is at positions: {', '.join(text.positions)}.",
            at=study.at("text", "positions"),
            fix="choose others.",
        )
    if not n_counted_early:
        raise EmptySelection(
            f"models are compared on the first {n_read} tokens of rows, and no conversation has a token at positions:"
            f" {', '.join(text.positions)} there.",
            at=study.at("changes", "tokens_per_row"),
            fix="make it larger.",
        )
    lines = [
        f"chats: {n_tokens / n:,.0f} tokens on average, {n_counted / n_tokens:.0%} of them at positions:"
        f" {', '.join(text.positions)} (first {n:,} conversations)"
    ]
    if n_unread:
        lines.append(
            f"warning: {n_unread / n_tokens:.0%} of the tokens lie beyond a row's {text.context_size:,} and are not"
            " read; text.context_size makes rows longer"
        )
    counted = has_part(first.parts, text.positions)
    lines.append("the first conversation as it is read (* counts):")
    position = 0
    for piece in segments(lm.tokenizer, first):
        shown = printable_text(piece.text).replace("\n", "\\n")
        if len(shown) > _PIECE:
            shown = f"{shown[: _PIECE // 2]} ... {shown[-_PIECE // 2 :]}"
        mark = "*" if counted[position : position + piece.n].any() else " "
        lines.append(f" {mark} {piece.who:9} | {shown}")
        position += piece.n
    return lines
