"""What fine-tuning taught, in words: the first screen of the report, from the tables against null fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from saeffect.diffing.naming import ALL, SEEN
from saeffect.diffing.standardised import prediction_limit
from saeffect.lm.tokens import printable_token
from saeffect.report.words.causes import what_it_causes
from saeffect.report.words.names import capital
from saeffect.report.words.numbers import count, fixed, is_defined, joined, p_value, percent, plural

__all__ = ["Learned", "claimed_groups", "learned"]

_BASES = {
    "read": "text that both read",
    "written": "text that they write",
    "expected": "words that they expect",
    "difference": "the mean activation difference",
}
_NAMED = 3  # groups in the headline
_LISTED = 6  # groups in the sentence below


@dataclass(frozen=True)
class Learned:
    """The answer to "what did fine-tuning change?": one sentence, "" without null fine-tunes; what changed, how sure,
    where, what it causes, what did not change, as far as known, a label and sentences each; and what the study lacks to
    say more.
    """

    headline: str
    parts: tuple[tuple[str, str], ...]
    missing: str


def claimed_groups(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The groups of `change_groups` that changed more than in null fine-tunes, first the clearest."""
    groups = tables.get("change_groups", pd.DataFrame())
    return groups[groups["claimed"].astype(bool)] if len(groups) else groups


def learned(tables: Mapping[str, pd.DataFrame], domain: str, *, alpha: float) -> Learned:
    """What may be said, from the tables of `diffing.naming.name_changes`, and `null_recipe` of the stage `changes`; any
    may be missing. `domain` is a name in `declared_changes`, `alpha` the highest p of a claim.
    """
    nulls = tables.get("null_groups", pd.DataFrame())
    if nulls.empty:
        return Learned("", (), _missing(tables))
    claimed = claimed_groups(tables)
    declared = _declared(tables, domain)
    k = len(nulls)
    of_domain = declared is not None and is_defined(declared["p"]) and declared["p"] <= alpha
    of_domain = of_domain and not _all_p(tables, domain) > alpha
    parts = {
        "What changed": " ".join(
            [_named(claimed, tables["change_groups"], k), *_perplexities(tables, alpha, beyond=True)]
        ),
        "How sure": " ".join(
            ([_domain(declared, domain, k), *_bases(tables, domain)] if declared is not None else [])
            + [_could_have(k, alpha), *_unlike_nulls(tables)]
        ),
        "Where": _where(tables, alpha),
        "What it causes": what_it_causes(tables["put_back"], domain) if "put_back" in tables else "",
        "What did not change": _unchanged(tables, nulls, alpha),
    }
    known = tuple((label, text) for label, text in parts.items() if text)
    against = (
        f"than in {count(k)} fine-tunes {'' if _unlike_nulls(tables) else 'of the same recipe '}that teach nothing new"
    )
    return Learned(_headline(claimed, declared if of_domain else None, domain, against), known, "")


def _declared(tables: Mapping[str, pd.DataFrame], domain: str) -> Mapping[Any, Any] | None:
    table = tables.get("declared_changes", pd.DataFrame())
    rows = table[(table["name"] == domain) & (table["basis"] == "combined")] if len(table) else table
    return rows.iloc[0].to_dict() if len(rows) else None


def _headline(claimed: pd.DataFrame, declared: Mapping[Any, Any] | None, domain: str, against: str) -> str:
    names = joined([_quoted(row) for row in claimed.head(_NAMED).to_dict("records")]) if len(claimed) else ""
    if declared is not None:
        verb = "taught the model" if declared["z"] > 0 else "took from the model"
        led = f", first of all those about {names}" if names else ""
        return (
            f"Fine-tuning {verb} the domain {domain}: its {plural(int(declared['n_features']), 'feature')} changed more"
            f" {against}{led}."
        )
    if names:
        return f"Fine-tuning changed features about {names}: they moved more {against}."
    return f"Nothing that can be named changed: no group of features clearly moved more {against}."


def _quoted(row: Mapping[Any, Any]) -> str:
    less = " (less)" if row["direction"] == "less" else ""
    return f"“{row['name']}”{less}"


