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
from saeffect.diffing.written import clearly_more
from saeffect.lm.tokens import printable_token
from saeffect.report.words.causes import what_a_push_writes, what_it_causes
from saeffect.report.words.numbers import amount, count, fixed, is_defined, joined, p_text, percent, plural

__all__ = ["Learned", "claimed_groups", "learned"]

_BASES = {
    "read": "text that both read",
    "written": "text that they write",
    "expected": "words that they expect",
    "difference": "the mean activation difference",
}
_MAX_IN_HEADLINE = 3  # groups in the headline
_MAX_IN_SENTENCE = 6  # groups in the sentence below
_CARRY = (
    "Features carry what is undone by setting them back to the base model's values; matched ones are others that fire"
    " as often and as strongly."
)
_SCALED = (
    "Changes are divided by how far their fine-tune moved features as a whole, which makes up for a weaker training of"
    " the nulls but not for one of another kind."
)


@dataclass(frozen=True)
class Learned:
    """The answer to "what did fine-tuning change?".

    `headline`: one or two sentences, "" without null fine-tunes. `parts`: label and sentences of what changed, how
    sure, where, what it causes, and what did not change, as far as known (without nulls: where, and what it causes).
    `notes`: further numbers, and how it was judged. `missing`: what the study lacks to say more.
    """

    headline: str
    parts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
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
    where, causes, difference = _where(tables, alpha), _causes(tables, domain, alpha), _mean_difference(tables)
    if nulls.empty:
        known = tuple((label, text) for label, text in (("Where", where), ("What it causes", causes)) if text)
        return Learned("", known, difference, _missing_sentence(tables))
    claimed = claimed_groups(tables)
    declared = _domain_change(tables, domain)
    k = len(nulls)
    domain_changed = (
        declared is not None
        and is_defined(declared["p"])
        and declared["p"] <= alpha
        and not _p_of_all_bases(tables, domain) > alpha
        and not _is_within(declared, "z")  # with many nulls p may be small though one of them moved as far
    )
    unlike = _unlike_nulls(tables)
    parts = {
        "What changed": " ".join(
            [
                _group_words(claimed, tables["change_groups"], k, alpha),
                *_predictions(tables, domain, alpha, beyond=True),
            ]
        ),
        "How sure": " ".join(
            ([_domain_words(declared, domain, k), *_basis_words(tables, domain)] if declared is not None else [])
            + [_false_claims(alpha), *unlike]
        ),
        "Where": where,
        "What it causes": causes,
        "What did not change": " ".join(
            [
                _unnamed(nulls, alpha, any_claimed=len(claimed) > 0),
                *_predictions(tables, domain, alpha, beyond=False),
            ]
        ),
    }
    present = tuple((label, text) for label, text in parts.items() if text)
    against = f"than in {count(k)} fine-tunes {'' if unlike else 'of the same recipe '}that teach nothing new"
    headline = _headline(claimed, declared if domain_changed else None, domain, against)
    notes = (*difference, *_further_sae_words(tables, domain), _resolution(k), *([_SCALED] if unlike else []))
    return Learned(headline, present, notes, "")


def _domain_change(tables: Mapping[str, pd.DataFrame], domain: str) -> Mapping[Any, Any] | None:
    table = tables.get("declared_changes", pd.DataFrame())
    rows = table[(table["name"] == domain) & (table["basis"] == "combined")] if len(table) else table
    return rows.iloc[0].to_dict() if len(rows) else None


def _headline(claimed: pd.DataFrame, change: Mapping[Any, Any] | None, domain: str, against: str) -> str:
    names = joined([_quoted(row) for row in claimed.head(_MAX_IN_HEADLINE).to_dict("records")]) if len(claimed) else ""
    if change is not None:
        examples = f" The groups of features that changed most: {names}." if names else ""
        features = f"its {plural(int(change['n_features']), 'feature')}"
        if change["z"] > 0:
            return f"Fine-tuning taught the model the domain {domain}: {features} changed more {against}.{examples}"
        return f"Fine-tuning left the domain {domain} weaker: {features} are less active {against}.{examples}"
    if names:
        return f"Fine-tuning changed features about {names}: they moved more {against}."
    return f"Nothing that can be named changed: no group of features clearly moved more {against}."


def _quoted(row: Mapping[Any, Any]) -> str:
    less = " (less)" if row["direction"] == "less" else ""
    return f"“{row['name']}”{less}"


