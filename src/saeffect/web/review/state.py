"""The state behind the review's pages: the run's queue with its contexts, the store of verdicts, the rater of a
browser, and whether it may show the verdicts of others.

Those are hidden in the whole app until a rater has judged everything, or chooses not to judge blind. The choice is
stored, and later verdicts of that rater are marked.
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
from saeffect.review.store import NOT_BLIND, STORE, Verdict, VerdictStore
from saeffect.review.verdicts import ADJUDICATION, VERDICTS
from saeffect.study.label import read_labels
from saeffect.study.review import Standing, read_queue, standing_verdicts
from saeffect.web.site import Site

__all__ = [
    "Review",
    "Answer",
    "Progress",
    "Screen",
    "Disagreement",
    "DisagreementPage",
    "HiddenVerdicts",
    "review_of",
    "is_unblinded",
    "unblinded_cookie",
    "rater_cookie",
    "signed_in",
    "hidden_verdicts",
]

_PAGE_LENGTH = 50  # disagreements
_CONTEXT_COLUMNS = ["feature", "rank", "position", "tokens", "activations"]


@dataclass(frozen=True)
class Answer:
    """A rater's answer about an item."""

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
    """One item as a rater sees it: without arm, number, scores and verdicts of others."""

    name: str
    chips: tuple[Chip, ...]
    contexts: tuple[tuple[Run, ...], ...]
    before: Answer | None = None


@dataclass(frozen=True)
class Disagreement:
    """A feature on which raters differ: counts, their answers, and the decision ("" if open) with its author."""

    screen: Screen
    counts: dict[str, int]
    answers: tuple[tuple[str, Answer], ...]
    decided: str
    by: str


@dataclass(frozen=True)
class DisagreementPage:
    """A page of disagreements, and the numbers of all and of open ones."""

    rows: tuple[Disagreement, ...]
    total: int
    n_open: int
    page: int = 1
    pages: int = 1


