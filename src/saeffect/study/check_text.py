"""The text of a study, looked at: every source is opened, its first rows are shown, and what repeats is found."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from saeffect.config import TextSource
from saeffect.errors import SaeffectError, placed
from saeffect.lm.chat import messages_of
from saeffect.lm.corpora import documents_of, find_duplicates, is_local, read_corpus, source_files
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.text_files import format_of
from saeffect.lm.tokens import printable_text
from saeffect.paths import user_path
from saeffect.study.study import Study
from saeffect.study.texts import shortage, study_rows
from saeffect.study.training import arm_recipe

__all__ = ["check_text", "duplicates_in_training", "first_rows"]

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
    called = f"bundled {text.bundled}" if text.bundled else ", ".join(source.name for source in text.sources)
    if not all(map(is_local, text.sources)):
        return f"{called}; not counted, since it is on the hub"
    some = text.model_copy(update={"tokens": min(text.tokens, _COUNTED)})
    lm = study.reader
    with placed(study.at("text")):
        rows = study_rows(some, lambda: lm, prepend_bos=lm.prepend_bos)
    short = shortage(text, rows) if len(rows) * rows.ids.shape[1] < some.tokens else ""
    return f"{called}; only {short}" if short else called


def first_rows(study: Study) -> list[str]:
    """Lines: for each source of text what it consists of, and its first three documents, one a line."""
    text = study.config.text
    if text.bundled is not None:
        lm = LanguageModel(None, study.tokens.tokenizer, "control", prepend_bos=False)
        some = text.model_copy(update={"tokens": max(256, 16 * text.context_size)})
        rows = study_rows(some, lambda: lm, prepend_bos=False)
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
    recipe = arm_recipe(study, study.by_role("control")[0])
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
