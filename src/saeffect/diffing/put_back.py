"""What a change of features causes: their activations are put back to the other model's while a model reads text.

At the hook, `x' = x - Σ_f (a_f(x) - a_f(x_other)) d_f` over some features f; behind it the model runs as it is. With
all features and what the SAE leaves over, `x'` is `x_other`, the whole activation. How much of what the whole does is
done by some features is their share. Features are chosen on other text than what they are measured on, and beside each
set stands one of as many features that resemble it in density and activity, drawn anew for each row of text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.config import PutBackConfig
from saeffect.diffing.cross_activity import change_scores
from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm.activations import NormLimit, TokenRows, check_rows, kept_positions
from saeffect.lm.hooks import Rest, capture
from saeffect.lm.language_model import LanguageModel, fused
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.stats.arguments import FloatArray, IntArray
from saeffect.steering.placebos import matched_features

__all__ = ["SIZES", "BothRead", "FeatureSet", "outcomes", "read", "scaled_acts", "sets_of_changed", "sets_of_group"]

Edited = Literal["tuned", "base"]

SIZES = PutBackConfig().sizes
"""Numbers of features of the curve; all of them come last."""

_BATCH = 8  # rows of a pass up to the hook
_LOGITS = 25_200_000  # of a pass behind it: bounds memory, 100 MB in float32 and as much for probabilities
_CHUNK = 8  # tokens whose logits stay in the processor's cache
_NEAREST = 4  # features among which a match is drawn


@dataclass(frozen=True, eq=False)
class BothRead:
    """The same rows of text in both models: activations of the base and of the fine-tuned one at the hook, [n_rows,
    context_size, d_in], of the models' dtype, on the CPU; and bool [n_rows, context_size], the positions that are
    edited: not the first, and no outlier in either.
    """

    rows: TokenRows
    base: Tensor
    tuned: Tensor
    mask: Tensor

    @classmethod
    def of(cls, rows: TokenRows, base: Tensor, tuned: Tensor, limit: NormLimit) -> BothRead:
        """From what `read` gives for both models. ConfigError if they differ in width."""
        if base.shape != tuned.shape:
            raise ConfigError(
                f"the activations are {base.shape[-1]} and {tuned.shape[-1]} wide, so one model's cannot be put into"
                " the other.",
                fix="compare a model with its own fine-tune.",
            )
        counts = rows.counts_of(0, len(rows))
        return cls(rows, base, tuned, kept_positions(base, limit, counts) & kept_positions(tuned, limit))


@torch.inference_mode()
def read(lm: LanguageModel, hook: str, rows: TokenRows, log: Log = SILENT) -> Tensor:
    """Activations at a hook, [n_rows, context_size, d_model], of the model's dtype; errors as `check_rows`."""
    check_rows(lm, hook, rows)
    batches = []
    with fused(lm):
        for start in range(0, len(rows), _BATCH):
            ids = torch.from_numpy(rows.ids[start : start + _BATCH].astype(np.int64))
            batches.append(capture(lm, hook, ids).cpu())
            log.progress(f"reading with {lm.name}", start + len(ids), len(rows), "rows")
    return torch.cat(batches)


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features to put back: `name` is "changed" or a group's, `kind` "own", or "matched" for features that resemble
    these. `members` are int64 [n_rows, n], None for all; `reason` says why there are none.
    """

    name: str
    n: int
    kind: Literal["own", "matched"] = "own"
    members: IntArray | None = None
    reason: str = ""

    def mask(self, rows: slice, d_sae: int) -> Tensor:
        """Which features are put back on these rows, float32 [B, d_sae]."""
        if self.members is None:
            return torch.ones(1, d_sae)
        members = torch.from_numpy(self.members[rows])
        return torch.zeros(len(members), d_sae).scatter_(1, members, 1.0)


@torch.inference_mode()
def sets_of_changed(
    both: BothRead,
    sae: SparseAutoencoder,
    *,
    sizes: Sequence[int] = SIZES,
    order: Sequence[int] | None = None,
    seed: int = 0,
) -> list[FeatureSet]:
    """The features that changed most, so many as each size says, and matched ones; at last all features.

    Without an `order`, rows are split in halves (every other row of each source): on each half the features are put
    back that changed most on the other one. A given `order`, most changed first, must come from other text.
    EmptySelection for a single row without an order; ConfigError for a size below 1, or an order that lacks features.
    """
    d_sae = sae.cfg.d_sae
    if min(sizes, default=1) < 1:
        raise ConfigError(f"a set has at least one feature. Got {min(sizes)}.", at="features")
    if order is not None and sorted(order) != list(range(d_sae)):
        raise ConfigError(f"an order has each of the {d_sae} features once.", at="order")
    if order is None and len(both.rows) < 2:
        raise EmptySelection(
            "one row of text cannot both choose features and measure them.", at="text", fix="give more text."
        )
    halves = _halves(both.rows.sources) if order is None else np.zeros(len(both.rows), dtype=np.int64)
    n_rows = len(both.rows)
    changed: dict[int, IntArray] = {}
    matched: dict[int, IntArray | None] = {}
    for half in np.unique(halves):
        measured = np.flatnonzero(halves == half)
        traits = _traits(both, sae, measured if order is not None else np.flatnonzero(halves != half))
        ranked = np.argsort(-traits["change"].abs().fillna(-1.0).to_numpy(), kind="stable")
        ranked = ranked if order is None else np.asarray(order)
        for n in sorted({size for size in sizes if size < d_sae}):
            own_members = changed.setdefault(n, np.zeros((n_rows, n), dtype=np.int64))
            own_members[measured] = ranked[:n]
            similar = _matched(traits, ranked[:n], len(measured), np.random.default_rng([seed, n, int(half)]))
            matched_members = matched.setdefault(n, np.zeros((n_rows, n), dtype=np.int64))
            if similar is None or matched_members is None:
                matched[n] = None
            else:
                matched_members[measured] = similar
    sets = []
    for n, members in changed.items():
        sets += [FeatureSet("changed", n, "own", members), _as_match("changed", n, matched[n])]
    return [*sets, FeatureSet("changed", d_sae)]


@torch.inference_mode()
def sets_of_group(
    both: BothRead, sae: SparseAutoencoder, name: str, features: Sequence[int], *, seed: int = 0
) -> list[FeatureSet]:
    """A group of features, which must come from other text, and as many that match it."""
    chosen, n_rows = np.unique(np.asarray(features, dtype=np.int64)), len(both.rows)
    if not len(chosen) or chosen[0] < 0 or chosen[-1] >= sae.cfg.d_sae:
        raise ConfigError(
            f"the group {name!r} has no features, or none that this SAE of {sae.cfg.d_sae} has.", at="features"
        )
    traits = _traits(both, sae, np.arange(n_rows))
    similar = _matched(traits, chosen, n_rows, np.random.default_rng([seed, *chosen.tolist()]))
    own_set = FeatureSet(name, len(chosen), "own", np.tile(chosen, (n_rows, 1)))
    return [own_set, _as_match(name, len(chosen), similar)]


def outcomes(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    hook: str,
    both: BothRead,
    sets: Sequence[FeatureSet],
    *,
    edited: Edited,
    done: Collection[int] = (),
    log: Log = SILENT,
) -> Iterator[pd.DataFrame]:
    """Put each set back while the model `lm`, which is the `edited` one of the two, reads, batch by batch; rows in
    `done` are left out.

    A row per row of text and set: edited, row, features, n_features, kind; loss, mean next-token cross-entropy, and kl,
    mean KL of the model's prediction with the whole activation put back from that with this set, both in nats a token,
    from the second token on. `features` "none" is the model as it is, "whole" the whole activation.
    """
    rest, measured_sets = Rest(lm, hook), [feature_set for feature_set in sets if not feature_set.reason]
    n = len(both.rows)
    batch = max(1, _LOGITS // (lm.d_vocab * both.rows.context_size))
    for start in range(0, n, batch):
        rows = slice(start, min(start + batch, n))
        if set(range(rows.start, rows.stop)) <= set(done):
            continue
        with torch.inference_mode(), fused(lm):
            table = _measure_batch(rest, sae.on(lm.device), both, measured_sets, edited, rows)
        yield table
        log.progress(f"features put back into {lm.name}", rows.stop, n, "rows")


def _measure_batch(
    rest: Rest, sae: SparseAutoencoder, both: BothRead, sets: Sequence[FeatureSet], edited: Edited, rows: slice
) -> pd.DataFrame:
    ids = torch.from_numpy(both.rows.ids[rows].astype(np.int64))
    own, other = (both.tuned, both.base) if edited == "tuned" else (both.base, both.tuned)
    device = sae.W_dec.device
    x, x_other = own[rows].float().to(device), other[rows].float().to(device)
    mask = both.mask[rows][..., None].to(device)
    whole = rest.logits(ids, torch.where(mask, x_other, x))
    scores = _Scores(whole[:, :-1], ids[:, 1:])
    results = {
        ("whole", -1, "own"): scores.of(whole[:, :-1]),
        ("none", 0, "own"): scores.of(rest.logits(ids, x)[:, :-1]),
    }
    del whole
    change = (scaled_acts(sae, x) - scaled_acts(sae, x_other)) * mask
    directions = sae.directions(torch.arange(sae.cfg.d_sae, device=device))
    for feature_set in sets:
        put = x - (change * feature_set.mask(rows, sae.cfg.d_sae)[:, None].to(device)) @ directions
        results[feature_set.name, feature_set.n, feature_set.kind] = scores.of(rest.logits(ids, put)[:, :-1])
    frames = []
    for (name, n, kind), (loss, kl) in results.items():
        keys = {"edited": edited, "row": range(rows.start, rows.stop), "features": name, "n_features": n, "kind": kind}
        frames.append(pd.DataFrame(keys | {"loss": loss, "kl": kl}))
    return pd.concat(frames, ignore_index=True)


class _Scores:
    """Loss, and KL from a reference, of logits [B, S, d_vocab] that predict `targets` [B, S]."""

    def __init__(self, reference: Tensor, targets: Tensor) -> None:
        self._targets = targets.to(reference.device)
        self._reference = torch.log_softmax(reference.float(), dim=-1).exp_().flatten(0, 1)
        self._negative_entropy = torch.zeros(())
        self._negative_entropy = -self._cross(reference)[1]

    def of(self, logits: Tensor) -> tuple[FloatArray, FloatArray]:
        """Means over the tokens of each row, float64 [B]."""
        loss, cross = self._cross(logits)
        by_token = torch.stack([loss, cross + self._negative_entropy]).view(2, *self._targets.shape)
        means: FloatArray = by_token.double().mean(dim=2).cpu().numpy()
        return means[0], means[1]

    def _cross(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy with the targets and with the reference, [B · S]; logits in pieces, each read once."""
        flat, targets = logits.flatten(0, 1), self._targets.flatten()
        losses, crosses = [], []
        for part in range(0, len(flat), _CHUNK):
            piece = flat[part : part + _CHUNK].float()
            total = piece.logsumexp(dim=-1)
            losses.append(total - piece.gather(1, targets[part : part + _CHUNK, None])[:, 0])
            crosses.append(total - (piece * self._reference[part : part + _CHUNK]).sum(dim=-1))
        return torch.cat(losses), torch.cat(crosses)


