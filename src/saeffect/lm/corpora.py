"""Text from files of many formats, folders, saved datasets or the hub: as documents, and as rows of tokens."""

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
    "is_saved_dataset",
    "read_corpus",
    "read_rows",
    "source_files",
    "source_identity",
]

T = TypeVar("T")

_READ = f"what is read: {FORMATS}."
_SUFFIXES = (".gz", ".zst", *SUFFIXES)  # tell files from dataset ids, which may contain dots too
_HUB = "hf:"
_SPLIT = "train"  # of datasets
_SAVED_DATASET = ("dataset_dict.json", "dataset_info.json", "state.json")
_PATTERN = re.compile(r"[*?\[]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Duplicates: words of a run (13-grams, as in decontamination of test sets); share of a document's runs that occur
# elsewhere too; most characters compared.
_RUN_WORDS, _REPEATED_SHARE, _MAX_CHARACTERS = 13, 0.5, 40_000_000
_MIX = np.uint64(0x9E3779B97F4A7C15)


def read_corpus(source: TextSource | str, *, field: str = "text", chat: bool = False) -> Iterator[str]:
    """Documents, one string each, in the order of the files, without empty ones; lone surrogates become U+FFFD.

    `source` is as in a study's `text.sources`, or its path alone: a file of `FORMATS`; a folder or pattern of such
    files, read in the order of their names; a folder from `save_to_disk` of datasets; or a dataset on the hub
    (streamed), `org/name` or `hf:name`. `field` (or a template) holds the text where `source` is a path. With `chat` a
    document is a list of messages, or its JSON as a string, and is yielded as JSON: see `messages_of`.

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
    """The documents of all sources, one source after the other; errors as `read_corpus`."""
    for source in sources:
        yield from read_corpus(source, chat=how.format == "chat")


def read_rows(source: TextSource) -> Iterator[Record]:
    """The rows of a source, each with its position in it; tables give at least the columns of `source.field`. Errors
    as `read_corpus`.
    """
    field = TextField.parse(source.field)
    path = user_path(source.path)
    names_dataset = source.path.startswith(_HUB) or source.path.count("/") == 1
    refuse_special(path, "text")
    if is_saved_dataset(source):
        yield from _saved_dataset(path, source.split)
    elif is_local(source):
        for file in source_files(source):
            refuse_special(file, "text")
            yield from file_rows(file, field, source.encoding)
    elif path.suffix in _SUFFIXES or path.is_absolute() or not names_dataset:
        raise NotFound(
            f"there is no text file {source.path!r}.",
            at=source.path,
            fix="check the path, or give a dataset id (org/name, or hf:name).",
        )
    else:
        yield from _hub_rows(source)


def is_local(source: TextSource) -> bool:
    """Whether a source is an existing path or a pattern of files, not a dataset on the hub."""
    return not source.path.startswith(_HUB) and (
        user_path(source.path).exists() or _PATTERN.search(source.path) is not None
    )


def is_saved_dataset(source: TextSource) -> bool:
    """Whether a source is a folder that `save_to_disk` of datasets wrote."""
    return any((user_path(source.path) / name).is_file() for name in _SAVED_DATASET)


def source_files(source: TextSource) -> list[Path]:
    """The files of a local source, sorted by name; NotFound if a pattern or a folder has none.

    Of a folder, those with a known suffix; if names give a split (`train-00000.parquet`), those of `source.split`.
    """
    path = user_path(source.path)
    if path.is_file() or (path.exists() and not path.is_dir()):
        return [path]
    if not path.is_dir():
        matching = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - a pattern may be absolute
        files = [Path(name) for name in matching if Path(name).is_file()]
        if not files:
            raise NotFound("no file matches this pattern.", at=source.path, fix="check it; ** stands for any folders.")
        return files
    everything = sorted(p for p in path.rglob("*") if p.is_file())
    visible = [p for p in everything if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    text_files = [p for p in visible if format_of(p) in SUFFIXES]
    if not text_files:
        names = ", ".join(p.name for p in visible[:3]) or "nothing"
        raise NotFound(f"this folder has no file of text; it has: {names}.", at=source.path, fix=_READ)
    if any(_is_of_split(p.relative_to(path), _SPLIT) for p in text_files):
        text_files = [p for p in text_files if _is_of_split(p.relative_to(path), source.split)]
        if not text_files:
            raise NotFound(f"no file of this folder is of the split {source.split!r}.", at=source.path)
    return text_files


def _is_of_split(path: Path, split: str) -> bool:
    return re.search(rf"(?:^|[/_.-]){re.escape(split)}(?:[/_.-]|$)", path.as_posix()) is not None


def source_identity(source: TextSource) -> Any:
    """What decides the rows of a source, except its field: hashes of its files; for a hub dataset, its name."""
    path = user_path(source.path)
    if not is_local(source):
        content: Any = source.path
    elif path.exists():
        content = hash_folder(path)
    else:
        content = [(file.name, hash_file(file)) for file in source_files(source)]
    fields = TextSource.model_fields
    changed = {key: getattr(source, key) for key in ("subset", "split", "encoding")}
    changed = {key: value for key, value in changed.items() if value != fields[key].default}
    return [content, changed] if changed else content


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is held out, decided by a hash of its content, so that duplicates stay together.

    Example:
        >>> sum(is_held_out(str(i), 0.1) for i in range(1000))
        106
    """
    head = hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:4]
    return int.from_bytes(head, "big") < share * 2**32


