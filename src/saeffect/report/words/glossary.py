"""Statistical and technical terms, one line each; the report explains each where it first appears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from saeffect.report.context import ReportContext
from saeffect.report.words.evidence_terms import EVIDENCE_MEANINGS
from saeffect.report.words.numerals import percent
from saeffect.report.words.outcome_words import dose_meaning, operator_words, outcome_words
from saeffect.report.words.steering_terms import STEERING_MEANINGS

__all__ = ["Explainer", "Term", "terms"]


_MEANINGS: Mapping[str, tuple[str, str]] = {
    "feature": ("feature", "one unit of a sparse autoencoder (SAE), a direction inside the model."),
    "top_tokens": (
        "top tokens",
        "the {k} vocabulary tokens whose output the feature raises most; the number beside a token is its weight.",
    ),
    "domain_feature": (
        "domain feature",
        "a feature with at least {least} of its {k} top tokens in the {domain} vocabulary, "
        "unless people's verdicts say no.",
    ),
    "interval": (
        "95 % interval",
        "in square brackets; the range of true values that the data are compatible with. A narrow one means sure.",
    ),
    "placebo_arm": (
        "placebo arm",
        "the control model with an SAE trained from another seed. It was not fine-tuned, so what it shows "
        "against control is SAE noise.",
    ),
    "sae_noise": ("SAE noise", "what changes merely because an SAE is trained again."),
    "verdict": (
        "reading",
        "“more than SAE noise”: where both models have several SAEs, they differ by more than SAEs of one model do "
        "(p ≤ 0.05 over SAEs). With one SAE of the fine-tuned model, the intervals of treatment "
        "− control and treatment − placebo exclude zero on the same side, and it lies outside of where one more SAE of "
        "the control model is to be expected. Corrected for the number of declared quantities (Holm).",
    ),
    "pp": ("pp", "percentage points: the plain difference of two percentages."),
    "similarity": (
        "similarity",
        "cosine between the meaning of a generated text and that of the feature's top tokens; 1 is the same.",
    ),
    "effect": (
        "effect",
        "{outcome} of steered texts minus that of {placebo_texts}: a feature of another subject that fires as often "
        "and as strongly, or a random direction; same prompts, same sampling noise.",
    ),
    "pass": (
        "pass",
        "steering with the feature {raises} {outcome} more than its placebo does, at q ≤ {alpha:g}: of the features "
        "that pass, at most {percent} do so by luck (one-sided sign-flip test over prompts).",
    ),
    "paper_rule": (
        "paper's rule",
        "one steered sample scores {above} one unsteered sample; half of all features pass it by luck.",
    ),
    "p": ("p", "how often chance alone would give a difference at least as large."),
    "q": (
        "q",
        "p corrected for testing many features (Benjamini–Hochberg): of those with q ≤ {alpha:g} about {percent} are "
        "false.",
    ),
    "coherence": (
        "coherence",
        "weighted mean cosine between the word vectors of a feature's top tokens; 1 when all mean the same. "
        "Undefined, never 0, where fewer than two are known words.",
    ),
    "normalised": (
        "normalised difference",
        "difference of the means divided by the mean of the two ranges, as in the paper.",
    ),
    "cliffs_delta": (
        "Cliff's delta",
        "how often a feature of one arm exceeds one of the other, minus the reverse; 0: none, ±1: complete.",
    ),
    "coverage": ("coverage", "share of top tokens that the word vectors know."),
    "density": ("density", "share of tokens on which the feature fires."),
    "activation": (
        "activation",
        "how strongly the feature fires on a token, in units of the SAE's input.",
    ),
    "direct_effect": (
        "direct effect",
        "change of the top tokens' log-probability at the next position; needs no sampling (nats).",
    ),
    "kl": ("KL", "how far steering moved the whole next-token distribution (nats); 0 is not at all."),
    "dose": ("dose", "{dose}"),
    "dose_score": (
        "score",
        "gain × fluency, averaged over texts, where a loss counts whole; it is highest where steering works and the "
        "text still reads well.",
    ),
    "explained_variance": (
        "explained variance",
        "share of the activations' variance that the SAE reproduces, here on the study's text; 1: all.",
    ),
    "ce_loss_score": (
        "CE loss score",
        "share of the model's predictive power that is left when the SAE's output replaces its input; 1: all.",
    ),
    "l0": ("L0", "mean number of features that fire on a token."),
    "dead": ("dead features", "features that never fired on the text."),
    "dot_cosine": (
        "dot, cosine",
        "two scales of a token's weight. Dot product is the paper's; cosine divides by the token's norm, so "
        "that rare tokens with long vectors do not crowd every list.",
    ),
}


@dataclass(frozen=True)
class Term:
    """A term and what it means."""

    name: str
    meaning: str


def terms(context: ReportContext) -> Mapping[str, Term]:
    """Every term of the report, by key, with the study's own settings filled in."""
    settings = {
        "k": context.top_k,
        "least": context.min_matches,
        "alpha": context.alpha,
        "domain": context.domain,
        "percent": percent(context.alpha, 0),
        "outcome": outcome_words(context.steering.deciding if context.steering else "similarity").title,
        "dose": dose_meaning(context.steering),
        **operator_words(context.steering),
    }
    every = {**_MEANINGS, **STEERING_MEANINGS, **EVIDENCE_MEANINGS}
    return {key: Term(name, meaning.format(**settings)) for key, (name, meaning) in every.items()}


@dataclass
class Explainer:
    """Hands out each term's meaning once, at its first use."""

    known: Mapping[str, Term]
    explained: set[str] = field(default_factory=set)

    def first(self, keys: Iterable[str]) -> tuple[Term, ...]:
        """The terms among `keys` that have not been explained yet.

        Example:
            >>> explain = Explainer(terms(ReportContext()))
            >>> [len(explain.first(["p", "q"])), len(explain.first(["q", "pp"]))]
            [2, 1]
        """
        fresh = [key for key in keys if key not in self.explained]
        self.explained.update(fresh)
        return tuple(self.known[key] for key in fresh)