def scaled_acts(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Activations in units of the output, so that a difference times the directions is one of reconstructions."""
    return sae.encode(x) * sae.output_scale(x)


def _halves(sources: IntArray) -> IntArray:
    """Every other row of each source: 0 or 1."""
    halves = np.zeros(len(sources), dtype=np.int64)
    for i, source in enumerate(np.unique(sources)):
        source_rows = np.flatnonzero(sources == source)
        halves[source_rows] = (np.arange(len(source_rows)) + i) % 2
    return halves


def _traits(both: BothRead, sae: SparseAutoencoder, rows: IntArray) -> pd.DataFrame:
    """Per feature on these rows: `change` (a score), and decoder_norm, density, mean_activation over both models."""
    sums, fired, n = torch.zeros(2, sae.cfg.d_sae, dtype=torch.float64), torch.zeros(sae.cfg.d_sae), 0
    for start in range(0, len(rows), _BATCH):
        batch = torch.from_numpy(rows[start : start + _BATCH])
        mask = both.mask[batch]
        for model, x in enumerate((both.base, both.tuned)):
            acts = sae.encode(x[batch][mask].float())
            sums[model] += acts.sum(dim=0)
            fired += (acts > 0).sum(dim=0)
        n += int(mask.sum())
    base, tuned = (sums / max(n, 1)).numpy()
    means = pd.DataFrame({"mean_control": base, "mean_treatment": tuned, "difference": tuned - base})
    return pd.DataFrame(
        {
            "feature": np.arange(sae.cfg.d_sae),
            "change": change_scores(means),
            "decoder_norm": sae.W_dec.detach().float().norm(dim=1).numpy(),
            "density": fired.double().numpy() / max(2 * n, 1),
            "mean_activation": (base + tuned) / 2,
        }
    )


def _matched(traits: pd.DataFrame, chosen: IntArray, n_rows: int, rng: np.random.Generator) -> IntArray | None:
    """For each row other features like the chosen ones, int64 [n_rows, n]; None if there are too few."""
    n = len(chosen)
    near = matched_features(traits, chosen.tolist(), chosen.tolist(), n=n - 1 + _NEAREST)
    lists: Mapping[int, list[int]] = near.groupby("feature")["placebo"].agg(list).to_dict()
    drawn = np.zeros((n_rows, n), dtype=np.int64)
    for row in drawn:
        used: set[int] = set()
        # In random order, since the features matched last find their nearest ones in use.
        for i in rng.permutation(n):
            free = [other for other in lists.get(int(chosen[i]), ()) if other not in used][:_NEAREST]
            if not free:
                return None
            row[i] = free[rng.integers(len(free))]
            used.add(int(row[i]))
    return drawn


def _as_match(name: str, n: int, members: IntArray | None) -> FeatureSet:
    reason = "" if members is not None else f"fewer than {n} further features resemble these"
    return FeatureSet(name, n, "matched", members, reason)
