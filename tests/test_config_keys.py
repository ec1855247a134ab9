"""Tables of keys say what pydantic does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from saeffect.config import StrictModel
from saeffect.config_keys import keys_table


class _Inner(StrictModel):
    x: int = 1


class _Keys(StrictModel):
    needed: str = Field(description="A name.")
    number: int = Field(12_345, description="Many.")
    fraction: float = 0.5
    flag: bool = False
    nothing: str | None = None
    blank: str = ""
    choice: Literal["a", "b"] | None = Field("a", description="Which.")
    several: tuple[Literal["a", "b"], ...] = ("a", "b")
    numbers: tuple[float, ...] = (0.5, 2.0)
    mapping: dict[str, int] = Field(default_factory=dict)
    inner: _Inner = _Inner()
    made: _Inner = Field(default_factory=_Inner)
    derived: tuple[int, ...] = Field(min_length=1, json_schema_extra={"default": "as many as arms"})


def test_a_row_for_each_kind_of_key() -> None:
    assert keys_table("Section", _Keys, more=lambda name: "Not negative." if name == "number" else "").splitlines() == [
        "## Section",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
        "| `needed` | required | A name. |",
        "| `number` | 12,345 | Many. Not negative. |",
        "| `fraction` | 0.5 |  |",
        "| `flag` | false |  |",
        "| `nothing` | none |  |",
        "| `blank` | empty |  |",
        "| `choice` | `a` | Which. One of a, b. |",
        "| `several` | `a`, `b` | Any of a, b. |",
        "| `numbers` | 0.5, 2 |  |",
        "| `mapping` | none |  |",
        "| `inner` | its defaults |  |",
        "| `made` | its defaults |  |",
        "| `derived` | as many as arms |  |",
    ]
