"""Word vectors: every format that loads, and every file that must not."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from saeffect import checksums
from saeffect.errors import BadFile, NotFound, ShapeMismatch, UnknownName
from saeffect.features import vector_files
from saeffect.features.embeddings import (
    BUNDLED_EMBEDDINGS,
    DEFAULT_EMBEDDINGS,
    WordVectors,
    load_embeddings,
)
from saeffect.lm.tokens import normalise_token
from saeffect.steering.outcomes import similarity

WORDS = ["cat", "dog", "café"]
ROWS = np.array([[1.0, -2.5], [0.25, 3.0], [0.0, 4.0]], dtype=np.float32)
GLOVE = "cat 1 -2.5\ndog 0.25 3\ncafé 0 4\n"
WORD2VEC = "3 2\n" + GLOVE


def binary(words: list[str] = WORDS, rows: np.ndarray = ROWS, header: str = "3 2\n", end: bytes = b"\n") -> bytes:
    records = (word.encode() + b" " + row.astype("<f4").tobytes() + end for word, row in zip(words, rows, strict=True))
    return header.encode() + b"".join(records)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("v.txt", GLOVE),
            ("v.vec", WORD2VEC),
            ("no-suffix", WORD2VEC),
            ("v.txt", GLOVE.removesuffix("\n")),
            ("v.txt", GLOVE.replace("\n", "\r\n")),
            ("v.txt", WORD2VEC.replace("\n", " \n")),
            ("v.tsv.txt", GLOVE.replace(" ", "\t")),
            ("v.txt.gz", gzip.compress(GLOVE.encode(), mtime=0)),
            ("v.gz", gzip.compress(WORD2VEC.encode(), mtime=0)),
            ("exported.kv", WORD2VEC),
            ("v.txt", "\ufeff" + GLOVE),
            ("v.vec", "\ufeff" + WORD2VEC),
            ("v.txt.gz", gzip.compress(("\ufeff" + WORD2VEC).encode(), mtime=0)),
            ("v.txt", GLOVE + "\n \n"),
            ("v.bin", GLOVE),
            ("v.w2v", binary()),
            ("v.model", binary()),
            ("vectors", gzip.compress(binary(), mtime=0)),
            ("v.bin", binary()),
            ("v.bin", binary(end=b"")),
            ("v.bin.gz", gzip.compress(binary(), mtime=0)),
            ("v.npz", npz(words=np.array(WORDS), vectors=ROWS)),
            ("v.npz", npz(words=np.char.encode(np.array(WORDS), "utf-8"), vectors=ROWS.astype(np.float64))),
        ],
    )
    def test_each_gives_the_same_vectors(self, tmp_path: Path, name: str, data: bytes | str) -> None:
        vectors = load_embeddings(write(tmp_path, name, data))
        assert list(vectors.words) == WORDS
        assert vectors.vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors.vectors, ROWS)

    def test_words_with_spaces_and_odd_characters(self, tmp_path: Path) -> None:
        text = "the 1 2\n. . . 3 4\n\u00a0x 5 6\n<script> 7 8\n\u202eabc 9 10\n"
        vectors = load_embeddings(write(tmp_path, "v.txt", text))
        assert list(vectors.words) == ["the", ". . .", "\u00a0x", "<script>", "\u202eabc"]

    def test_first_of_a_repeated_word_counts(self, tmp_path: Path) -> None:
        vectors = load_embeddings(write(tmp_path, "v.txt", "a 1 1\na 2 2\nb 3 3\n"))
        assert len(vectors) == 2
        np.testing.assert_array_equal(vectors.get("a"), [1, 1])
        np.testing.assert_array_equal(vectors.get("b"), [3, 3])

    def test_binary_that_is_longer_than_one_block(self, tmp_path: Path) -> None:
        words = [f"w{i}" for i in range(3000)]
        rows = np.random.default_rng(0).normal(size=(3000, 120)).astype(np.float32)
        vectors = load_embeddings(write(tmp_path, "v.bin", binary(words, rows, "3000 120\n")))
        assert list(vectors.words) == words
        np.testing.assert_array_equal(vectors.vectors, rows)

    def test_a_file_that_changed_is_read_anew(self, tmp_path: Path) -> None:
        path = write(tmp_path, "v.txt", "a 1 2\n")
        first = load_embeddings(path)
        assert load_embeddings(path) is first
        write(tmp_path, "v.txt", "a 1 2\nb 3 4\n")
        assert len(load_embeddings(path)) == 2


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "data", "place", "message"),
        [
            ("v.txt", "", "v.txt", "empty"),
            ("v.txt", "\n\n", "line 1", "empty line"),
            ("v.txt", "cat\n", "line 1", "0 numbers"),
            ("v.txt", "cat 1 2\ndog 3\n", "line 2", "2 numbers were expected. Got 1"),
            ("v.txt", "cat 1 2\ndog 3 4 5\n", "line 2", "2 numbers were expected. Got 3"),
            ("v.txt", "cat 1 2\n\ndog 3 4\n", "line 2", "blank"),
            ("v.txt", "cat 1 2\ndog 3 nan\n", "line 2", "NaN"),
            ("v.txt", "3 2\ncat 1 2\ndog 3 4\nx inf 4\n", "line 4", "infinity"),
            ("v.txt", "cat 1 2\ndog x 4\n", "line 2", "not all of the 2"),
            ("v.txt", b"cat 1 2\n" + b"caf\xe9 3 4\n", "line 2", "UTF-8"),
            ("v.txt", "3 2\ncat 1 2\ndog 3 4\n", "line 3", "holds 2 words; 3"),
            ("v.txt", "1 2\ncat 1 2\ndog 3 4\n", "line 3", "holds 2 words; 1"),
            ("v.txt", "5 2\n", "line 1", "holds 0 words"),
            ("v.txt", "5 0\n", "line 1", "0 numbers a word"),
            ("v.txt", "2 99999999999\ncat 1\n", "line 1", "not word vectors"),
            ("v.txt.gz", gzip.compress(GLOVE.encode() * 50, mtime=0)[:-12], "v.txt.gz", "truncated"),
            ("v.gz", gzip.compress(b"", mtime=0), "line 1", "empty line"),
            ("v.bin", binary()[:-3], "word 3", "ends"),
            ("v.bin", binary(header="4 2\n"), "word 3", "holds 3 words; 4"),
            ("v.bin", b"\xba\x16\x4f\x2f\x0c\x00", "line 1", "count dim"),
            ("v.bin", b"9 2\n" + b"\x01" * 10_000, "word 1", "damaged"),
            ("v.bin", b"1 2\n\xff\xfe " + struct.pack("<2f", 1, 2), "word 1", "UTF-8"),
            ("v.bin", b"1 2\ncat " + struct.pack("<2f", 1, float("nan")), "word 1", "NaN"),
            ("v.npz", npz(words=np.array(WORDS, dtype=object), vectors=ROWS), "v.npz", "pickle"),
            ("v.npz", npz(words=np.array(WORDS)), "v.npz", "vectors"),
            ("v.npz", npz(words=np.array(WORDS[:2]), vectors=ROWS), "v.npz", "2 words do not fit"),
            ("v.npz", npz(words=np.array([], dtype=str), vectors=ROWS[:0]), "v.npz", "0 words"),
            ("v.npz", npz(words=np.array(WORDS), vectors=ROWS[:, 0]), "v.npz", "must hold"),
            ("v.npz", npz(words=np.array(WORDS), vectors=ROWS + 1j), "v.npz", "must hold"),
            ("v.npz", npz(words=np.arange(3), vectors=ROWS), "v.npz", "must hold"),
            ("v.npz", npz(words=np.array([b"\xff", b"a", b"b"]), vectors=ROWS), "v.npz", "UTF-8"),
            ("v.npz", npz(words=np.array(WORDS), vectors=ROWS * np.nan), "line 1", "NaN"),
            (
                "v.npz",
                npz(words=np.array(WORDS), vectors=ROWS.astype(np.float64) * 1e300),
                "line 1",
                "infinity",
            ),
            ("v.npz", npz(words=np.array(WORDS), vectors=ROWS)[:-30], "v.npz", "npz"),
            ("v.npy", b"\x93NUMPY\x01\x00", "v.npy", "npz"),
            ("v.safetensors", b"\x00" * 20, "v.safetensors", "cannot be read"),
        ],
    )
    def test_says_what_and_where(self, tmp_path: Path, name: str, data: bytes | str, place: str, message: str) -> None:
        path = write(tmp_path, name, data)
        (tmp_path / "v.words.txt").write_text("cat\n")
        with pytest.raises(BadFile, match=r"^BadFile: ") as caught:
            load_embeddings(path)
        assert caught.value.at is not None and caught.value.at.endswith(place)
        assert message in caught.value.message

    def test_a_zip_of_vectors_is_told_to_be_unzipped(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "glove.zip", "w") as archive:
            archive.writestr("glove.50d.txt", GLOVE)
        with pytest.raises(BadFile, match=r"a zip with glove\.50d\.txt") as caught:
            load_embeddings(tmp_path / "glove.zip")
        assert "unzip" in (caught.value.fix or "")

    def test_an_npz_is_measured_before_it_is_read(self, tmp_path: Path) -> None:
        words, vectors = np.array(WORDS), np.zeros((3, 1_000_000), np.float32)
        path = write(tmp_path, "v.npz", npz(words=words, vectors=vectors))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(checksums, "_ALWAYS_ALLOWED", 1 << 20)
            patched.setattr(np, "load", None)  # nothing is read
            with pytest.raises(BadFile, match="would take 12,000,000 bytes"):
                load_embeddings(path)
        lying = io.BytesIO()
        np.lib.format.write_array_header_1_0(lying, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**6)})
        with zipfile.ZipFile(tmp_path / "lying.npz", "w") as archive:
            archive.writestr("words.npy", lying.getvalue())
            archive.writestr("vectors.npy", lying.getvalue())
        with pytest.raises(BadFile, match="which the file does not hold"):
            load_embeddings(tmp_path / "lying.npz")

    def test_an_encrypted_npz_and_one_without_arrays(self, tmp_path: Path) -> None:
        data = bytearray(npz(words=np.array(WORDS), vectors=ROWS))
        for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = data.find(mark)
            while place >= 0:
                data[place + flags] |= 1
                place = data.find(mark, place + 4)
        with pytest.raises(BadFile, match="encrypted"):
            load_embeddings(write(tmp_path, "v.npz", bytes(data)))
        with zipfile.ZipFile(tmp_path / "none.npz", "w") as archive:
            archive.writestr("words", "x")
        with pytest.raises(BadFile, match=r"an \.npz with two arrays"):
            load_embeddings(tmp_path / "none.npz")

    def test_a_packed_file_is_not_unpacked_without_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checksums, "_ALWAYS_ALLOWED", 1000)
        monkeypatch.setattr(vector_files, "_LONGEST_LINE", 1000)
        for data, part in ((b"cat 0\n" * 10_000, "far more than"), (b"c" * 100_000, "numbers a word")):
            with pytest.raises(BadFile, match=part):
                load_embeddings(write(tmp_path, "v.gz", gzip.compress(data, mtime=0)))

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "v.txt")
        with pytest.raises(BadFile, match="pipe"):
            load_embeddings(tmp_path / "v.txt")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(BadFile, match="folder"):
            load_embeddings(tmp_path)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("name", ["vectors.kv", "vectors.model"])
    def test_pickles_are_refused_and_never_opened(self, tmp_path: Path, name: str, protocol: int) -> None:
        trap = tmp_path / "executed"
        path = write(tmp_path, name, pickle.dumps(Trap(trap), protocol=protocol))
        with pytest.raises(BadFile, match="pickle") as caught:
            load_embeddings(path)
        assert "save_word2vec_format" in (caught.value.fix or "")
        assert not trap.exists()

    def test_a_pickle_under_another_name_is_refused_too(self, tmp_path: Path) -> None:
        trap = tmp_path / "executed"
        for name in ("v.txt", "v.bin", "v.npz", "v"):
            with pytest.raises(BadFile, match="pickle"):
                load_embeddings(write(tmp_path, name, pickle.dumps(Trap(trap))))
        with pytest.raises(BadFile, match="pickle"):
            load_embeddings(write(tmp_path, "v.gz", gzip.compress(pickle.dumps(Trap(trap)), mtime=0)))
        assert not trap.exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


class TestNames:
    def test_unknown_name_lists_the_valid_ones(self) -> None:
        with pytest.raises(UnknownName, match="did you mean 'glove-wiki-gigaword-100'"):
            load_embeddings("glove-wiki-gigaword-50")

    @pytest.mark.parametrize("path", ["nowhere.txt", "no/where", "vectors.kv"])
    def test_missing_path(self, path: str) -> None:
        with pytest.raises(NotFound, match="no file"):
            load_embeddings(path)

    def test_missing_path_object(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            load_embeddings(tmp_path / "glove")


class TestBundled:
    def test_what_it_holds(self) -> None:
        glove = load_embeddings()
        assert DEFAULT_EMBEDDINGS in BUNDLED_EMBEDDINGS
        assert load_embeddings(DEFAULT_EMBEDDINGS) is glove
        assert glove.dim == 100 and glove.name == "glove-wiki-gigaword-100"
        assert len(glove) == len(glove.vectors) > 57_000
        assert all(word and word == normalise_token(word) for word in glove.words)

    def test_first_numbers_are_those_that_stanford_published(self) -> None:
        published = [
            -0.038194,
            -0.24487,
            0.72812,
            -0.39961,
            0.083172,
            0.043953,
            -0.39141,
            0.3344,
            -0.57545,
            0.087459,
        ]
        the = load_embeddings().get("the")
        assert the is not None
        np.testing.assert_allclose(the[:10], published, rtol=2**-11)

    def test_nearest_neighbours_make_sense(self) -> None:
        glove = load_embeddings()
        assert similarity("surgery", "surgical", glove) > 0.7
        assert similarity("surgery", "guitar", glove) < 0.3

    def test_list_and_vectors_belong_together(self, tmp_path: Path) -> None:
        folder = Path(__file__).parents[2] / "src" / "saeffect" / "bundled" / "embeddings"
        stem = "glove-wiki-gigaword-100"
        (tmp_path / f"{stem}.safetensors").write_bytes((folder / f"{stem}.safetensors").read_bytes())
        with pytest.raises(NotFound, match="list of words"):
            load_embeddings(tmp_path / f"{stem}.safetensors")
        words = (folder / f"{stem}.words.txt").read_text(encoding="utf-8").split("\n")
        words[0], words[1] = words[1], words[0]
        (tmp_path / f"{stem}.words.txt").write_text("\n".join(words), encoding="utf-8")
        with pytest.raises(BadFile, match="not the list"):
            load_embeddings(tmp_path / f"{stem}.safetensors")


class TestBuild:
    """The script that made the bundled files, on a vocabulary of a few words."""

    @pytest.fixture
    def script(self) -> ModuleType:
        path = Path(__file__).parents[2] / "scripts" / "build_embeddings.py"
        spec = importlib.util.spec_from_file_location("build_embeddings", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["build_embeddings"] = module  # its dataclass looks itself up there
        spec.loader.exec_module(module)
        return module

    @pytest.fixture
    def inputs(self, tmp_path: Path) -> dict[str, Path]:
        words = ["the", "€", "cat", "gene", "mri", "unused"]
        text = "".join(f"{word} " + " ".join(["0.12345"] * 99 + [str(i)]) + "\n" for i, word in enumerate(words))
        bytewise = {"model": {"vocab": {"Ġthe": 0, "âĤ¬": 1, "ĠCat": 2, "ĠUn": 3}}}
        pieces = {"model": {"vocab": [["▁the", -1.0], ["▁Gene", -2.0], ["used", -3.0]]}}
        return {
            "vectors": write(tmp_path, "glove.txt", text),
            "gpt2": write(tmp_path, "gpt2.json", json.dumps(bytewise)),
            "gemma": write(tmp_path, "gemma.json", json.dumps(pieces)),
            "list": write(tmp_path, "list.txt", "# scans\nMRI\nspirochaete\n"),
        }

    def test_keeps_whole_tokens_and_listed_words(
        self, script: ModuleType, inputs: dict[str, Path], tmp_path: Path
    ) -> None:
        tokenizers = [f"gpt2={inputs['gpt2']}", f"gemma={inputs['gemma']}"]
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            said = script.build(inputs["vectors"], tokenizers, [inputs["list"]], folder)
        assert said.startswith("5 words") and "1 words of the extra lists are not in the source" in said
        vectors = load_embeddings(folders[0] / "glove-wiki-gigaword-100.safetensors")
        assert list(vectors.words) == ["the", "€", "cat", "gene", "mri"]
        np.testing.assert_array_equal(vectors.vectors[:, 99], [0, 1, 2, 3, 4])
        np.testing.assert_array_equal(vectors.vectors[:, 0], np.float16(0.12345))
        for file in folders[0].iterdir():
            assert file.read_bytes() == (folders[1] / file.name).read_bytes()

    def test_a_missing_list_stops_it(self, script: ModuleType, inputs: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            script.build(inputs["vectors"], [], [tmp_path / "no.txt"], tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestWordVectors:
    toy = WordVectors.from_rows(
        ["cat", "dog", "well-known", "well", "patient", "s", "nil"],
        [[1, 0], [0, 1], [4, 4], [8, 0], [0, 2], [2, 0], [0, 0]],
        name="toy",
    )

    def test_lookup_is_exact(self) -> None:
        assert "cat" in self.toy and "Cat" not in self.toy and None not in self.toy
        assert self.toy.get("Cat") is None
        assert len(self.toy) == 7 and self.toy.dim == 2

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("Cat, DOG!", [0.5, 0.5]),
            ("cat cat dog", [2 / 3, 1 / 3]),
            ("a well-known cat", [2.5, 2]),  # the compound is known: (4,4) and (1,0)
            ("a well-unknown cat", [4.5, 0]),  # it is not: (8,0) and (1,0)
            ("patient's", [1, 1]),
            ("patient\u2019s", [1, 1]),
            ("_cat_\u202edog\n", [0.5, 0.5]),
        ],
    )
    def test_mean_vector_by_hand(self, text: str, expected: list[float]) -> None:
        mean = self.toy.mean_vector(text)
        assert mean is not None and mean.dtype == np.float32
        np.testing.assert_allclose(mean, expected, rtol=1e-6)

    @pytest.mark.parametrize("text", ["", "xyzzy", "<script>", "\ufffd\n\u202e"])
    def test_no_known_word(self, text: str) -> None:
        assert self.toy.mean_vector(text) is None

    def test_is_read_only(self) -> None:
        with pytest.raises(ValueError, match="read-only"):
            self.toy.vectors[0, 0] = 7

    def test_shapes_must_fit(self) -> None:
        with pytest.raises(ShapeMismatch, match="one row a word"):
            WordVectors.from_rows(["a", "b"], [[1.0]], name="x")
