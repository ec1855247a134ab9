"""Text from wherever people have it (files of many formats, folders of them, saved datasets, the hub), also as rows."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from saeffect.config import TextSource
from saeffect.config_chat import ChatKeys
from saeffect.errors import BadFile, EmptySelection, NotFound, SaeffectError, first_line
from saeffect.io import fingerprint, hash_file, hash_folder
from saeffect.lm.chat_rows import cut_rows
from saeffect.lm.fields import TextField
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.text_files import FORMATS, SUFFIXES, Record, file_rows, format_of
from saeffect.lm.tokens import tokenizer_identity
from saeffect.paths import refuse_special, user_path

__all__ = [
    "StreamedText",
    "documents_of",
    "find_duplicates",
    "interleave",
    "is_held_out",
    "is_local",
    "read_corpus",
    "read_rows",
    "source_files",
    "source_identity",
]

T = TypeVar("T")

_READ = f"what is read: {FORMATS}."
_SUFFIXES = (".gz", ".zst", *SUFFIXES)  # of files; ids of datasets may contain dots too
_HUB = "hf:"
_SPLIT = "train"  # of datasets
_PATTERN = re.compile(r"[*?\[]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Of duplicates: words of a run, as those who clean test sets of language models count; share of a document's runs that
# stand elsewhere too; characters that are looked at.
_RUN, _REPEATED, _LOOKED_AT = 13, 0.5, 40_000_000
_MIX = np.uint64(0x9E3779B97F4A7C15)


def read_corpus(source: TextSource | str, *, field: str = "text", chat: bool = False) -> Iterator[str]:
    """Documents, one string each, in the order of the files; half a character becomes U+FFFD, empty ones are left
    out.

    `source` is as in a study's `text.sources`, or its path alone: a file of `FORMATS`; a folder or pattern of such
    files, read by name; a folder from `save_to_disk` of datasets; or a dataset on the hub (streamed), `org/name` or
    `hf:name`. `field` (or a template) holds the text where `source` is a path. With `chat` a document is a list of
    messages, or its JSON in a text, and comes as JSON: see `messages_of`.

    NotFound: no such file or dataset. BadFile: another encoding or format, damaged, too long a line, or a row without
    text (with its line). ConfigError: an impossible path or template. EmptySelection: no document.
    """
    source = TextSource.model_construct(path=source, field=field) if isinstance(source, str) else source
    how, count = TextField.parse(source.field), 0
    for row in read_rows(source):
        if chat:
            text = how.messages(row.values, row.at)
        else:
            text = row.values if isinstance(row.values, str) else how.text(row.values, row.at)
        if text.strip():
            count += 1
            yield _LONE_SURROGATE.sub("\ufffd", text)
    if not count:
        raise EmptySelection("the corpus holds not one document with text in it.", at=source.path)


def documents_of(sources: Iterable[TextSource], how: ChatKeys) -> Iterator[str]:
    """The documents of sources, one source after the other; errors as `read_corpus`."""
    for source in sources:
        yield from read_corpus(source, chat=how.format == "chat")


def read_rows(source: TextSource) -> Iterator[Record]:
    """The rows of a source, each with its place; of tables at least the columns of its field. Errors as
    `read_corpus`.
    """
    field = TextField.parse(source.field)
    path = user_path(source.path)
    refuse_special(path, "text")
    if path.is_dir() and _is_saved(path):
        yield from _saved_dataset(path, source.split)
    elif is_local(source):
        for file in source_files(source):
            refuse_special(file, "text")
            yield from file_rows(file, field, source.encoding)
    elif path.suffix in _SUFFIXES or path.is_absolute() or not _is_id(source.path):
        raise NotFound(
            f"there is no text file {source.path!r}.",
            at=source.path,
            fix="check the path, or give a dataset id (org/name, or hf:name).",
        )
    else:
        yield from _hub_rows(source)


def is_local(source: TextSource) -> bool:
    """Whether a source lies on this machine, or is a pattern of files, and not a dataset on the hub."""
    return not source.path.startswith(_HUB) and (
        user_path(source.path).exists() or _PATTERN.search(source.path) is not None
    )


def source_files(source: TextSource) -> list[Path]:
    """The files that a local source stands for, by name; NotFound if a pattern or a folder has none.

    Of a folder those with a known ending; if names say of which split (`train-00000.parquet`), those of the source's.
    """
    path = user_path(source.path)
    if path.is_file() or (path.exists() and not path.is_dir()):
        return [path]
    if not path.is_dir():
        matching = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - a pattern may be absolute
        found = [Path(name) for name in matching if Path(name).is_file()]
        if not found:
            raise NotFound("no file matches this pattern.", at=source.path, fix="check it; ** stands for any folders.")
        return found
    everything = sorted(p for p in path.rglob("*") if p.is_file())
    visible = [p for p in everything if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    known = [p for p in visible if format_of(p) in SUFFIXES]
    if not known:
        names = ", ".join(p.name for p in visible[:3]) or "nothing"
        raise NotFound(f"this folder has no file of text; it has: {names}.", at=source.path, fix=_READ)
    if any(_of_split(p.relative_to(path), _SPLIT) for p in known):
        known = [p for p in known if _of_split(p.relative_to(path), source.split)]
        if not known:
            raise NotFound(f"no file of this folder is of the split {source.split!r}.", at=source.path)
    return known


def _of_split(path: Path, split: str) -> bool:
    return re.search(rf"(?:^|[/_.-]){re.escape(split)}(?:[/_.-]|$)", path.as_posix()) is not None


def source_identity(source: TextSource) -> Any:
    """What decides the rows of a source beside its field: hashes of its files; of a dataset on the hub, its name."""
    path = user_path(source.path)
    if not is_local(source):
        found: Any = source.path
    elif path.exists():
        found = hash_folder(path)
    else:
        found = [(file.name, hash_file(file)) for file in source_files(source)]
    usual = TextSource.model_fields
    changed = {key: getattr(source, key) for key in ("subset", "split", "encoding")}
    changed = {key: value for key, value in changed.items() if value != usual[key].default}
    return [found, changed] if changed else found


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is held out: decided by its content, so that duplicates stay together.

    Example:
        >>> sum(is_held_out(str(i), 0.1) for i in range(1000))
        106
    """
    head = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:4]
    return int.from_bytes(head, "big") < share * 2**32


