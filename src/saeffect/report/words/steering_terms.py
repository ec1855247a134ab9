"""Terms of the section on steering, one line each."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["STEERING_MEANINGS"]

STEERING_MEANINGS: Mapping[str, tuple[str, str]] = {
    "forest": (
        "forest plot",
        "one row a feature: the mark is its effect, the line its 95 % interval, the dashed upright zero. "
        "A line that crosses zero is compatible with no effect.",
    ),
    "common_noise": (
        "common random numbers",
        "steered, placebo and unsteered texts of a pair draw their words with the same random numbers, so that what "
        "differs between them is the steering and not luck.",
    ),
    "matched": (
        "matched placebo",
        "another feature, not of the domain, that is most like this one in decoder norm, density and mean activation.",
    ),
    "random": (
        "random direction",
        "a direction drawn afresh for each text, {random_push}: what any push of that size does.",
    ),
    "shuffled": (
        "shuffled reference",
        "the same steered texts measured against another feature's top tokens: whether steering brings up this "
        "feature's concept or the domain at large.",
    ),
    "declared": (
        "declared",
        "named in the study file before anything was run; only the first declared outcome decides what passes.",
    ),
    "exploratory": (
        "exploratory",
        "measured too, but not declared in advance. With many outcomes some look real by luck: read these as hints "
        "for the next study.",
    ),
    "reversed": (
        "reversed share",
        "share of prompts on which the feature's mean effect goes the other way: 0 is the same sign on every prompt.",
    ),
    "keyword_score": ("keyword score", "share of a text's words that are among the feature's top tokens."),
    "off_list": (
        "off-list words",
        "share of a text's words that are in the {domain} vocabulary and none of the feature's own top tokens, so that "
        "repeating those proves nothing.",
    ),
    "perplexity": (
        "perplexity",
        "how surprised the unsteered model is by a text: 1 is no surprise; a jump means that the text reads badly. "
        "Its effects are differences of natural logarithms: +0.7 is twice the perplexity.",
    ),
    "distinct_2": (
        "distinct-2",
        "share of different pairs among neighbouring tokens: 100 % is no repetition, near 0 a loop.",
    ),
    "mean_difference": (
        "difference of means",
        "the mean activation where the feature fires minus that of general text: a vector that needs no SAE decoder.",
    ),
    "naming_prompt": (
        "prompt that names it",
        "the unsteered model continues “Talk about ‹top tokens›.” and then the prompt.",
    ),
    "together": ("steered at once", "several features in one text, {together}."),
    "gain": ("gain", "similarity of steered texts to the top tokens minus that of the same prompts unsteered."),
    "fluency": (
        "fluency",
        "1 where a steered text is as varied and as expected as the unsteered one, near 0 for loops and word salad.",
    ),
}
"""Name and meaning by key; `{domain}` and the like are filled in by `saeffect.report.words.glossary.terms`."""