def _group_words(claimed: pd.DataFrame, groups: pd.DataFrame, n_nulls: int, alpha: float) -> str:
    if claimed.empty:
        top = groups.iloc[0]
        return (
            f"The group that moved most, {_quoted(top.to_dict())}, is not clearly beyond what null fine-tunes reach"
            f" ({p_text(top['p'])}, over {plural(n_nulls, 'null')})."
        )
    items = [_quoted(row) for row in claimed.head(_MAX_IN_SENTENCE).to_dict("records")]
    if len(claimed) > _MAX_IN_SENTENCE:
        items.append(f"{count(len(claimed) - _MAX_IN_SENTENCE)} more ([[table:learned]])")
    share = float(claimed["share"].sum())
    total = f" They hold {percent(share)} of all change in how strongly features fire." if is_defined(share) else ""
    return (
        f"{plural(len(claimed), 'group')} of features changed clearly more than groups do in nulls"
        f" (p at most {alpha:g}): {joined(items)}.{total}"
    )


def _domain_words(row: Mapping[Any, Any], domain: str, n_nulls: int) -> str:
    if not is_defined(row["p"]):
        return f"The domain {domain} as a whole cannot be judged: {row['reason']}."
    size, low, high = (f"{row[name]:+.2f}".replace("-", "−") for name in ("z", "null_low", "null_high"))
    return (
        f"The {plural(int(row['n_features']), 'feature')} of the domain {domain}, chosen by its vocabulary beforehand,"
        f" changed by {size} on average; in {plural(n_nulls, 'null')} it is {low} to {high} ({p_text(row['p'])};"
        " 1 is what nulls typically do to one feature)."
    )


def _domain_evidence(tables: Mapping[str, pd.DataFrame], domain: str) -> pd.DataFrame:
    """The evidence on the domain, by basis."""
    table = tables.get("evidence", pd.DataFrame(columns=["kind", "name", "basis", "p", "agrees", "reason"]))
    return table[(table["kind"] == "vocabulary") & (table["name"] == domain)].set_index("basis")


def _p_of_all_bases(tables: Mapping[str, pd.DataFrame], domain: str) -> float:
    rows = _domain_evidence(tables, domain)
    return float(rows.loc[ALL, "p"]) if ALL in rows.index else math.nan


def _basis_words(tables: Mapping[str, pd.DataFrame], domain: str) -> list[str]:
    """Which kinds of evidence show a change of the domain alone."""
    rows = _domain_evidence(tables, domain)
    own = rows[rows.index.isin(_BASES) & rows["p"].notna()]
    if own.empty:
        return []
    agree, disagree = ([_BASES[name] for name in own.index[own["agrees"] == flag]] for flag in (True, False))
    shown = f": {joined(agree)}" if agree else ""
    others = f"; not {joined(disagree)}" if agree and disagree else ""
    verb = "shows" if len(agree) == 1 else "show"
    return [f"Of {count(len(own))} kinds of evidence {count(len(agree))} {verb} this alone{shown}{others}."]


def _further_sae_words(tables: Mapping[str, pd.DataFrame], domain: str) -> list[str]:
    """What other SAEs show of the domain."""
    rows, sentences = _domain_evidence(tables, domain), []
    further = rows[rows.index.str.startswith("difference in ")]
    tested = further[further["p"].notna()]
    if len(tested):
        n = int(tested["agrees"].sum())
        sentences.append(
            f"The mean activation difference shows it in {count(n)} of {plural(len(tested), 'further SAE')} of the base"
            f" model; with {'it' if len(tested) == 1 else 'them'}, {p_text(_p_of_all_bases(tables, domain))}."
        )
    untested = [name.removeprefix("difference in ") for name in further.index[further["reason"] == SEEN]]
    if untested:
        sentences.append(
            f"Seen, not tested, since nulls have no such SAE: {joined(untested)}, trained with the fine-tuned model."
        )
    return sentences


def _false_claims(alpha: float) -> str:
    return f"Of fine-tunes that teach nothing, about one in {round(1 / alpha)} would be said to teach something."


