"""The page on the keys of a study file, and the study in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from saeffect.config import StudyConfig

ROOT = Path(__file__).parents[2]


def _described(model: type[BaseModel]) -> dict[str, str | None]:
    """Every key below a model, with its description."""
    found: dict[str, str | None] = {}
    for name, field in model.model_fields.items():
        found[name] = field.description
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _described(kind)
    return found


def test_every_key_is_on_the_page() -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    keys = _described(StudyConfig)
    assert len(keys) > 60
    assert [name for name, text in keys.items() if not text] == []
    assert [name for name in keys if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_pages_point_to_files_that_are_there(page: str) -> None:
    place = ROOT / page
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", place.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (place.parent / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_studies_in_the_pages_are_valid(page: str) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        values = yaml.safe_load(block)
        if "arms" in values:
            StudyConfig.read(values, at=page)
        elif set(values) == {"steering"}:
            StudyConfig.read(_smallest() | values, at=page)


def _smallest() -> dict[str, object]:
    arms = {role: {"role": role, "model": "m", "sae": role} for role in ("control", "treatment")}
    return {"name": "x", "arms": arms, "text": {"bundled": "smollm2-sampled"}}
