"""People's answers about features: is this one of the domain, and what would you call it?

A CSV file of verdicts enters; a table of them, and a summary per feature and arm, leave.
"""

from __future__ import annotations

from saeffect.review.verdicts import read_verdicts, summarise_verdicts

__all__ = ["read_verdicts", "summarise_verdicts"]
