"""What the review's pages read and write: the queue of the run, its contexts, the store of verdicts; who judges in a
browser, and whether it may show what others said.

That stays hidden, all over the app, until one has judged everything or says that one will not judge blind. This is
written down, and the verdicts that follow are marked.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pandas as pd
from fastapi import Request

from saeffect.errors import NotFound, SaeffectError
from saeffect.report.texts import Chip, Run, chips, context_runs
from saeffect.review.agreement import agreement, disagreements, rater_summary
from saeffect.review.queue import Item, Queue, fingerprint_tokens
from saeffect.review.store import NOT_BLIND, STORE, Given, VerdictStore
from saeffect.review.verdicts import ADJUDICATION, VERDICTS
from saeffect.study.label import read_labels
from saeffect.study.review import Standing, read_queue, standing_verdicts
from saeffect.web.site import Site

__all__ = [
    "Desk",
    "Judged",
    "Progress",
    "Screen",
    "Split",
    "Splits",
    "Veil",
    "desk_of",
    "has_looked",
    "looked_cookie",
    "rater_cookie",
    "signed_in",
    "veil",
]

_PAGE = 50  # disagreements
_CONTEXTS = ["feature", "rank", "position", "tokens", "activations"]


@dataclass(frozen=True)
class Judged:
    """What a rater said about an item before."""

    verdict: str
    label: str
    note: str


@dataclass(frozen=True)
class Progress:
    """How many items a rater has judged, of how many."""

    rater: str
    done: int
    total: int


@dataclass(frozen=True)
class Screen:
    """One item as a rater sees it: neither arm, number, scores nor what others said."""

    name: str
    chips: tuple[Chip, ...]
    contexts: tuple[tuple[Run, ...], ...]
    before: Judged | None = None


@dataclass(frozen=True)
class Split:
    """A feature on which raters differ: counts, what they wrote, and what was decided ("" for nothing yet)."""

    screen: Screen
    counts: dict[str, int]
    said: tuple[tuple[str, Judged], ...]
    decided: str
    by: str


@dataclass(frozen=True)
class Splits:
    """A page of disagreements, and how many there are and are open."""

    shown: tuple[Split, ...]
    total: int
    left: int
    page: int = 1
    pages: int = 1


class Desk:
    """The review of one run directory. Errors of all methods: as `read_queue`, and as `VerdictStore`."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.store = VerdictStore(site.path(STORE))
        site.on_close(self.store.close)

    @property
    def subject(self) -> str:
        """What the domain is called."""
        return self._site.study.config.selection.subject

    @property
    def queue(self) -> Queue:
        """The queue of the run as it is now."""
        return self._site.cached("review queue", self._files(), lambda: read_queue(self._site.folder))

    def now(self, rater: str) -> tuple[Progress, Screen | None]:
        """How far a rater is, and the first item that is left; None if there is none."""
        queue = self.queue
        left, total = queue.open_items(rater, self.store), len(queue.items)
        return Progress(rater, total - len(left), total), self.screen(left[0], rater) if left else None

    def screen(self, item: Item, rater: str, before: Judged | None = None) -> Screen:
        """An item as it is shown."""
        found = (self._context(*place) for place in item.contexts)
        return Screen(
            self.queue.name(item, rater, self.store),
            chips(item.tokens, [0.0] * len(item.tokens), ()),
            tuple(runs for runs in found if runs),
            before,
        )

    def judge(self, rater: str, name: str, said: Judged, *, request: str) -> None:
        """Save a rater's verdict; NotFound if the item is gone."""
        item = self.queue.find(name, rater, self.store)
        source = NOT_BLIND if self.store.is_not_blind(rater) else "app"
        self.store.record(rater, _given(item, said, "rater", request, source))

    def label(self, rater: str, arm: str, feature: int, said: Judged) -> None:
        """Save a verdict given on a feature's page, which shows arm and scores, so it is not blind; NotFound without
        the feature.
        """
        table = self._site.table("arms", arm, "features.parquet")
        tokens = table.loc[table["feature"] == feature, "top_tokens"]
        if tokens.empty:
            raise NotFound(f"arm {arm} has no feature {feature}.", fix="look for it in the list.")
        seen = fingerprint_tokens(tuple(tokens.iloc[0]))
        given = Given(arm, feature, seen, said.verdict, said.label, said.note, source=NOT_BLIND)
        self.store.record(rater, given)

    def sees(self, rater: str) -> bool:
        """Whether a rater may see what others said: who has judged everything, or has said not to judge blind."""
        store = self.store.path
        files = [*self._files(), store, store.with_name(f"{STORE}-wal")]
        return self._site.cached(f"review open to {rater}", files, lambda: self._sees(rater))

    def _sees(self, rater: str) -> bool:
        if self.store.is_not_blind(rater):
            return True
        own = self.progress(rater)
        if own.done < own.total:
            return False
        with contextlib.suppress(SaeffectError):  # a folder that cannot be written takes no verdicts either
            self.store.mark_not_blind(rater)
        return True

    def undo(self, rater: str) -> Screen | None:
        """Take back the rater's latest verdict; its item with what was said, None if there is none or it is gone."""
        given = self.store.undo(rater)
        if given is None:
            return None
        key = (given.kind, given.arm, given.feature, given.seen)
        item = next((item for item in self.queue.items if item.key == key), None)
        return self.screen(item, rater, Judged(given.verdict, given.label, given.note)) if item else None

    def adjudicate(self, rater: str, name: str, said: Judged, *, request: str) -> None:
        """Save a decision on what raters differ on; NotFound if the item is gone."""
        item = self.queue.find(name, rater, self.store)
        self.store.record(rater, _given(item, said, "adjudicator", request))

    def progress(self, rater: str) -> Progress:
        """How far a rater is."""
        keys = self.queue.keys
        return Progress(rater, len(keys & self.store.judged(rater).keys()), len(keys))

    def standing(self) -> Standing:
        """What everybody said about the features as they are."""
        arms = {arm: self._site.table("arms", arm, "features.parquet") for arm in self._site.arms}
        return standing_verdicts(self.store, arms)

    def agreement(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Agreement on the candidates, and what each rater said (`saeffect.review.agreement`)."""
        said, _ = self._said()
        return agreement(said), rater_summary(self._blind(), self._candidates())

    def model_labels(self, rater: str) -> pd.DataFrame:
        """A language model's labels of candidates that the rater has judged, with tokens, verdict, and own label."""
        said = self._blind()
        own = said[(said["rater"] == rater) & (said["kind"] == "feature")].set_index(["arm", "feature"])
        found = []
        for arm in self._site.arms:
            rows = read_labels(self._site.folder, arm).to_dict("records")
            labels = {(row["feature"], row["seen"]): row for row in rows}
            for item in self.queue.candidates:
                row = labels.get((item.feature, item.seen)) if item.arm == arm and item.key[1:3] in own.index else None
                if row is not None:
                    given = own.loc[item.key[1:3]]
                    tokens = ", ".join(chip.text for chip in chips(item.tokens, [0.0] * len(item.tokens), ())[:5])
                    found.append(row | {"verdict": given["verdict"], "own": given["label"], "tokens": tokens})
        return pd.DataFrame(found)

    def splits(self, rater: str, page: int) -> Splits:
        """A page of the features on which somebody has to decide, open ones first."""
        said, decisions = self._said()
        items = {(item.arm, item.feature): item for item in self.queue.candidates}
        table = disagreements(said, decisions)
        table = table.assign(settled=table["decided"] != "").sort_values("settled", kind="stable")
        pages = max(1, -(-len(table) // _PAGE))
        page, found = min(page, pages), []
        for row in table.iloc[(page - 1) * _PAGE : page * _PAGE].to_dict("records"):
            here = said[(said["arm"] == row["arm"]) & (said["feature"] == row["feature"])]
            decided = decisions[(decisions["arm"] == row["arm"]) & (decisions["feature"] == row["feature"])].tail(1)
            found.append(
                Split(
                    self.screen(items[row["arm"], row["feature"]], rater),
                    {verdict: int(row[f"n_{verdict}"]) for verdict in VERDICTS},
                    tuple((r.rater, Judged(r.verdict, r.label, r.note)) for r in here.itertuples()),
                    str(row["decided"]),
                    "".join(decided["rater"]).removeprefix(ADJUDICATION).strip(),
                )
            )
        return Splits(tuple(found), len(table), int((~table["settled"].astype(bool)).sum()), page, pages)

    def _said(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Verdicts on the candidates, and decisions on them."""
        table, chosen = self.standing().verdicts, self._candidates()
        asked = [place in chosen for place in zip(table["arm"], table["feature"], strict=True)]
        table = table[pd.Series(asked, index=table.index, dtype=bool) & (table["kind"] == "feature")]
        decides = _decides(table)
        return table[~decides], table[decides]

    def _blind(self) -> pd.DataFrame:
        table = self.standing().verdicts
        return table[~_decides(table)]

    def _candidates(self) -> set[tuple[str, int]]:
        return {(item.arm, item.feature) for item in self.queue.candidates}

    def _files(self) -> tuple[Path, ...]:
        return _files_of(self._site.folder, self._site.arms)

    def _context(self, arm: str, feature: int, rank: int) -> tuple[Run, ...]:
        """A context around its strongest token; empty if the feature fired less often."""
        file = self._site.folder / "arms" / arm / "examples.parquet"
        table, places = self._site.cached(f"review contexts {arm}", [*self._files(), file], lambda: self._read(arm))
        place = places.get((feature, rank))
        if place is None:
            return ()
        row = {name: table.column(name)[place].as_py() for name in ("position", "tokens", "activations")}
        return context_runs(row["tokens"], row["activations"], row["position"])

    def _read(self, arm: str) -> tuple[Any, dict[tuple[int, int], int]]:
        """The contexts of an arm's items as an Arrow table, which is small, and the row of each feature and rank."""
        import pyarrow.parquet as pq

        wanted = {feature for item in self.queue.items for name, feature, _ in item.contexts if name == arm}
        table = pq.read_table(
            self._site.path("arms", arm, "examples.parquet"),
            columns=_CONTEXTS,
            filters=[("feature", "in", sorted(wanted))],
        ).combine_chunks()
        keys = zip(table.column("feature").to_pylist(), table.column("rank").to_pylist(), strict=True)
        return table, {key: place for place, key in enumerate(keys)}


@functools.lru_cache(maxsize=4)
def _files_of(folder: Path, arms: tuple[str, ...]) -> tuple[Path, ...]:
    """What the queue is made from."""
    return tuple(folder / "arms" / arm / f"{name}.parquet" for arm in arms for name in ("features", "selection"))


def _decides(table: pd.DataFrame) -> pd.Series[bool]:
    return table["rater"].str.startswith(ADJUDICATION).astype(bool)


def _given(item: Item, said: Judged, role: Literal["rater", "adjudicator"], request: str, source: str = "app") -> Given:
    return Given(
        item.arm,
        item.feature,
        item.seen,
        said.verdict,
        said.label,
        said.note,
        kind=item.kind,
        role=role,
        request=request,
        source=source,
    )


def desk_of(site: Site) -> Desk:
    """The one desk of a site."""
    return site.cached("review desk", [], lambda: Desk(site))


@dataclass(frozen=True)
class Veil:
    """What others said is hidden: from whom (None: nobody is signed in), and on which page."""

    own: Progress | None
    here: str


def rater_cookie(request: Request) -> str:
    """Holds the name of who is judging; browsers share cookies between ports."""
    return f"rater-{request.app.state.site.settings.port}"


def looked_cookie(request: Request) -> str:
    """Says that this browser has shown what others said to somebody who was not signed in."""
    return f"looked-{request.app.state.site.settings.port}"


def signed_in(request: Request, desk: Desk) -> str | None:
    """Who is judging: the owner of the token, or else who the browser says."""
    owner = getattr(request.state, "rater", None)
    if owner:
        return desk.store.find(owner) or str(owner)
    said = unquote(request.cookies.get(rater_cookie(request), ""))
    return desk.store.find(said) if said else None


def has_looked(request: Request) -> bool:
    """Whether somebody who was not signed in has looked in this browser."""
    return looked_cookie(request) in request.cookies


def veil(request: Request) -> Veil | None:
    """None where verdicts may be shown: there are none, or one has judged everything or has looked before."""
    site, hosted = request.app.state.site, getattr(request.state, "rater", None) is not None
    if not hosted and not (site.folder / STORE).exists():
        return None
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    if not hosted and rater_cookie(request) not in request.cookies:
        return None if has_looked(request) else Veil(None, here)
    try:
        desk = desk_of(site)
        rater = signed_in(request, desk)
        if rater is None:
            return None if has_looked(request) else Veil(None, here)
        return None if desk.sees(rater) else Veil(desk.progress(rater), here)
    except SaeffectError:  # the review says what is wrong with it
        return Veil(None, here)