def _saved_dataset(path: Path, split: str) -> Iterator[Record]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset: Any = load_from_disk(str(path))
    except Exception as error:  # of many kinds
        raise BadFile(f"this saved dataset cannot be read: {first_line(error).rstrip('.')}.", at=str(path)) from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise BadFile(
                f"this saved dataset has no split {split!r}; it has: {', '.join(sorted(dataset))}.",
                at=str(path),
                fix="say which: split: " + sorted(dataset)[0] + "." if dataset else None,
            )
        dataset = dataset[split]
    for number, row in enumerate(dataset, start=1):
        yield Record(row, f"{path}, row {number}")


def _hub_rows(source: TextSource) -> Iterator[Record]:
    from datasets import config, load_dataset

    name = source.path.removeprefix(_HUB)
    subset = () if source.subset is None else (source.subset,)
    streaming = not config.HF_HUB_OFFLINE  # offline, what `load_dataset` prepared is read from its cache
    try:
        for number, row in enumerate(load_dataset(name, *subset, split=source.split, streaming=streaming), start=1):
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
    """A corpus that is read and tokenised while its rows are iterated over: it may be larger than memory.

    Rows of `context_size` tokens come from each source in turn, until one ends or there are `tokens` in all, without
    the share `held_out` of documents. Documents are shuffled by `seed` in a buffer of `buffer` documents for each
    source; 1 keeps file order.
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
        packing = [self.context_size, self.n_rows, self.held_out, self.seed, self.buffer]
        bos = self.lm.bos_id
        options: list[Any] = [] if bos is None else [bos]
        if self.how.format == "chat":
            options += [self.lm.chat_format.identity(), self.how.system]
        return fingerprint([files, fields, tokenizer_identity(self.lm.tokenizer), packing, *options])

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
            shuffled = _shuffle(texts, self.buffer, np.random.default_rng([self.seed, index]))
            yield from (row.ids for row in cut_rows(self.lm, shuffled, self.context_size, self.how))
        except SaeffectError as error:
            raise error.placed(f"text.{index}") from None


def _shuffle(texts: Iterable[str], size: int, generator: np.random.Generator) -> Iterator[str]:
    """The texts in a random order, from a buffer of `size` documents."""
    buffer: list[str] = []
    for text in texts:
        if len(buffer) < size:
            buffer.append(text)
            continue
        slot = int(generator.integers(size))
        yield buffer[slot]
        buffer[slot] = text
    yield from (buffer[i] for i in generator.permutation(len(buffer)))


def find_duplicates(texts: Iterable[str], share: float) -> str:
    """A warning if held-out documents, those of `is_held_out(text, share)`, repeat training documents; "" if none does.

    A document is repeated if half of its runs of 13 words (all words, if there are fewer) are in a training document,
    ignoring case and spaces; identical documents are on one side of the split anyway. Only the first 40 million
    characters of the text are compared.
    """
    training: list[NDArray[np.uint64]] = []
    held_out: list[tuple[str, NDArray[np.uint64]]] = []
    n_characters = 0
    with contextlib.suppress(SaeffectError):  # a text that cannot be read: reported where it is used
        for text in texts:
            runs = _run_hashes(text)
            if is_held_out(text, share):
                held_out.append((" ".join(text[:200].split())[:60], runs))
            else:
                training.append(runs)
            n_characters += len(text)
            if n_characters > _MAX_CHARACTERS:
                break
    training_runs = np.unique(np.concatenate(training)) if training else np.zeros(0, dtype=np.uint64)
    repeated = [head for head, runs in held_out if len(runs) and np.isin(runs, training_runs).mean() >= _REPEATED_SHARE]
    if not repeated:
        return ""
    return (
        f"{len(repeated):,} of {len(held_out):,} held-out documents are in the training text too, with small changes"
        f" (such as {repeated[0]!r}): what is measured on them is too good"
    )


def _run_hashes(text: str) -> NDArray[np.uint64]:
    """A hash of each run of words, uint64; a text shorter than a run is one run."""
    words = re.findall(r"\w+", text.casefold())
    codes = np.fromiter((hash(word) & (2**64 - 1) for word in words), dtype=np.uint64, count=len(words))
    length = min(_RUN_WORDS, len(codes))
    runs = np.zeros(max(0, len(codes) - length + 1) if length else 0, dtype=np.uint64)
    for offset in range(length):
        runs = runs * _MIX + codes[offset : offset + len(runs)]
    return runs