class Review:
    """The review of one run directory. Errors of all methods: as `read_queue`, and as `VerdictStore`."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.store = VerdictStore(site.path(STORE))
        site.on_close(self.store.close)

    @property
    def subject(self) -> str:
        """The name of the domain."""
        return self._site.study.config.selection.subject

    @property
    def queue(self) -> Queue:
        """The queue of the run as it is now."""
        return self._site.cached("review queue", self._files(), lambda: read_queue(self._site.folder))

    def next_screen(self, rater: str) -> tuple[Progress, Screen | None]:
        """A rater's progress and next item; None if there is none."""
        queue = self.queue
        remaining, total = queue.open_items(rater, self.store), len(queue.items)
        return Progress(rater, total - len(remaining), total), self.screen(remaining[0], rater) if remaining else None

    def screen(self, item: Item, rater: str, before: Answer | None = None) -> Screen:
        """The screen of an item."""
        texts = (self._context(*context) for context in item.contexts)
        return Screen(
            self.queue.name(item, rater, self.store),
            chips(item.tokens, [0.0] * len(item.tokens), ()),
            tuple(runs for runs in texts if runs),
            before,
        )

    def judge(self, rater: str, name: str, answer: Answer, *, request: str) -> None:
        """Save a rater's verdict; NotFound if the item is gone."""
        item = self.queue.find(name, rater, self.store)
        source = NOT_BLIND if self.store.is_not_blind(rater) else "app"
        self.store.record(rater, _to_verdict(item, answer, "rater", request, source))

    def label(self, rater: str, arm: str, feature: int, answer: Answer) -> None:
        """Save a verdict given on a feature's page, which shows arm and scores, so it is not blind; NotFound without
        the feature.
        """
        table = self._site.table("arms", arm, "features.parquet")
        tokens = table.loc[table["feature"] == feature, "top_tokens"]
        if tokens.empty:
            raise NotFound(f"arm {arm} has no feature {feature}.", fix="look for it in the list.")
        seen = fingerprint_tokens(tuple(tokens.iloc[0]))
        verdict = Verdict(arm, feature, seen, answer.verdict, answer.label, answer.note, source=NOT_BLIND)
        self.store.record(rater, verdict)

    def may_see_verdicts(self, rater: str) -> bool:
        """Whether a rater may see the verdicts of others: after judging everything, or choosing not to judge blind."""
        store = self.store.path
        files = [*self._files(), store, store.with_name(f"{STORE}-wal")]
        return self._site.cached(f"review open to {rater}", files, lambda: self._may_see_verdicts(rater))

    def _may_see_verdicts(self, rater: str) -> bool:
        if self.store.is_not_blind(rater):
            return True
        progress = self.progress(rater)
        if progress.done < progress.total:
            return False
        with contextlib.suppress(SaeffectError):  # a read-only folder takes no verdicts either
            self.store.mark_not_blind(rater)
        return True

    def undo(self, rater: str) -> Screen | None:
        """Undo the rater's latest verdict; its screen with the answer, or None without a verdict or item."""
        verdict = self.store.undo(rater)
        if verdict is None:
            return None
        key = (verdict.kind, verdict.arm, verdict.feature, verdict.seen)
        item = next((item for item in self.queue.items if item.key == key), None)
        return self.screen(item, rater, Answer(verdict.verdict, verdict.label, verdict.note)) if item else None

    def adjudicate(self, rater: str, name: str, answer: Answer, *, request: str) -> None:
        """Save a decision on what raters differ on; NotFound if the item is gone."""
        item = self.queue.find(name, rater, self.store)
        self.store.record(rater, _to_verdict(item, answer, "adjudicator", request))

    def progress(self, rater: str) -> Progress:
        """A rater's progress."""
        keys = self.queue.keys
        return Progress(rater, len(keys & self.store.judged(rater).keys()), len(keys))

    def current_verdicts(self) -> Standing:
        """The verdicts in force on features whose tokens have not changed since."""
        arms = {arm: self._site.table("arms", arm, "features.parquet") for arm in self._site.arms}
        return standing_verdicts(self.store, arms)

    def agreement(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Agreement on the candidates, and a summary per rater (`saeffect.review.agreement`)."""
        verdicts, _ = self._candidate_verdicts()
        return agreement(verdicts), rater_summary(self._rater_verdicts(), self._candidates())

    def model_labels(self, rater: str) -> pd.DataFrame:
        """A language model's labels of candidates that the rater has judged, with tokens, verdict, and own label."""
        verdicts = self._rater_verdicts()
        verdicts = verdicts[(verdicts["rater"] == rater) & (verdicts["kind"] == "feature")]
        by_rater = verdicts.set_index(["arm", "feature"])
        labelled = []
        for arm in self._site.arms:
            rows = read_labels(self._site.folder, arm).to_dict("records")
            labels = {(row["feature"], row["seen"]): row for row in rows}
            for item in self.queue.candidates:
                row = labels.get((item.feature, item.seen)) if item.arm == arm else None
                if row is not None and item.key[1:3] in by_rater.index:
                    verdict = by_rater.loc[item.key[1:3]]
                    tokens = ", ".join(chip.text for chip in chips(item.tokens, [0.0] * len(item.tokens), ())[:5])
                    labelled.append(row | {"verdict": verdict["verdict"], "own": verdict["label"], "tokens": tokens})
        return pd.DataFrame(labelled)

    def disagreement_page(self, rater: str, page: int) -> DisagreementPage:
        """A page of the features that need an adjudication, open ones first."""
        verdicts, decisions = self._candidate_verdicts()
        items = {(item.arm, item.feature): item for item in self.queue.candidates}
        table = disagreements(verdicts, decisions)
        table = table.assign(settled=table["decided"] != "").sort_values("settled", kind="stable")
        pages = max(1, -(-len(table) // _PAGE_LENGTH))
        page, shown = min(page, pages), []
        for row in table.iloc[(page - 1) * _PAGE_LENGTH : page * _PAGE_LENGTH].to_dict("records"):
            of_feature = verdicts[(verdicts["arm"] == row["arm"]) & (verdicts["feature"] == row["feature"])]
            decided = decisions[(decisions["arm"] == row["arm"]) & (decisions["feature"] == row["feature"])].tail(1)
            shown.append(
                Disagreement(
                    self.screen(items[row["arm"], row["feature"]], rater),
                    {verdict: int(row[f"n_{verdict}"]) for verdict in VERDICTS},
                    tuple((r.rater, Answer(r.verdict, r.label, r.note)) for r in of_feature.itertuples()),
                    str(row["decided"]),
                    "".join(decided["rater"]).removeprefix(ADJUDICATION).strip(),
                )
            )
        return DisagreementPage(tuple(shown), len(table), int((~table["settled"].astype(bool)).sum()), page, pages)

    def _candidate_verdicts(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Verdicts on the candidates, and adjudications of them."""
        table, candidates = self.current_verdicts().verdicts, self._candidates()
        is_candidate = [key in candidates for key in zip(table["arm"], table["feature"], strict=True)]
        table = table[pd.Series(is_candidate, index=table.index, dtype=bool) & (table["kind"] == "feature")]
        decides = _is_adjudication(table)
        return table[~decides], table[decides]

    def _rater_verdicts(self) -> pd.DataFrame:
        table = self.current_verdicts().verdicts
        return table[~_is_adjudication(table)]

    def _candidates(self) -> set[tuple[str, int]]:
        return {(item.arm, item.feature) for item in self.queue.candidates}

    def _files(self) -> tuple[Path, ...]:
        return _files_of(self._site.folder, self._site.arms)

    def _context(self, arm: str, feature: int, rank: int) -> tuple[Run, ...]:
        """A context around its strongest token; empty if the feature has no context of this rank."""
        file = self._site.folder / "arms" / arm / "examples.parquet"
        table, row_numbers = self._site.cached(
            f"review contexts {arm}", [*self._files(), file], lambda: self._read_contexts(arm)
        )
        i = row_numbers.get((feature, rank))
        if i is None:
            return ()
        row = {name: table.column(name)[i].as_py() for name in ("position", "tokens", "activations")}
        return context_runs(row["tokens"], row["activations"], row["position"])

    def _read_contexts(self, arm: str) -> tuple[Any, dict[tuple[int, int], int]]:
        """The contexts of an arm's items as an Arrow table, and the row of each feature and rank."""
        import pyarrow.parquet as pq

        features = {feature for item in self.queue.items for name, feature, _ in item.contexts if name == arm}
        table = pq.read_table(
            self._site.path("arms", arm, "examples.parquet"),
            columns=_CONTEXT_COLUMNS,
            filters=[("feature", "in", sorted(features))],
        ).combine_chunks()
        keys = zip(table.column("feature").to_pylist(), table.column("rank").to_pylist(), strict=True)
        return table, {key: i for i, key in enumerate(keys)}


@functools.lru_cache(maxsize=4)
def _files_of(folder: Path, arms: tuple[str, ...]) -> tuple[Path, ...]:
    """The files behind the queue."""
    return tuple(folder / "arms" / arm / f"{name}.parquet" for arm in arms for name in ("features", "selection"))


def _is_adjudication(table: pd.DataFrame) -> pd.Series[bool]:
    return table["rater"].str.startswith(ADJUDICATION).astype(bool)


def _to_verdict(
    item: Item, answer: Answer, role: Literal["rater", "adjudicator"], request: str, source: str = "app"
) -> Verdict:
    seen = (item.arm, item.feature, item.seen)
    texts = (answer.verdict, answer.label, answer.note)
    return Verdict(*seen, *texts, kind=item.kind, role=role, request=request, source=source)


def review_of(site: Site) -> Review:
    """The review of a site."""
    return site.cached("review review", [], lambda: Review(site))


@dataclass(frozen=True)
class HiddenVerdicts:
    """Verdicts of others are hidden: the rater's progress (None: not signed in), and the address of the page."""

    progress: Progress | None
    address: str


def rater_cookie(request: Request) -> str:
    """Name of the cookie with the rater's name; by port, since browsers share cookies between ports."""
    return f"rater-{request.app.state.site.settings.port}"


def unblinded_cookie(request: Request) -> str:
    """Name of the cookie of a browser that has shown verdicts of others without a rater signed in."""
    return f"looked-{request.app.state.site.settings.port}"


def signed_in(request: Request, review: Review) -> str | None:
    """The rater: the owner of the token, else the name in the browser's cookie."""
    owner = getattr(request.state, "rater", None)
    if owner:
        return review.store.find(owner) or str(owner)
    name = unquote(request.cookies.get(rater_cookie(request), ""))
    return review.store.find(name) if name else None


def is_unblinded(request: Request) -> bool:
    """Whether this browser has shown verdicts of others without a rater signed in."""
    return unblinded_cookie(request) in request.cookies


def hidden_verdicts(request: Request) -> HiddenVerdicts | None:
    """None if verdicts may be shown: there are none, or the rater (or browser) may see them."""
    site, hosted = request.app.state.site, getattr(request.state, "rater", None) is not None
    if not hosted and not (site.folder / STORE).exists():
        return None
    address = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    if not hosted and rater_cookie(request) not in request.cookies:
        return None if is_unblinded(request) else HiddenVerdicts(None, address)
    try:
        review = review_of(site)
        rater = signed_in(request, review)
        if rater is None:
            return None if is_unblinded(request) else HiddenVerdicts(None, address)
        return None if review.may_see_verdicts(rater) else HiddenVerdicts(review.progress(rater), address)
    except SaeffectError:  # the review pages report it
        return HiddenVerdicts(None, address)
