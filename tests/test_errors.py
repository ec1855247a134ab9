from __future__ import annotations

import inspect

import pytest

from saeffect import errors
from saeffect.errors import BadFile, Interrupted, NotFound, SaeffectError, UnknownName, unknown_name


def test_the_whole_form() -> None:
    error = NotFound("no folder 'sae'.", at="arms.control.sae", fix="train one.")
    assert str(error) == "NotFound: no folder 'sae'.\n  at:  arms.control.sae\n  fix: train one."


def test_message_without_place_and_fix() -> None:
    assert str(BadFile("broken.")) == "BadFile: broken."


def test_placed_puts_outer_place_first() -> None:
    error = BadFile("broken.", at="line 3")
    assert error.placed("text.0") is error
    assert error.at == "text.0, line 3"
    assert BadFile("broken.").placed("text.0").at == "text.0"


@pytest.mark.parametrize(
    ("name", "fix"),
    [("cosin", "did you mean 'cosine'?"), ("zzz", "use one of: cosine, dot.")],
)
def test_unknown_name_lists_the_valid_ones(name: str, fix: str) -> None:
    error = unknown_name("projection", name, ["dot", "cosine"], at="features.projection")
    assert isinstance(error, UnknownName)
    assert error.message == f"there is no projection {name!r}; valid: cosine, dot."
    assert error.fix == fix


def test_unknown_name_without_any_valid_one() -> None:
    assert "valid: (none)" in str(unknown_name("adapter", "x", []))


def test_every_error_is_public_and_in_the_tree() -> None:
    kinds = {n: c for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, Exception)}
    assert set(kinds) == set(errors.__all__) - {"first_line", "placed", "unknown_name"}
    for name, kind in kinds.items():
        assert issubclass(kind, SaeffectError)
        assert kind.__doc__
        assert f" {name} " in f"{errors.__doc__} " or name == "SaeffectError"


def test_exit_codes() -> None:
    assert BadFile("x").exit_code == 2
    assert Interrupted("x").exit_code == 130
