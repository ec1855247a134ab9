from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saeffect.lm.corpora as streamed_text
from saeffect.config import TextSource
from saeffect.errors import EmptySelection, NotFound
from saeffect.lm.activations import StreamedActivations
from saeffect.lm.corpora import StreamedText, is_held_out
from saeffect.lm.language_model import LanguageModel, pack

WORDS = "the patient had a fever and some pain in old town river".split()


def _write(path: Path, seed: int, n: int = 60) -> TextSource:
    generator = np.random.default_rng(seed)
    texts = [f"{seed} {i} " + " ".join(generator.choice(WORDS, 12)) for i in range(n)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return TextSource(name=path.stem, path=str(path))


@pytest.fixture
def text(tiny_llama: LanguageModel, tmp_path: Path) -> StreamedText:
    sources = (_write(tmp_path / "a.jsonl", 0), _write(tmp_path / "b.jsonl", 1))
    return StreamedText(tiny_llama, sources, 16, buffer=5)


def _documents(text: StreamedText, row_ids: list[Any], start: int) -> list[str]:
    return text.lm.decode([int(i) for row in row_ids[start :: len(text.sources)] for i in row]).split("<|endoftext|>")


def test_rows_alternate_and_hold_the_text(text: StreamedText) -> None:
    rows = list(text.rows())
    assert {row.shape for row in rows} == {(16,)}
    assert {row.dtype for row in rows} == {np.dtype(np.int32)}
    ids = [int(i) for row in rows[::2] for i in row]
    assert text.lm.decode(ids[:3]).startswith("0 ")
    assert text.lm.decode([int(i) for i in rows[1]][:3]).startswith("1 ")
    separator = text.lm.tokenizer.eos_token_id
    assert ids.count(separator) > 40


def test_the_same_rows_each_time_and_another_order_for_another_seed(text: StreamedText) -> None:
    first, again = np.stack(list(text.rows())), np.stack(list(text.rows()))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.stack(list(replace(text, seed=1).rows()))[: len(first)])


def test_a_buffer_of_one_keeps_the_order_of_the_file(text: StreamedText) -> None:
    plain = replace(text, sources=text.sources[:1], buffer=1)
    lines = Path(text.sources[0].path).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    expected = list(pack(texts, text.lm.encode, context_size=16, separator=0))
    assert np.array_equal(np.stack(list(plain.rows())), np.stack(expected))


def test_documents_are_mixed_within_the_buffer() -> None:
    mixed = list(streamed_text._mixed([str(i) for i in range(50)], 5, np.random.default_rng(0)))
    assert sorted(map(int, mixed)) == list(range(50))
    assert mixed != sorted(mixed, key=int)
    assert all(int(t) <= place + 5 for place, t in enumerate(mixed)), "nothing comes before it was read"


def test_held_out_documents_are_left_out(text: StreamedText) -> None:
    kept: list[str] = []

    def encode(document: str) -> list[int]:
        kept.append(document)
        return [1] * 8

    lm = LanguageModel(text.lm.model, text.lm.tokenizer, "x")
    object.__setattr__(lm, "encode", encode)
    list(replace(text, lm=lm, held_out=0.4).rows())
    assert 20 < len(kept) < 100
    assert not [t for t in kept if is_held_out(t, 0.4)]


def test_so_many_tokens(text: StreamedText, complains: Callable[..., Any]) -> None:
    assert text.n_rows is None
    some = replace(text, tokens=100)
    assert some.n_rows == len(list(some.rows())) == 6
    with complains(EmptySelection, "are wanted", at="tokens"):
        list(replace(text, tokens=10**6).rows())


def test_only_what_is_needed_is_read(text: StreamedText, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = streamed_text.read_corpus

    def reading(*args: Any, **options: Any) -> Any:
        for document in real(*args, **options):
            read.append(document)
            yield document

    monkeypatch.setattr(streamed_text, "read_corpus", reading)
    next(text.rows())
    assert len(read) < 10


def test_text_shorter_than_a_row(text: StreamedText, complains: Callable[..., Any]) -> None:
    with complains(EmptySelection, "fewer than one context of 99999", at="text.0"):
        list(replace(text, context_size=99_999).rows())
    with complains(EmptySelection, "fewer than one context"):
        StreamedActivations.open(text.lm, "blocks.1.hook_resid_pre", replace(text, context_size=99_999))
    missing = (text.sources[0], TextSource(name="c", path="/nowhere/c.jsonl"))
    with complains(NotFound, at="text.1"):
        list(replace(text, sources=missing).rows())


def test_identity_is_what_decides_the_rows(text: StreamedText, tmp_path: Path) -> None:
    same = replace(text, lm=replace(text.lm, name="other"))
    assert same.identity() == text.identity()
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(text.sources[0].path).read_bytes())
    assert replace(text, sources=(TextSource(name="a", path=str(moved)), text.sources[1])).identity() == text.identity()
    changes: list[dict[str, Any]] = [
        {"context_size": 8},
        {"tokens": 64},
        {"held_out": 0.1},
        {"seed": 1},
        {"buffer": 6},
        {"sources": text.sources[::-1]},
    ]
    assert len({replace(text, **change).identity() for change in changes} | {text.identity()}) == 7
