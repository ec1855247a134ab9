"""The names of `import saeffect`: few, all in docs/python.md, which runs; old ones say what they are called now."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import pytest

import saeffect
from tiny_study import only_figures

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_public_names_load_and_are_documented() -> None:
    used = set(re.findall(r"\bsx\.(\w+)", "\n".join(_blocks())))
    assert used == set(saeffect.__all__) - {"__version__"}
    assert len(used) <= 22
    assert all(callable(getattr(saeffect, name)) for name in used)


@pytest.mark.parametrize("name", sorted(saeffect._RENAMED))
def test_an_old_name_gives_the_new_one(name: str) -> None:
    with pytest.raises(ImportError, match=rf"saeffect.{name} is now saeffect\.") as caught:
        getattr(saeffect, name)
    path = str(caught.value).rstrip(".").rsplit(" ", 1)[1]
    module, _, attribute = path.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), path


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(saeffect, "nothing")


@pytest.mark.real
def test_the_page_runs(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path, dirs_exist_ok=True)
    shutil.copy("text.jsonl", "notes.jsonl")
    # The study of the page is finished but for its report.
    shutil.copytree("run", "runs/mine")
    Path("runs/mine/report.html").unlink()
    names: dict[str, object] = {}
    with only_figures("contrasts"):
        for block in _blocks():
            exec(compile(block, str(PAGE), "exec"), names)
    assert len(names["found"]) == 2 and names["found"]["effect"].notna().all()
    assert names["matches"]["cosine"].max() > 0.9
    assert names["logits"].shape[-1] == names["lm"].d_vocab
    assert Path(names["page"]).stat().st_size > 100_000
    assert (tmp_path / "saes" / "notes" / "cfg.json").is_file()
