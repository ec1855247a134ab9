"""Terms of the evidence: chance, power, fates, regression. One line each."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["EVIDENCE_MEANINGS"]

EVIDENCE_MEANINGS: Mapping[str, tuple[str, str]] = {
    "false_alarm": ("false alarm", "a finding where there is nothing to find."),
    "calibration": (
        "calibration",
        "trying a test where there is nothing to find, to see whether it raises more false alarms than it promises.",
    ),
    "nominal": ("nominal rate", "the share of false alarms that a test promises not to exceed; mostly 5 %."),
    "stand_in": (
        "stand-in",
        "an SAE of the control's own model put in the treatment's place; nothing was fine-tuned, so nothing is there "
        "to find.",
    ),
    "wilson": ("Wilson interval", "a 95 % interval for a share that also holds for few cases and shares near 0 or 1."),
    "newcombe": ("Newcombe interval", "a 95 % interval for the difference of two shares, from their Wilson intervals."),
    "prediction": (
        "by chance",
        "the range in square brackets is where such a number falls in 95 % of cases if only chance is at work.",
    ),
    "power": (
        "power",
        "how often a study of this size would find a difference of a given size; the table is for 80 %.",
    ),
    "bootstrap": ("bootstrap", "drawing the data again from themselves, many times, to see how far a number varies."),
    "hierarchical": (
        "hierarchical bootstrap",
        "a bootstrap that draws SAEs first, then their features, then prompts, so that the interval holds the noise "
        "of SAE training.",
    ),
    "did": (
        "difference-in-differences",
        "what changed from control to treatment beyond what changed from control to placebo.",
    ),
    "fisher": ("Fisher's exact test", "the p of a difference of two shares, exact for any number of cases."),
    "permutation": ("permutation test", "a p from swapping the labels of two groups, many times."),
    "counterpart": (
        "counterpart",
        "the feature of the other SAE that is most alike: by decoder cosine (what it writes) or by activation "
        "correlation (when it fires).",
    ),
    "fates": (
        "kept, moved, gone, new",
        "kept: the counterpart is as alike as between two seeds of one model; moved: less alike, but more than "
        "unrelated features are; gone: no counterpart; new: a feature of the treatment that matches nothing before.",
    ),
    "absorbed": (
        "absorbed",
        "a feature without a counterpart for which several others now speak: they fire where it fired, and their rows "
        "together point where its row pointed (its parents).",
    ),
    "mutual": (
        "mutual nearest neighbour",
        "two features of which each is the other's most alike; the column mutual of the fate tables.",
    ),
    "excess": (
        "excess",
        "how many more features have no counterpart than between two seeds of one model; only this can be credited to "
        "fine-tuning.",
    ),
    "called": ("called", "a single feature whose fate differs from what seeds show, with q at most {alpha:g}."),
    "activation_per_token": (
        "activation per token",
        "mean activation over all tokens of the text; 0 where the feature does not fire.",
    ),
    "paired": (
        "paired",
        "the same SAE and the same tokens in both models, so that neither seeds nor text can cause a difference.",
    ),
    "rotation": (
        "turned",
        "the angle between a feature's decoder row before and after training on from the control's SAE.",
    ),
    "regression": (
        "regression",
        "the effect as a sum of parts, one a property, each with all other properties held equal.",
    ),
    "cluster_robust": (
        "cluster-robust errors",
        "intervals that allow for features of one SAE being alike; they need more SAEs than terms.",
    ),
    "hc3": ("HC3 errors", "intervals that hold also where the scatter is not the same everywhere."),
    "partial_residual": (
        "partial residual",
        "what is left of a feature's effect when the parts of all other properties are taken away.",
    ),
}
"""By key: the term, and what it means; `{alpha}` and the like are filled in from the study."""
