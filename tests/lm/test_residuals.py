"""Captures are made once for everybody who asks for the same, and never for anybody who asks for something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeffect.lm import residuals as module
from saeffect.lm.activations import TokenRows
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.residuals import Residuals, machine_memory

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def rows() -> TokenRows:
    ids = np.random.default_rng(0).integers(5, 50, (20, 16)).astype(np.int32)
    return TokenRows(ids, np.zeros(20, dtype=np.int64), ("general",))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many passes of the model were made since it was last asked."""
    made: list[int] = []

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        made.append(1)
        return capture(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "capture", counted)

    def since() -> int:
        n = len(made)
        made.clear()
        return n

    return since


def everything(residuals: Residuals, lm: LanguageModel, rows: TokenRows, hook: str = HOOK) -> torch.Tensor:
    pieces = list(residuals.batches(lm, hook, rows))
    assert [start for start, _, _ in pieces] == [0, 8, 16]
    assert torch.equal(torch.cat([ids for _, ids, _ in pieces]), torch.from_numpy(rows.ids.astype("int64")))
    return torch.cat([x for _, _, x in pieces])


def test_residuals_equal_plain_capture(tiny_llama: LanguageModel, rows: TokenRows) -> None:
    plain = capture(tiny_llama, HOOK, torch.from_numpy(rows.ids.astype("int64")))
    torch.testing.assert_close(everything(Residuals(), tiny_llama, rows), plain, rtol=1e-5, atol=1e-6)


def test_the_same_is_captured_once(
    tiny_llama: LanguageModel, tiny_gpt2: LanguageModel, rows: TokenRows, passes: Callable[[], int]
) -> None:
    residuals = Residuals()
    llama, gpt2 = (replace(lm, identity=name) for lm, name in ((tiny_llama, "a"), (tiny_gpt2, "b")))
    first, second = everything(residuals, llama, rows), everything(residuals, gpt2, rows)
    assert passes() == 6
    assert torch.equal(everything(residuals, llama, rows), first)
    assert torch.equal(everything(residuals, gpt2, rows), second)
    assert passes() == 0


def test_other_hook_text_or_model_is_captured_anew(
    tiny_llama: LanguageModel, rows: TokenRows, passes: Callable[[], int]
) -> None:
    residuals, llama = Residuals(), replace(tiny_llama, identity="a")
    everything(residuals, llama, rows)
    other_text = everything(residuals, llama, replace(rows, ids=rows.ids[::-1].copy()))
    other_hook = everything(residuals, llama, rows, "blocks.0.hook_resid_pre")
    assert passes() == 9
    assert not torch.equal(other_text, other_hook)
    nobody = replace(tiny_llama, identity="")
    everything(residuals, nobody, rows)
    everything(residuals, nobody, rows)
    assert passes() == 6


def test_what_was_captured_before_a_stop_is_kept(
    tiny_llama: LanguageModel, rows: TokenRows, passes: Callable[[], int]
) -> None:
    residuals, llama = Residuals(), replace(tiny_llama, identity="a")
    next(residuals.batches(llama, HOOK, rows))
    everything(residuals, llama, rows)
    assert passes() == 3


def test_longer_text_reuses_captured_prefix(
    tiny_llama: LanguageModel, rows: TokenRows, passes: Callable[[], int]
) -> None:
    residuals, llama = Residuals(), replace(tiny_llama, identity="a")
    ids = torch.from_numpy(rows.ids[:8].astype("int64"))
    residuals.keep(llama, HOOK, ids, capture(llama, HOOK, ids))
    everything(residuals, llama, rows)
    assert passes() == 2


def test_the_oldest_makes_room(tiny_llama: LanguageModel, rows: TokenRows, passes: Callable[[], int]) -> None:
    size = rows.ids.size * tiny_llama.d_model * tiny_llama.dtype.itemsize
    residuals, models = Residuals(2 * size), [replace(tiny_llama, identity=name) for name in "abc"]
    for lm in models:
        everything(residuals, lm, rows)
    assert passes() == 9
    everything(residuals, models[2], rows)
    everything(residuals, models[1], rows)
    assert passes() == 0
    everything(residuals, models[0], rows)
    assert passes() == 3
    small = Residuals(size - 1)
    everything(small, models[0], rows)
    everything(small, models[0], rows)
    assert passes() == 6


def test_an_eighth_of_the_memory_is_for_captures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(module.os, "sysconf", pages.__getitem__)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(module, "_CONTAINER_LIMITS", (str(limit),))
    assert Residuals().most_bytes == 512_000
    limit.write_text("max\n")
    assert machine_memory() == 4_096_000
    limit.write_text("800000\n")  # a container with less
    assert Residuals().most_bytes == 100_000
    monkeypatch.delattr(module.os, "sysconf")
    assert machine_memory() == 800_000
