"""How the arms differ besides the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

import pandas as pd

from saeffect.comparison.arms import ArmFacts, Roles, roles_of
from saeffect.errors import ConfigError

__all__ = ["design_check"]

_RESERVED = ("field", "differs", "status", "matters")

# Settings that should be equal in every arm, and what goes wrong when they are not.
_CONSEQUENCES = {
    "tokenizer": "all models read text as the control's cuts it, and a model with another one learnt from other pieces",
    "chat_template": "all models read chats in one template, and one that was tuned with another reads what it was not"
    " tuned on",
    "hook": "features of two places in a network do different work, so their counts are not comparable",
    "architecture": "each kind of SAE makes its own kind of features, so it may be the SAE that differs",
    "d_sae": "a wider SAE splits features, so counts and shares are not comparable",
    "k": "more active features per token make each one broader, which shifts coherence and density",
    "training_tokens": "an SAE trained for longer has sharper features, whatever the model",
    "training_text": "an SAE learns what its text shows, so another text gives other domain features",
    "training_text_sha256": "texts of one name with different content give different features",
    "bos": "many models are other, far worse ones without the token that they were trained to begin with",
    "normalisation": "activations on another scale change weights, doses and activations",
    "dtype": "another number format rounds weights differently; small, but not nothing",
}
_NEW_TEMPLATE = (
    "All models read chats in the one template that there is; a model without one never saw it, which is part of what"
    " fine-tuning taught."
)
_ONE_SAE = "One SAE reads both models: the features are the same, and what differs is how the models use them."
# Measured properties: the largest difference that does not matter, whether relative to the larger value, and why.
_MEASURED: dict[str, tuple[float, bool, str]] = {
    "explained_variance": (0.02, False, "an SAE that fits its model worse finds poorer features"),
    "ce_loss_score": (0.02, False, "an SAE that loses more of the model's behaviour tells less about the model"),
    "l0": (0.10, True, "more active features per token make each one broader"),
    "dead_share": (0.05, False, "features that never fire cannot be of the domain, which lowers shares"),
}


def design_check(arms: Mapping[str, ArmFacts]) -> pd.DataFrame:
    """List every recorded fact of the arms side by side, and say which differences matter.

    One row a field: `field`, one column of text per arm ("" where unknown), `differs`, `status`, and `matters`, one
    sentence ("" for "same"). The status is "same"; "intended" for a difference that the design requires; "flaw" for one
    that may pass for an effect of fine-tuning; "small" for measured values that differ too little to matter; "unknown"
    where an arm did not record it. `ConfigError` for other roles than one control and one treatment, or an arm with the
    name of a column.
    """
    roles = roles_of({name: facts.role for name, facts in arms.items()})
    reserved = [name for name in arms if name in _RESERVED]
    if reserved:
        raise ConfigError(f"an arm cannot be called {reserved[0]!r}.", at=f"arms.{reserved[0]}", fix="rename the arm.")
    rows = []
    for field in (fact.name for fact in fields(ArmFacts) if not fact.name.startswith("same_")):
        if field == "chat_template" and not any(facts.chat_template for facts in arms.values()):
            continue  # no chats
        values = {name: getattr(arms[name], field) for name in roles.ordered}
        same_model = field == "model" and arms[roles.treatment].same_as_control
        judged = values | {roles.treatment: values[roles.control]} if same_model else values
        status, matters = _judge(field, judged, roles)
        if field == "seed" and arms[roles.treatment].same_sae:
            status, matters = "intended", _ONE_SAE
        rows.append(
            {
                "field": field,
                **{name: _text(value) for name, value in values.items()},
                "differs": len({_text(value) for value in values.values()}) > 1,
                "status": status,
                "matters": matters,
            }
        )
    return pd.DataFrame(rows)


def _judge(field: str, values: Mapping[str, object], roles: Roles) -> tuple[str, str]:
    if field == "role":
        return "intended", "The roles say what each arm is for."
    if field in ("k", "tokenizer", "bos") and not any(_is_known(value) for value in values.values()):
        return "same", ""  # only TopK has a k; tokenizers were not compared; no BOS recorded
    unknown = [name for name, value in values.items() if not _is_known(value)]
    if unknown:
        if len(unknown) == len(values):
            return "unknown", "No arm recorded it, so nobody can check it."
        return "unknown", f"Not recorded for {_join(unknown)}, so nobody can check it."
    if field == "model":
        return _judge_model(values, roles)
    if field == "seed":
        return _judge_seed(values, roles)
    if field == "bos" and any("trained" in str(value) for value in values.values()):
        return "flaw", f"The text does not begin as in the SAE's training: {_CONSEQUENCES[field]}."
    if len({str(value) for value in values.values()}) == 1:
        return "same", ""
    if field == "chat_template" and not any("another" in str(value) for value in values.values()):
        return "intended", _NEW_TEMPLATE
    if field == "tokenizer" and not any(" cuts " in str(value) for value in values.values()):
        return "intended", "Tokens that not every model has are never top tokens; all others are the same."
    if field in _MEASURED:
        margin, relative, why = _MEASURED[field]
        numbers = [float(str(value)) for value in values.values()]
        spread = max(numbers) - min(numbers)
        if spread <= margin * (max(abs(number) for number in numbers) if relative else 1.0):
            return "small", "The values differ too little to matter."
        return "flaw", f"The values differ by {spread:.3g}: {why}."
    return "flaw", f"It should be equal in every arm: {_CONSEQUENCES[field]}."


def _judge_model(values: Mapping[str, object], roles: Roles) -> tuple[str, str]:
    control = values[roles.control]
    others = [name for name in roles.placebos if values[name] != control]
    if others:
        verb = "has" if len(others) == 1 else "have"
        return "flaw", f"{_join(others)} {verb} another model than the control, so that is not only SAE noise."
    if values[roles.treatment] == control:
        return "flaw", "Control and treatment have the same model, so nothing found here can come from fine-tuning."
    return "intended", "Control and treatment differ in the model: that is the comparison."


def _judge_seed(values: Mapping[str, object], roles: Roles) -> tuple[str, str]:
    control = values[roles.control]
    same = [name for name in roles.placebos if values[name] == control]
    if same:
        verb = "has" if len(same) == 1 else "have"
        return "flaw", f"{_join(same)} {verb} the control's seed, so retraining changed nothing and shows no SAE noise."
    sentence = (
        "Treatment and control share a seed: both SAEs start alike, which keeps noise down"
        if values[roles.treatment] == control
        else "Treatment and control have different seeds, which is fine: it adds SAE noise, as in a placebo"
    )
    if roles.placebos:
        return "intended", f"{sentence}. The placebo has another seed on purpose: what differs there is SAE noise."
    return ("same" if values[roles.treatment] == control else "intended"), f"{sentence}."


def _is_known(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _text(value: object) -> str:
    if not _is_known(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
