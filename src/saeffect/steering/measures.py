"""What is measured of an intervention, by name: where the numbers stand and which way they should move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from saeffect.errors import unknown_name

__all__ = ["OUTCOMES", "OutcomeMeasure", "outcome_named"]


@dataclass(frozen=True)
class OutcomeMeasure:
    """One outcome.

    Attributes:
        name: What study files and tables call it.
        column: Where its numbers stand.
        table: "trials", one number a text; or "direct", one a prompt, relative to the unsteered model.
        alternative: "greater": steering with a feature should raise it, and the test is one-sided. "less": it
            should fall, see `under`. "two-sided": a side effect, which may go either way.
        unit: Of effects.
        title: In words.
        logarithm: Whether effects are of the natural logarithm: ratios of perplexities, whose plain mean
            would be that of the worst texts.
        operator: Under which operator it is tested, see `under`.
    """

    name: str
    column: str
    table: Literal["trials", "direct"]
    alternative: Literal["greater", "less", "two-sided"]
    unit: str
    title: str
    logarithm: bool = False
    operator: str = "add"

    def under(self, operator: str) -> OutcomeMeasure:
        """The same under an operator: an ablation takes the concept away, so what should rise should fall.

        Example:
            >>> outcome_named("similarity").under("ablate").alternative
            'less'
        """
        turned = operator == "ablate" and self.alternative == "greater"
        return replace(self, alternative="less" if turned else self.alternative, operator=operator)


OUTCOMES = {
    measure.name: measure
    for measure in (
        OutcomeMeasure(
            "similarity", "similarity", "trials", "greater", "cosine", "similarity of the text to the top tokens"
        ),
        OutcomeMeasure(
            "keyword_score", "keyword_score", "trials", "greater", "share of words", "top tokens among the text's words"
        ),
        OutcomeMeasure(
            "off_list",
            "off_list",
            "trials",
            "greater",
            "share of words",
            "words of the domain that are none of the feature's top tokens",
        ),
        OutcomeMeasure(
            "direct_effect",
            "delta_logprob",
            "direct",
            "greater",
            "nats",
            "log-probability of the top tokens as the next token",
        ),
        OutcomeMeasure("kl", "kl", "direct", "two-sided", "nats", "how far the next token's distribution moved"),
        OutcomeMeasure(
            "perplexity",
            "perplexity",
            "trials",
            "two-sided",
            "nats a token",
            "logarithm of the text's perplexity under the unsteered model",
            logarithm=True,
        ),
        OutcomeMeasure(
            "distinct2", "distinct2", "trials", "two-sided", "share of pairs", "different pairs of neighbouring tokens"
        ),
    )
}
"""Every outcome by name, the first being the usual primary one."""


def outcome_named(name: str) -> OutcomeMeasure:
    """The outcome of a name.

    Raises:
        UnknownName: There is none.

    Example:
        >>> outcome_named("off_list").unit
        'share of words'
    """
    if name not in OUTCOMES:
        raise unknown_name("outcome", name, OUTCOMES, at="outcomes")
    return OUTCOMES[name]