def _is_id(text: str) -> bool:
    return text.startswith(_HUB) or text.count("/") == 1


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))


def _saved_dataset(path: Path, split: str) -> Iterator[Record]:
    from datasets import DatasetDict, load_from_disk

    try:
        found: Any = load_from_disk(str(path))
    except Exception as error:  # of many kinds
        raise BadFile(f"this saved dataset cannot be read: {first_line(error).rstrip('.')}.", at=str(path)) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise BadFile(
                f"this saved dataset has no split {split!r}; it has: {', '.join(sorted(found))}.",
                at=str(path),
                fix="say which: split: " + sorted(found)[0] + "." if found else None,
            )
        found = found[split]
    for number, row in enumerate(found, start=1):
        yield Record(row, f"{path}, row {number}")


def _hub_rows(source: TextSource) -> Iterator[Record]:
    from datasets import load_dataset

    name = source.path.removeprefix(_HUB)
    subset = () if source.subset is None else (source.subset,)
    try:
        for number, row in enumerate(load_dataset(name, *subset, split=source.split, streaming=True), start=1):
            yield Record(row, f"{name}, row {number}")
    except Exception as error:
        raise NotFound(
            f"cannot read the dataset {name!r}: {first_line(error).rstrip('.')}",
            at=source.path,
            fix=f"check the name, subset and split, and your connection; {_READ}",
        ) from error


def interleave(*streams: Iterator[T]) -> Iterator[tuple[int, T]]:
    """Take one row from each stream in turn, until the first of them ends; yields (stream index, row)."""
    while True:
        for index, stream in enumerate(streams):
            row = next(stream, None)
            if row is None:
                return
            yield index, row


