from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from saeffect.sae.training import run as training_run
from saeffect.sae.training.figure import FIGURES


@pytest.fixture(scope="module", autouse=True)
def quick_figures() -> Iterator[None]:
    """The curve of a training is not drawn: it would take most of the time of every tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "save_training_figure", placeholders)
        yield


def placeholders(folder: Path) -> None:
    """Files in place of the figures."""
    for name in FIGURES:
        (folder / name).write_text("a figure")
