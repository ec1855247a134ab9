"""Runs of the tiny study without the pictures of its report, which take most of its time; tests/report draws them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from saeffect.errors import Undefined
from saeffect.report import figures

FIGURES = figures.FIGURES


def _undrawn(*_: Any) -> None:
    raise Undefined("not drawn in this test.")


@pytest.fixture(scope="module")
def without_figures() -> Iterator[None]:
    """For a module's tests: each figure of a report has a reason in the place of a drawing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", [replace(kind, draw=_undrawn) for kind in FIGURES])
        yield


@pytest.fixture
def with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test of such a module: figures are drawn after all."""
    monkeypatch.setattr(figures, "FIGURES", FIGURES)