@dataclass(frozen=True, eq=False)
class StreamedText:
    """A corpus that is read and tokenised as its rows are asked for: it may be larger than memory.

    Rows of `context_size` tokens come from each source in turn, until one ends or there are `tokens` in all, without
    the share `held_out` of documents. The seed mixes `buffer` documents of each source; 1 keeps file order.
    """

    lm: LanguageModel
    sources: tuple[TextSource, ...]
    context_size: int
    tokens: int | None = None
    held_out: float = 0.0
    seed: int = 0
    buffer: int = 1000
    how: ChatKeys = field(default_factory=ChatKeys)

    @property
    def n_rows(self) -> int | None:
        return None if self.tokens is None else max(1, self.tokens // self.context_size)

    def identity(self) -> str:
        """SHA-256 of the files (of a dataset on the hub: its name), the tokenizer, and how they are packed."""
        files = [source_identity(source) for source in self.sources]
        fields = [source.field for source in self.sources]
        how = [self.context_size, self.n_rows, self.held_out, self.seed, self.buffer]
        bos = self.lm.bos_id
        more: list[Any] = [] if bos is None else [bos]
        if self.how.format == "chat":
            more += [self.lm.chat_format.identity(), self.how.system]
        return fingerprint([files, fields, tokenizer_identity(self.lm.tokenizer), how, *more])

    def rows(self) -> Iterator[NDArray[np.int32]]:
        """Token ids, int32 `[context_size]`, row by row. EmptySelection if the text ends before `tokens` tokens;
        SaeffectError, naming the source, if one cannot be read or is shorter than a row.
        """
        streams = [self._stream(index) for index in range(len(self.sources))]
        count = 0
        for _, row in islice(interleave(*streams), self.n_rows):
            count += 1
            yield row
        if self.n_rows is not None and count < self.n_rows:
            raise EmptySelection(
                f"the text gives {count * self.context_size:,} tokens in equal parts from each source;"
                f" {self.tokens:,} are wanted.",
                at="tokens",
                fix="give more text, or ask for fewer tokens.",
            )

    def _stream(self, index: int) -> Iterator[NDArray[np.int32]]:
        source = self.sources[index]
        try:
            documents = read_corpus(source, chat=self.how.format == "chat")
            texts = (t for t in documents if not is_held_out(t, self.held_out))
            mixed = _mixed(texts, self.buffer, np.random.default_rng([self.seed, index]))
            yield from (row.ids for row in cut_rows(self.lm, mixed, self.context_size, self.how))
        except SaeffectError as error:
            raise error.placed(f"text.{index}") from None


def _mixed(texts: Iterable[str], size: int, generator: np.random.Generator) -> Iterator[str]:
    """The texts in a random order, from a buffer of `size` documents."""
    held: list[str] = []
    for text in texts:
        if len(held) < size:
            held.append(text)
            continue
        at = int(generator.integers(size))
        yield held[at]
        held[at] = text
    yield from (held[i] for i in generator.permutation(len(held)))


def find_duplicates(texts: Iterable[str], share: float) -> str:
    """A warning if held-out documents, those of `is_held_out(text, share)`, stand in the others too; "" if none does.

    Those count of which half the runs of 13 words (of shorter ones: all words in their order) are in a training
    document, in whatever case and with whatever spaces; equal ones are on one side anyway. Of a long text the first 40
    million characters are compared.
    """
    training: list[NDArray[np.uint64]] = []
    held_out: list[tuple[str, NDArray[np.uint64]]] = []
    seen = 0
    with contextlib.suppress(SaeffectError):  # a text that cannot be read: whoever uses it says so
        for text in texts:
            runs = _runs(text)
            if is_held_out(text, share):
                held_out.append((" ".join(text[:200].split())[:60], runs))
            else:
                training.append(runs)
            seen += len(text)
            if seen > _LOOKED_AT:
                break
    known = np.unique(np.concatenate(training)) if training else np.zeros(0, dtype=np.uint64)
    found = [head for head, runs in held_out if len(runs) and np.isin(runs, known).mean() >= _REPEATED]
    if not found:
        return ""
    return (
        f"{len(found):,} of {len(held_out):,} held-out documents stand in the training text too, but for small changes"
        f" (such as {found[0]!r}): what is measured on them is too good"
    )


def _runs(text: str) -> NDArray[np.uint64]:
    """A number for each run of words (of a shorter text, for all of it)."""
    words = re.findall(r"\w+", text.casefold())
    codes = np.fromiter((hash(word) & (2**64 - 1) for word in words), dtype=np.uint64, count=len(words))
    length = min(_RUN, len(codes))
    mixed = np.zeros(max(0, len(codes) - length + 1) if length else 0, dtype=np.uint64)
    for at in range(length):
        mixed = mixed * _MIX + codes[at : at + len(mixed)]
    return mixed