def _named(claimed: pd.DataFrame, groups: pd.DataFrame, k: int) -> str:
    if claimed.empty:
        best = groups.iloc[0]
        return (
            f"The group that moved most, {_quoted(best.to_dict())}, is not clearly beyond what null fine-tunes reach"
            f" (p = {p_value(best['p'])}, over {plural(k, 'null')})."
        )
    listed = [
        f"{_quoted(row)}, {plural(int(row['n_features']), 'feature')}, p {_p(row['p'])}"
        for row in claimed.head(_LISTED).to_dict("records")
    ]
    more = f" and {count(len(claimed) - _LISTED)} more" if len(claimed) > _LISTED else ""
    share = float(claimed["share"].sum())
    holds = f" Together they hold {percent(share)} of all change of mean activation." if is_defined(share) else ""
    return f"Groups of features that changed beyond all nulls: {'; '.join(listed)}{more}.{holds}"


def _p(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _domain(row: Mapping[Any, Any], domain: str, k: int) -> str:
    if not is_defined(row["p"]):
        return f"The domain {domain} as a whole cannot be judged: {row['reason']}."
    size, low, high = (f"{row[name]:+.2f}".replace("-", "−") for name in ("z", "null_low", "null_high"))
    return (
        f"The {plural(int(row['n_features']), 'feature')} of the domain {domain}, chosen by the vocabulary beforehand,"
        f" changed by {size} on average, in units of what a null does to a feature (nulls: {low} to {high};"
        f" p {_p(row['p'])}, {plural(k, 'null')})."
    )


def _vocabulary(tables: Mapping[str, pd.DataFrame], domain: str) -> pd.DataFrame:
    """What each basis says of the domain, by basis."""
    table = tables.get("evidence", pd.DataFrame(columns=["kind", "name", "basis", "p", "agrees", "reason"]))
    return table[(table["kind"] == "vocabulary") & (table["name"] == domain)].set_index("basis")


def _all_p(tables: Mapping[str, pd.DataFrame], domain: str) -> float:
    rows = _vocabulary(tables, domain)
    return float(rows.loc[ALL, "p"]) if ALL in rows.index else math.nan


def _bases(tables: Mapping[str, pd.DataFrame], domain: str) -> list[str]:
    """Which bases show by themselves that the domain changed, and what other SAEs say."""
    rows = _vocabulary(tables, domain)
    own = rows[rows.index.isin(_BASES) & rows["p"].notna()]
    if own.empty:
        return []
    agree, others = ([_BASES[name] for name in own.index[own["agrees"] == which]] for which in (True, False))
    shown = f": {joined(agree)}" if agree else ""
    not_shown = f"; not {joined(others)}" if agree and others else ""
    verb = "shows" if len(agree) == 1 else "show"
    said = [f"Of {count(len(own))} bases {count(len(agree))} {verb} this alone{shown}{not_shown}."]
    further = rows[rows.index.str.startswith("difference in ")]
    tested = further[further["p"].notna()]
    if len(tested):
        n = int(tested["agrees"].sum())
        said.append(
            f"The mean activation difference shows it in {count(n)} of {plural(len(tested), 'further SAE')} of the base"
            f" model; with {'it' if len(tested) == 1 else 'them'}, p {_p(_all_p(tables, domain))}."
        )
    seen = [name.removeprefix("difference in ") for name in further.index[further["reason"] == SEEN]]
    if seen:
        said.append(
            f"Seen, not tested, since nulls have no such SAE: {joined(seen)}, trained with the fine-tuned model."
        )
    return said


def _could_have(k: int, alpha: float) -> str:
    return (
        f"Each p counts the search over all groups; at {alpha:g}, about one null fine-tune in {round(1 / alpha)} would"
        f" be claimed to have taught something. With {count(k)} nulls no count of nulls gives less than"
        f" {1 / (k + 1):.3f}; what is smaller rests on the nulls' scores being log-normal."
    )


def _unlike_nulls(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """How the nulls' recipe differs from the fine-tune's, in a sentence or two; nothing where it is the same."""
    recipe = tables.get("null_recipe", pd.DataFrame(columns=["setting", "tuned", "nulls", "differs"]))
    unlike = recipe[recipe["differs"].fillna(False).astype(bool)]
    unknown = recipe.loc[recipe["differs"].isna(), "setting"]
    said = []
    if len(unlike):
        listed = joined([f"{row.setting} is {row.nulls} instead of {row.tuned}" for row in unlike.itertuples()])
        said.append(
            f"The nulls were not trained quite as the fine-tune was: {listed}. Changes are divided by how far their"
            " fine-tune moved features as a whole, which makes up for a weaker training but not for one of another"
            " kind; nulls of the fine-tune's own recipe would decide it."
        )
    if len(unknown):
        names = "the recipe" if len(unknown) == len(recipe) else joined(list(unknown))
        said.append(f"Whether the nulls share {names} with the fine-tune is not recorded.")
    return said


def _where(tables: Mapping[str, pd.DataFrame], alpha: float) -> str:
    layers, words = (tables.get(name, pd.DataFrame()) for name in ("change_by_layer", "change_by_word"))
    if layers.empty or not layers["change"].notna().any():
        return ""
    by = "ratio" if layers["ratio"].notna().any() else "change"
    most = layers.loc[layers[by].idxmax()].to_dict()
    beside = ""
    if is_defined(most["null_low"]):
        beside = f" (nulls: {percent(most['null_low'])} to {percent(most['null_high'])})"
    said = [
        f"Farthest beyond the nulls at layer {count(most['layer'])}, where the residual stream moved by"
        f" {percent(most['change'])} of its length{beside}."
    ]
    rises = words[(words["role"] == "expected") & (words["change"] > 0)] if len(words) else words
    rises = rises[rises["p_search"] <= alpha] if len(rises) else rises
    if len(rises):
        said.append(f"Words expected more, beyond all nulls: {_list(rises['token'])}.")
    written = tables.get("written_words", pd.DataFrame())
    more = written[(written["change"] > 0) & (written["p_search"] <= alpha)] if len(written) else written
    if len(more):
        said.append(f"Words that come up after openings that name nothing: {_list(more['word'])}.")
    return " ".join(said)


def _list(words: pd.Series[Any]) -> str:
    shown = [printable_token(str(word)).strip() for word in words.head(8)]
    return ", ".join(f"“{word}”" for word in shown)


def _unchanged(tables: Mapping[str, pd.DataFrame], nulls: pd.DataFrame, alpha: float) -> str:
    limit = prediction_limit(nulls["highest"].to_numpy(dtype=np.float64), alpha)
    said = [
        f"A group would have been named had it changed {limit:.1f} times as much as nulls change such groups; of what"
        " changed less, nothing can be said."
    ]
    return " ".join([*said, *_perplexities(tables, alpha, beyond=False)])


def _perplexities(tables: Mapping[str, pd.DataFrame], alpha: float, *, beyond: bool) -> list[str]:
    """A sentence for each perplexity that moved beyond the nulls, or for each that did not."""
    said = []
    for row in tables.get("change_numbers", pd.DataFrame()).to_dict("records"):
        if row["name"] == "kl" or not is_defined(row["p"]):
            continue
        inside = row["null_low"] <= row["change"] <= row["null_high"]
        if beyond == (not inside and row["p"] <= alpha):
            verdict = "beyond what nulls do" if beyond else "within what nulls do" if inside else "like nulls"
            said.append(
                f"{capital(row['name'])}: {fixed(row['base'], 1)} before, {fixed(row['tuned'], 1)} after, {verdict}."
            )
    return said


def _missing(tables: Mapping[str, pd.DataFrame]) -> str:
    changes = tables.get("changes", pd.DataFrame())
    reasons: Sequence[str] = [str(r) for r in changes["reason"].unique() if r] if "reason" in changes else []
    if not len(changes):
        return ""
    return (
        "What fine-tuning taught cannot be named: there are no null fine-tunes of the same recipe to compare with"
        f"{f' ({reasons[0]})' if reasons else ''}."
    )
