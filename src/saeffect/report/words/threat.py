"""One threat to the answer, and how serious it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd

__all__ = ["SEVERITIES", "Severity", "Threat", "threat_table"]

Severity = Literal["serious", "moderate", "minor"]
SEVERITIES: tuple[Severity, ...] = ("serious", "moderate", "minor")
"""Serious: the answer may be wrong for it. Moderate: it is less sure than its interval. Minor: it speaks for less."""


@dataclass(frozen=True)
class Threat:
    """One threat.

    Attributes:
        threat: What is the matter, in full sentences.
        severity: One of `SEVERITIES`.
        remedy: What to do about it.
        source: The table that shows it, with its columns.
    """

    threat: str
    severity: Severity
    remedy: str
    source: str


def threat_table(found: Sequence[Threat]) -> pd.DataFrame:
    """Threats as a table, in the same order: `severity`, `threat`, `remedy`, `source`."""
    return pd.DataFrame([asdict(one) for one in found], columns=["severity", "threat", "remedy", "source"])
