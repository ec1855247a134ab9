"""Which part of a bundled text a study reads, and which of its models stay in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeffect.config import TextConfig
from saeffect.lm.loading import load_language_model
from saeffect.study import study as module
from saeffect.study.study import Study
from saeffect.study.texts import study_rows
from tiny_study import make_study


def no_model() -> None:
    raise AssertionError("bundled ids without BOS need no model")


def test_bundled_rows_are_cut_to_the_context_size() -> None:
    whole = study_rows(TextConfig(bundled="smollm2-sampled", tokens=51_200), no_model, prepend_bos=False)
    short = TextConfig(bundled="smollm2-sampled", tokens=18_432, context_size=96)
    cut = study_rows(short, no_model, prepend_bos=False)
    assert whole.ids.shape == (200, 256)
    assert cut.ids.shape == (192, 96)
    assert (cut.ids == whole.ids[:192, :96]).all()
    assert (cut.sources == whole.sources[:192]).all()


def test_the_bundled_study_reads_enough_rows() -> None:
    config = Study.open("bundled:smollm2-medical").config
    rows = study_rows(config.text, no_model, prepend_bos=False)
    all_rows = study_rows(config.text.model_copy(update={"tokens": 10**9}), no_model, prepend_bos=False)
    assert config.put_back is not None
    assert len(rows) == config.changes.rows, "both models read each row once"
    assert len(all_rows) >= len(rows) + len(rows.names) * config.put_back.rows
    assert rows.context_size >= max(config.changes.tokens_per_row, config.put_back.tokens_per_row)


@pytest.mark.parametrize(("memory", "loads"), [(10**12, 2), (0, 4)])
def test_two_models_are_kept_where_there_is_room(
    memory: int, loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.open(make_study(tmp_path))
    loaded: list[str] = []

    def load(config: object, **options: object) -> object:
        loaded.append(str(config))
        return load_language_model(config, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "load_language_model", load)
    monkeypatch.setattr(module, "machine_memory", lambda: memory)
    first = study.open_model("control")
    for arm in ("placebo", "treatment", "control", "treatment"):
        study.open_model(arm)
    assert len(loaded) == loads
    assert (study.open_model("control") is first) == (loads == 2)
