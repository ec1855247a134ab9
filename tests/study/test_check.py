"""What a check finds in the files that people bring."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from saeffect.errors import BadFile, EmptySelection, NotFound
from saeffect.io import read_json
from saeffect.progress import Log
from saeffect.study.check import check_study
from saeffect.study.run import run_study
from saeffect.study.stages.report import _text_words
from saeffect.study.study import Study
from tiny_study import WORDS, make_sae, make_study, sentences


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    make_study(folder, steering=None)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "s")
    return tmp_path / "s"


def _study(folder: Path, **changes: Any) -> Study:
    config = yaml.safe_load((folder / "study.yaml").read_text())
    for keys, value in changes.items():
        place = config
        *above, last = keys.split("__")
        for key in above:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    (folder / "study.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Study.open(folder / "study.yaml")


def _line(study: Study, start: str) -> str:
    (found,) = (line for line in check_study(study).lines if line.startswith(start))
    return found


def test_unmatchable_vocabulary_words_are_counted(folder: Path, complains: Callable[..., Any]) -> None:
    assert _line(_study(folder), "vocabulary").endswith(f": {len(set(WORDS[:16]))} words")
    (folder / "words.txt").write_text("cancer\nspirochaete\nDoctor\nzygoma\n")
    assert "4 words, of which 2 can never match, no token being one of them, such as spirochaete, zygoma" in _line(
        _study(folder), "vocabulary"
    )
    (folder / "words.txt").write_text("spirochaete\nzygoma\n")
    with complains(EmptySelection, "not one of the 2 words is a token", at="study.yaml, selection.vocabulary"):
        check_study(_study(folder))


def test_token_ids_far_beyond_the_embedding_cost_nothing(folder: Path) -> None:
    for model in ("base", "tuned"):
        path = folder / model / "tokenizer.json"
        rules = json.loads(path.read_text())
        rules["model"]["vocab"]["far"] = 30_000_000
        path.write_text(json.dumps(rules))
    started = time.process_time()
    lines = check_study(_study(folder)).lines
    assert time.process_time() - started < 15
    assert any("1 tokens of the tokenizer (far) are without embedding" in line for line in lines)


def test_null_facts_of_an_sae_are_unknown(folder: Path) -> None:
    path = folder / "saes" / "treatment" / "cfg.json"
    raw = json.loads(path.read_text())
    raw["metadata"] |= {"training_tokens": math.nan, "seed": math.inf, "held_out": [{"l0": 1}]}
    path.write_text(json.dumps(raw))
    design = check_study(_study(folder)).design.set_index("field")
    assert design.loc[["training_tokens", "seed", "l0"], "status"].tolist() == ["unknown"] * 3


def test_short_text_source_is_reported(folder: Path) -> None:
    assert _line(_study(folder), "text") == "text: domain, general"
    rows = [json.dumps({"text": text}) for text in sentences(8)]
    (folder / "other.jsonl").write_text("\n".join(rows), encoding="utf-8")
    study = _study(folder)
    n = study.rows().ids.size
    assert 32 <= n < 1024
    short = f"only {n} of the 1,024 tokens that text.tokens asks for: rows are taken from each source in turn"
    assert f"{short}, and 'general' ends first" in _line(study, "text")
    said: list[str] = []
    run = run_study(study, folder / "run", stages=("gate",), log=Log(said.append))
    assert len([line for line in said if short in line]) == 1
    measured = read_json(run.arm("treatment", "gate.json"))["text_shortage"]
    assert _text_words(study.config.text, measured).startswith(f"domain, general ({short}")
    assert _text_words(study.config.text, "") == "domain, general"


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "packed.jsonl"])
def test_text_in_other_formats_is_read(name: str, folder: Path) -> None:
    table = pd.DataFrame({"text": sentences(200)})
    if name == "a.csv":
        table.to_csv(folder / name, index=False)
    elif name == "a.parquet":
        table.to_parquet(folder / name)
    else:
        lines = "\n".join(json.dumps({"text": text}) for text in table["text"])
        (folder / name).write_bytes(gzip.compress(lines.encode()))
    study = _study(folder, text__sources__0__path=name)
    assert _line(study, "text") == "text: domain, general"


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"\x00\x01\x02\xff", "not UTF-8"), (b"[1, 2]", "it has to be an object"), (b'{"text": null}', "holds null")],
)
def test_every_source_is_opened(content: bytes, part: str, folder: Path, complains: Callable[..., Any]) -> None:
    (folder / "other.jsonl").write_bytes(content)
    with complains(BadFile, part, at="study.yaml, text.sources.1"):
        check_study(_study(folder))
    (folder / "other.jsonl").unlink()
    with complains(NotFound, "no text file", at="study.yaml, text.sources.1"):
        check_study(_study(folder))


def test_paths_resolve_beside_the_study_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complains: Callable[..., Any]
) -> None:
    current = tmp_path / "current"
    make_sae(current / "mine", 9, d_sae=64)
    shutil.copytree(current / "mine", current / "alone")
    make_sae(folder / "mine", 0)
    monkeypatch.chdir(current)
    study = _study(folder, arms__control__sae="mine", arms__control__model="base")
    assert "× 96," in _line(study, "arm control (")
    with complains(NotFound, "no SAE folder", "the current folder does have 'alone'", at="arms.control.sae"):
        check_study(_study(folder, arms__control__sae="alone"))
