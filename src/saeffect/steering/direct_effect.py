"""What steering does to the very next token, read off the model's probabilities: no sampling, no noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from saeffect.lm.hooks import edited
from saeffect.lm.language_model import LanguageModel
from saeffect.steering.actions import ActionRow, actions_of
from saeffect.steering.generate import Progress
from saeffect.steering.operators import Intervention
from saeffect.steering.placebo import UNSTEERED
from saeffect.steering.plan import Site, SteeringPlan, check_features
from saeffect.steering.prompt_pass import last_logits

__all__ = ["direct_effects", "kl_divergence", "next_log_probabilities"]


def direct_effects(
    site: Site,
    W_dec: Tensor,
    features: pd.DataFrame,
    plan: SteeringPlan,
    *,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How much likelier steering makes a feature's top tokens as the next token.

    Each batch holds one unsteered row, so that both sides of a difference come from the same matrix products.
    The random placebo of a prompt is that of its sample 0.

    Args:
        site: Model, hook and unit of doses.
        W_dec: Decoder, `[d_sae, d_model]`.
        features: Columns feature and top_token_ids (list of int), and matched if that placebo is planned; or
            members, as in `run_trials`.
        plan: Prompts, doses, operator, unit, positions, placebos, seed and batch_size are used.
        progress: Called after each batch with rows done and in all.

    Returns:
        One row per feature, prompt, condition and dose, in that order: feature, prompt, condition, dose,
        delta_logprob (nats; mean over the top tokens of steered minus unsteered log-probability; NaN without
        top tokens), kl (nats; from the unsteered to the steered distribution, 0 when nothing changed).
        Conditions that are impossible for a feature have no rows, see `obstacles`.

    Raises:
        SaeffectError: As `check_features`, `Directions` and `Intervention.edit`.
    """
    table = check_features(site, W_dec, features, ("top_token_ids", *plan.feature_columns))
    actions = actions_of(site, W_dec, table, plan)
    top = {int(f): [int(i) for i in ids] for f, ids in zip(table["feature"], table["top_token_ids"], strict=True)}
    possible = [(f, c) for f in top for c in plan.conditions if not actions.obstacle(f, c)]
    layout = [(f, condition, dose) for f, condition in possible for dose in plan.doses]
    n_at_once = max(1, plan.batch_size - 1)
    records: list[dict[str, Any]] = []
    for prompt, text in enumerate(plan.prompts):
        prompt_ids = site.lm.encode_prompt(text)
        for first in range(0, len(layout), n_at_once):
            some = layout[first : first + n_at_once]
            rows = [ActionRow(some[0][0], UNSTEERED, 0.0, (prompt, 0))]
            rows += [ActionRow(*one, (prompt, 0)) for one in some]
            intervention = Intervention(actions.operator(rows), plan.positions)
            log_p = next_log_probabilities(site.lm, site.hook, prompt_ids, intervention)
            kl = kl_divergence(log_p[0], log_p[1:]).tolist()
            for row, (feature, condition, dose) in enumerate(some):
                ids = top[feature]
                delta = float((log_p[row + 1, ids] - log_p[0, ids]).double().mean()) if ids else math.nan
                records.append(
                    {"feature": feature, "prompt": prompt, "condition": condition, "dose": float(dose)}
                    | {"delta_logprob": delta, "kl": kl[row]}
                )
            if progress is not None:
                progress(len(records), len(layout) * len(plan.prompts))
    result = pd.DataFrame(records, columns=["feature", "prompt", "condition", "dose", "delta_logprob", "kl"])
    result["order"] = result["condition"].map({c: i for i, c in enumerate(plan.conditions)})
    result = result.sort_values(["feature", "prompt", "order", "dose"], kind="stable")
    return result.drop(columns="order").reset_index(drop=True)


@torch.inference_mode()
def next_log_probabilities(
    lm: LanguageModel, hook: str, prompt_ids: Sequence[int], intervention: Intervention | None
) -> Tensor:
    """Log-probabilities (nats) of every token after the prompt, float32 `[rows, d_vocab]`.

    One row per row of the intervention, or a single one without intervention.
    """
    n_rows = 1 if intervention is None else intervention.operator.n_rows
    input_ids = torch.tensor([list(prompt_ids)], device=lm.device).expand(n_rows, -1).contiguous()
    editing: AbstractContextManager[None] = nullcontext()
    if intervention is not None:
        editing = edited(lm, hook, intervention.edit(len(prompt_ids), lm.n_bos(prompt_ids)))
    with editing:
        logits, _ = last_logits(lm, input_ids)
    return logits.log_softmax(dim=-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of q from p, nats, at least 0: how ill q predicts what p draws.

    Args:
        log_p: Log-probabilities `[d_vocab]`.
        log_q: Log-probabilities `[rows, d_vocab]`.

    Returns:
        `[rows]`, of the inputs' dtype.

    Example:
        >>> p = torch.tensor([0.5, 0.5]).log()
        >>> q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
        >>> [round(x, 4) for x in kl_divergence(p, q).tolist()]  # second: ln 2 - (ln 3) / 2
        [0.0, 0.1438]
    """
    p = log_p.exp()
    # What p never draws adds nothing, also where q forbids it.
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(log_q))
    return terms.sum(dim=-1).clamp_min(0)