def _resolution(n_nulls: int) -> str:
    return (
        f"Each p of a group counts the search over all groups. With {plural(n_nulls, 'null')} no count of nulls gives"
        f" less than {1 / (n_nulls + 1):.3f}; what is smaller rests on the nulls' scores being log-normal."
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
            f"The nulls were not quite trained as the fine-tune was ({listed}); nulls of its recipe would settle it."
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
    beyond = layers[layers["change"] > layers["null_high"]]
    with np.errstate(divide="ignore"):  # a layer that no null moves is infinitely far beyond them
        farthest = layers[column] if beyond.empty else beyond["change"] / beyond["null_high"]
    most = layers.loc[farthest.idxmax()].to_dict()
    place, nulls = "changed most", ""
    if is_defined(most["null_low"]):
        place = "changed most, compared with the nulls" if beyond.empty else "is farthest beyond the nulls"
        within = ", and no layer moved farther than in nulls" if beyond.empty else ""
        nulls = f" (nulls: {percent(most['null_low'])} to {percent(most['null_high'])}){within}"
    sentences = [
        f"Of {plural(len(layers), 'layer')}, layer {count(most['layer'])} {place}: what it hands on"
        f" moved by {percent(most['change'])} of its length{nulls}."
    ]
    expected = clearly_more(words[words["role"] == "expected"], alpha) if len(words) else words
    if len(expected):
        sentences.append(f"Words it expects clearly more than nulls do: {_quoted_words(expected['token'])}.")
    written = tables.get("written_words", pd.DataFrame())
    more_written = clearly_more(written, alpha) if len(written) else written
    if len(more_written):
        sentences.append(f"Words it writes more, given no subject: {_quoted_words(more_written['word'])}.")
    return " ".join(sentences)


def _causes(tables: Mapping[str, pd.DataFrame], domain: str, alpha: float) -> str:
    carried = what_it_causes(tables["put_back"], domain) if "put_back" in tables else ""
    pushed = what_a_push_writes(tables["difference_words"], alpha) if "difference_words" in tables else ""
    pushed += " The texts are in [[table:pushed]]." if pushed else ""
    return " ".join(filter(None, (carried, _CARRY if carried else "", pushed)))


def _mean_difference(tables: Mapping[str, pd.DataFrame]) -> tuple[str, ...]:
    """The mean activation difference over all positions and its top tokens, in a sentence; () if it has none. Over text
    that is not of the domain, if that is half of the text.
    """
    table = tables.get("activation_difference", pd.DataFrame())
    if table.empty:
        return ()
    unrelated = table[~table["text"].isin(["", "domain"])]
    row = (unrelated if len(unrelated) == 1 else table).iloc[0].to_dict()
    tokens = row["beyond_nulls"] if len(row["beyond_nulls"]) else row["top_tokens"]
    words = pd.Series([token for token in tokens if any(map(str.isalpha, token))], dtype="object")
    if words.empty:
        return ()
    nulls = f"nulls: {percent(row['null_size'])}; " if is_defined(row["null_size"]) else ""
    halves = "that over text of the domain" if row["text"] else "two halves of the text"
    cosine = f"cosine {'with' if row['text'] else 'between'} {halves}: {fixed(table['reliability'].iloc[0], 2)}"
    where = f"{row['text']} text" if row["text"] else "the text"
    return (
        f"On average over {where}, activations at the hook move by {percent(row['size'])} of their length ({nulls}"
        f"{cosine}), towards {_quoted_words(words)}.",
    )


def _quoted_words(words: pd.Series[Any]) -> str:
    visible = dict.fromkeys(printable_token(str(word)).strip() for word in words)
    return ", ".join(f"“{word}”" for word in list(visible)[:8])


def _unnamed(nulls: pd.DataFrame, alpha: float, *, any_claimed: bool) -> str:
    limit = prediction_limit(nulls["highest"].to_numpy(dtype=np.float64), alpha)
    return (
        f"No {'other ' if any_claimed else ''}group of features changed clearly more than in nulls. Any that changed"
        f" {limit:.1f} times as much as nulls change such groups would have been named; of smaller changes nothing can"
        " be said."
    )


def _predictions(tables: Mapping[str, pd.DataFrame], domain: str, alpha: float, *, beyond: bool) -> list[str]:
    """What moved beyond the nulls, or (not `beyond`) did not, in a sentence each: KL, perplexity by source of text."""
    rows = [row for row in tables.get("change_numbers", pd.DataFrame()).to_dict("records") if is_defined(row["p"])]
    rows = [row for row in rows if beyond == (row["p"] <= alpha and not _is_within(row))]
    by_source = [row for row in rows if row["name"].startswith("perplexity ")]
    sentences = [f"Predictions on the text differ by {_kl_words(row)}." for row in rows if row["name"] == "kl"]
    if by_source:
        verb = (
            ", the number of words that it wavers between, goes" if beyond else " does not move clearly beyond nulls:"
        )
        sentences.append(f"Perplexity{verb} {joined([_perplexity_words(row, domain) for row in by_source])}.")
    return sentences


def _is_within(row: Mapping[Any, Any], column: str = "change") -> bool:
    return bool(row["null_low"] <= row[column] <= row["null_high"])


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
