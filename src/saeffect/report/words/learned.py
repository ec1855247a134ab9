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
from saeffect.report.words.numbers import amount, count, fixed, is_defined, joined, p_value, percent, plural

__all__ = ["Learned", "claimed_groups", "learned"]

_BASES = {
    "read": "text that both read",
    "written": "text that they write",
    "expected": "words that they expect",
    "difference": "the mean activation difference",
}
_MAX_IN_HEADLINE = 3  # groups in the headline
_MAX_IN_SENTENCE = 6  # groups in the sentence below


@dataclass(frozen=True)
class Learned:
    """The answer to "what did fine-tuning change?".

    `headline`: one sentence, "" without null fine-tunes. `parts`: label and sentences of what changed, how sure, where,
    what it causes, and what did not change, as far as known (without nulls: where, and what it causes). `missing`: what
    the study lacks to say more.
    """

    headline: str
    parts: tuple[tuple[str, str], ...]
    missing: str


def claimed_groups(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The groups of `change_groups` that changed more than in null fine-tunes, the clearest first."""
    groups = tables.get("change_groups", pd.DataFrame())
    return groups[groups["claimed"].astype(bool)] if len(groups) else groups


def learned(tables: Mapping[str, pd.DataFrame], domain: str, *, alpha: float) -> Learned:
    """The answer, from the tables of `diffing.naming.name_changes` and `null_recipe` of the stage `changes`; any may be
    missing. `domain` is a name in `declared_changes`, `alpha` the highest p of a claim.
    """
    nulls = tables.get("null_groups", pd.DataFrame())
    causes = what_it_causes(tables["put_back"], domain) if "put_back" in tables else ""
    if nulls.empty:
        parts = {"Where": _where(tables, alpha), "What it causes": causes}
        return Learned("", tuple(part for part in parts.items() if part[1]), _missing_sentence(tables))
    claimed = claimed_groups(tables)
    declared = _domain_change(tables, domain)
    k = len(nulls)
    domain_changed = declared is not None and is_defined(declared["p"]) and declared["p"] <= alpha
    domain_changed = domain_changed and not _p_of_all_bases(tables, domain) > alpha
    parts = {
        "What changed": " ".join(
            [_group_words(claimed, tables["change_groups"], k), *_predictions(tables, domain, alpha, beyond=True)]
        ),
        "How sure": " ".join(
            ([_domain_words(declared, domain, k), *_basis_words(tables, domain)] if declared is not None else [])
            + [_resolution(k, alpha), *_unlike_nulls(tables)]
        ),
        "Where": _where(tables, alpha),
        "What it causes": causes,
        "What did not change": _unchanged(tables, nulls, domain, alpha),
    }
    present = tuple((label, text) for label, text in parts.items() if text)
    against = (
        f"than in {count(k)} fine-tunes {'' if _unlike_nulls(tables) else 'of the same recipe '}that teach nothing new"
    )
    return Learned(_headline(claimed, declared if domain_changed else None, domain, against), present, "")


def _domain_change(tables: Mapping[str, pd.DataFrame], domain: str) -> Mapping[Any, Any] | None:
    table = tables.get("declared_changes", pd.DataFrame())
    rows = table[(table["name"] == domain) & (table["basis"] == "combined")] if len(table) else table
    return rows.iloc[0].to_dict() if len(rows) else None


def _headline(claimed: pd.DataFrame, change: Mapping[Any, Any] | None, domain: str, against: str) -> str:
    names = joined([_quoted(row) for row in claimed.head(_MAX_IN_HEADLINE).to_dict("records")]) if len(claimed) else ""
    if change is not None:
        verb = "taught the model" if change["z"] > 0 else "took from the model"
        examples = f", first of all those about {names}" if names else ""
        return (
            f"Fine-tuning {verb} the domain {domain}: its {plural(int(change['n_features']), 'feature')} changed more"
            f" {against}{examples}."
        )
    if names:
        return f"Fine-tuning changed features about {names}: they moved more {against}."
    return f"Nothing that can be named changed: no group of features clearly moved more {against}."


def _quoted(row: Mapping[Any, Any]) -> str:
    less = " (less)" if row["direction"] == "less" else ""
    return f"“{row['name']}”{less}"


def _group_words(claimed: pd.DataFrame, groups: pd.DataFrame, n_nulls: int) -> str:
    if claimed.empty:
        top = groups.iloc[0]
        return (
            f"The group that moved most, {_quoted(top.to_dict())}, is not clearly beyond what null fine-tunes reach"
            f" (p = {p_value(top['p'])}, over {plural(n_nulls, 'null')})."
        )
    shown = claimed.head(_MAX_IN_SENTENCE).to_dict("records")
    p = [f"p {_p_text(row['p'])}" for row in shown]
    same = f", each with {p[0]}" if len(shown) > 1 and len(set(p)) == 1 else ""
    sizes = [f"{_quoted(row)}, {plural(int(row['n_features']), 'feature')}" for row in shown]
    items = sizes if same else [f"{size}, {value}" for size, value in zip(sizes, p, strict=True)]
    more = f" and {count(len(claimed) - _MAX_IN_SENTENCE)} more" if len(claimed) > _MAX_IN_SENTENCE else ""
    share = float(claimed["share"].sum())
    total = f" Together they hold {percent(share)} of all change of mean activation." if is_defined(share) else ""
    return f"Groups of features that changed beyond all nulls{same}: {'; '.join(items)}{more}.{total}"


def _p_text(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _domain_words(row: Mapping[Any, Any], domain: str, n_nulls: int) -> str:
    if not is_defined(row["p"]):
        return f"The domain {domain} as a whole cannot be judged: {row['reason']}."
    size, low, high = (f"{row[name]:+.2f}".replace("-", "−") for name in ("z", "null_low", "null_high"))
    return (
        f"The {plural(int(row['n_features']), 'feature')} of the domain {domain}, chosen by the vocabulary beforehand,"
        f" changed by {size} on average, in units of what a null does to a feature (nulls: {low} to {high};"
        f" p {_p_text(row['p'])}, {plural(n_nulls, 'null')})."
    )


def _domain_evidence(tables: Mapping[str, pd.DataFrame], domain: str) -> pd.DataFrame:
    """The evidence on the domain, by basis."""
    table = tables.get("evidence", pd.DataFrame(columns=["kind", "name", "basis", "p", "agrees", "reason"]))
    return table[(table["kind"] == "vocabulary") & (table["name"] == domain)].set_index("basis")


def _p_of_all_bases(tables: Mapping[str, pd.DataFrame], domain: str) -> float:
    rows = _domain_evidence(tables, domain)
    return float(rows.loc[ALL, "p"]) if ALL in rows.index else math.nan


def _basis_words(tables: Mapping[str, pd.DataFrame], domain: str) -> list[str]:
    """The bases that show a change of the domain alone, and the evidence of other SAEs."""
    rows = _domain_evidence(tables, domain)
    own = rows[rows.index.isin(_BASES) & rows["p"].notna()]
    if own.empty:
        return []
    agree, disagree = ([_BASES[name] for name in own.index[own["agrees"] == flag]] for flag in (True, False))
    shown = f": {joined(agree)}" if agree else ""
    others = f"; not {joined(disagree)}" if agree and disagree else ""
    verb = "shows" if len(agree) == 1 else "show"
    sentences = [f"Of {count(len(own))} bases {count(len(agree))} {verb} this alone{shown}{others}."]
    further = rows[rows.index.str.startswith("difference in ")]
    tested = further[further["p"].notna()]
    if len(tested):
        n = int(tested["agrees"].sum())
        sentences.append(
            f"The mean activation difference shows it in {count(n)} of {plural(len(tested), 'further SAE')} of the base"
            f" model; with {'it' if len(tested) == 1 else 'them'}, p {_p_text(_p_of_all_bases(tables, domain))}."
        )
    untested = [name.removeprefix("difference in ") for name in further.index[further["reason"] == SEEN]]
    if untested:
        sentences.append(
            f"Seen, not tested, since nulls have no such SAE: {joined(untested)}, trained with the fine-tuned model."
        )
    return sentences


def _resolution(n_nulls: int, alpha: float) -> str:
    return (
        f"Each p counts the search over all groups; at {alpha:g}, about one null fine-tune in {round(1 / alpha)} would"
        f" be claimed to have taught something. With {count(n_nulls)} nulls no count of nulls gives less than"
        f" {1 / (n_nulls + 1):.3f}; what is smaller rests on the nulls' scores being log-normal."
    )


def _unlike_nulls(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Differences between the recipes of nulls and fine-tune, in up to two sentences; [] if they are the same."""
    recipe = tables.get("null_recipe", pd.DataFrame(columns=["setting", "tuned", "nulls", "differs"]))
    different = recipe[recipe["differs"].fillna(False).astype(bool)]
    unknown = recipe.loc[recipe["differs"].isna(), "setting"]
    sentences = []
    if len(different):
        listed = joined([f"{row.setting} is {row.nulls} instead of {row.tuned}" for row in different.itertuples()])
        sentences.append(
            f"The nulls were not trained quite as the fine-tune was: {listed}. Changes are divided by how far their"
            " fine-tune moved features as a whole, which makes up for a weaker training but not for one of another"
            " kind; nulls of the fine-tune's own recipe would decide it."
        )
    if len(unknown):
        names = "the recipe" if len(unknown) == len(recipe) else joined(list(unknown))
        sentences.append(f"Whether the nulls share {names} with the fine-tune is not recorded.")
    return sentences


def _where(tables: Mapping[str, pd.DataFrame], alpha: float) -> str:
    layers, words = (tables.get(name, pd.DataFrame()) for name in ("change_by_layer", "change_by_word"))
    if layers.empty or not layers["change"].notna().any():
        return ""
    column = "ratio" if layers["ratio"].notna().any() else "change"
    most = layers.loc[layers[column].idxmax()].to_dict()
    beyond, nulls = "Farthest", ""
    if is_defined(most["null_low"]):
        beyond, nulls = (
            "Farthest beyond the nulls",
            f" (nulls: {percent(most['null_low'])} to {percent(most['null_high'])})",
        )
    sentences = [
        f"{beyond} at layer {count(most['layer'])}, where the residual stream moved by"
        f" {percent(most['change'])} of its length{nulls}.",
        *_mean_difference(tables),
    ]
    expected = words[(words["role"] == "expected") & (words["change"] > 0)] if len(words) else words
    expected = expected[expected["p_search"] <= alpha] if len(expected) else expected
    if len(expected):
        sentences.append(f"Words expected more, beyond all nulls: {_quoted_words(expected['token'])}.")
    written = tables.get("written_words", pd.DataFrame())
    more_written = written[(written["change"] > 0) & (written["p_search"] <= alpha)] if len(written) else written
    if len(more_written):
        sentences.append(f"Words that come up after openings that name nothing: {_quoted_words(more_written['word'])}.")
    return " ".join(sentences)


def _mean_difference(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The mean activation difference over all positions and its top tokens, in a sentence; [] if it has none."""
    table = tables.get("activation_difference", pd.DataFrame())
    if table.empty:
        return []
    row = table.iloc[0].to_dict()
    tokens = row["beyond_nulls"] if len(row["beyond_nulls"]) else row["top_tokens"]
    words = pd.Series([token for token in tokens if any(map(str.isalpha, token))], dtype="object")
    if words.empty:
        return []
    nulls = f"nulls: {percent(row['null_size'])}; " if is_defined(row["null_size"]) else ""
    return [
        f"On average over the text, activations at the hook move by {percent(row['size'])} of their length ({nulls}"
        f"cosine between two halves of the text: {fixed(row['reliability'], 2)}), towards {_quoted_words(words)}."
    ]


def _quoted_words(words: pd.Series[Any]) -> str:
    visible = dict.fromkeys(printable_token(str(word)).strip() for word in words)
    return ", ".join(f"“{word}”" for word in list(visible)[:8])


def _unchanged(tables: Mapping[str, pd.DataFrame], nulls: pd.DataFrame, domain: str, alpha: float) -> str:
    limit = prediction_limit(nulls["highest"].to_numpy(dtype=np.float64), alpha)
    sentence = (
        f"A group would have been named had it changed {limit:.1f} times as much as nulls change such groups; of what"
        " changed less, nothing can be said."
    )
    return " ".join([sentence, *_predictions(tables, domain, alpha, beyond=False)])


def _predictions(tables: Mapping[str, pd.DataFrame], domain: str, alpha: float, *, beyond: bool) -> list[str]:
    """What moved beyond the nulls, or (not `beyond`) did not, in a sentence each: KL, perplexity by source of text."""
    rows = [row for row in tables.get("change_numbers", pd.DataFrame()).to_dict("records") if is_defined(row["p"])]
    rows = [row for row in rows if beyond == (row["p"] <= alpha and not _is_within(row))]
    by_source = [row for row in rows if row["name"].startswith("perplexity ")]
    sentences = [f"Predictions on the text differ by {_kl_words(row)}." for row in rows if row["name"] == "kl"]
    if by_source:
        parts = joined([_perplexity_words(row, domain) for row in by_source])
        sentences.append(f"Perplexity {'goes' if beyond else 'does not move clearly beyond the nulls:'} {parts}.")
    return sentences


def _is_within(row: Mapping[Any, Any]) -> bool:
    return bool(row["null_low"] <= row["change"] <= row["null_high"])


def _kl_words(row: Mapping[Any, Any]) -> str:
    size, low, high = (fixed(math.exp(row[name]), 2) for name in ("change", "null_low", "null_high"))
    return f"{size} nats a token (KL; nulls: {low} to {high})"


def _perplexity_words(row: Mapping[Any, Any], domain: str) -> str:
    source = str(row["name"]).removeprefix("perplexity ")
    name = domain if source == "domain" else source
    changes = (math.expm1(row[column]) for column in ("change", "null_low", "null_high"))
    size, low, high = (amount(change, "share", sign=True) for change in changes)
    return f"from {fixed(row['base'], 1)} to {fixed(row['tuned'], 1)} on {name} text ({size}; nulls: {low} to {high})"


def _missing_sentence(tables: Mapping[str, pd.DataFrame]) -> str:
    changes = tables.get("changes", pd.DataFrame())
    reasons: Sequence[str] = [str(r) for r in changes["reason"].unique() if r] if "reason" in changes else []
    if not len(changes):
        return ""
    why = reasons[0] if reasons else "there are no null fine-tunes of the same recipe to compare with"
    return f"What fine-tuning taught cannot be named: {why}."
