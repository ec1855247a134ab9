"""Find the change that makes an SAE fit a model, by reading it in other ways and at other hooks.

Variants are compared by the explained variance of a few hundred tokens, so that most of the work is one pass of the
model. Read `find_mismatch`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeffect.errors import ConfigError, Undefined
from saeffect.lm.activations import TokenRows, kept_positions, measure_norm_limit
from saeffect.lm.hooks import capture, edited, parse_hook
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.tokens import find_bos_id
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.metrics import ReconstructionSums
from saeffect.sae.topk import TopKSae

__all__ = ["Change", "Mismatch", "Reading", "find_mismatch", "mended", "scan_hooks"]

_TOKENS = 768  # on which variants are compared
# A variant is better if it leaves at most this share of the variance that the SAE leaves unexplained. One block away
# the SAEs that come with this package leave 1.35 times as much as at their own hook.
_MAX_UNEXPLAINED = 0.85
_SCALES = tuple(2.0 ** (i / 2) for i in range(-24, 25) if i)  # of inputs, tried besides those that trainers use
_MIN_FACTOR = 1.5  # a smaller factor corrects shrinkage, which is no mismatch
_TOLERANCE = 0.01  # explained variance: of scales as good as the best, the first one, which trainers use
_THRESHOLDED = ("standard", "jumprelu")  # architectures in which any number of features may be active
_K_VALUES = (8, 16, 32, 64, 128, 256)
# An SAE that was trained as TopK has many small activations besides its k largest, which explain nothing. It is read
# as TopK if l0 is at least the first number times k, and the unexplained variance at most the second times as large.
_MIN_RATIO, _MAX_RATIO = 4.0, 1.1
_OTHER_KINDS = ("hook_resid_mid", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Change:
    """One change to how an SAE is read: its `name` (hook, scale, centring, normalisation, decoder bias, architecture
    or bos), the evidence in words (`found`), and the `fix`.
    """

    name: str
    found: str
    fix: str


@dataclass(frozen=True, eq=False)
class Reading:
    """An SAE with `changes` made, such as another architecture or normalisation; inputs are multiplied by `scale`."""

    sae: SparseAutoencoder
    scale: float = 1.0
    changes: tuple[Change, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction of activations `[..., d_in]`."""
        rebuilt: Tensor = self.sae(x * self.scale)
        return rebuilt / self.scale

    def with_sae(self, sae: SparseAutoencoder, change: Change) -> Reading:
        return Reading(sae, self.scale, (*self.changes, change))


@dataclass(frozen=True, eq=False)
class Mismatch:
    """What makes an SAE fit a model: the `changes` (none if nothing is better); explained variance `before` and
    `after`, on the tokens that variants are compared on; the SAE with the changes (`reading`); the `hook` where it
    fits; and whether texts should begin with BOS, if that is one of the changes.
    """

    changes: tuple[Change, ...]
    before: float
    after: float
    reading: Reading
    hook: str
    prepend_bos: bool | None = None

    def __bool__(self) -> bool:
        return bool(self.changes)


@torch.inference_mode()
def find_mismatch(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    hook: str,
    ids: NDArray[np.int32],
    log: Log = SILENT,
    *,
    counts: NDArray[np.bool_] | None = None,
) -> Mismatch:
    """Look for changes that make an SAE fit better: at most one other hook, and up to two other ways to read it.

    `ids` are rows of text, int32 `[n_rows, context_size]`; `counts`, bool of that shape, marks the tokens to use (None:
    all). A change is reported only if it leaves clearly less of the variance unexplained. ConfigError: no such hook.
    """
    on = np.ones(ids.shape, dtype=bool) if counts is None else counts
    n_rows = min(len(ids), max(2, int(np.searchsorted(on.sum(axis=1).cumsum(), _TOKENS)) + 1))
    rows = TokenRows(ids[:n_rows], np.zeros(n_rows, dtype=np.int64), ("text",), on[:n_rows])
    x = _sample_activations(lm, hook, rows)
    before = _explained(Reading(sae), x)
    best, after = _best_reading(Reading(sae), x, before)
    bos_result = _try_other_bos(lm, hook, rows, best, after)
    if bos_result is not None:
        change, after, prepend = bos_result
        best = dataclasses.replace(best, changes=(*best.changes, change))
        return Mismatch(best.changes, before, after, best, hook, prepend)
    scores = scan_hooks(lm, Reading(sae), rows, near=hook, log=log)
    if scores and _is_better(max(scores.values()), after):
        best_hook, score = max(scores.items(), key=lambda item: item[1])
        reading, explained = _best_reading(Reading(sae), _sample_activations(lm, best_hook, rows), score)
        evidence = f"at {best_hook} it explains {explained:.2f} of the variance, at {hook} {before:.2f}"
        change = Change("hook", f"another hook: {evidence}", f"read it there: hook: {best_hook}.")
        reading = dataclasses.replace(reading, changes=(change, *reading.changes))
        return Mismatch(reading.changes, before, explained, reading, best_hook)
    return Mismatch(best.changes, before, after, best, hook)


def _is_better(after: float, before: float) -> bool:
    return math.isfinite(after) and (1 - after) <= _MAX_UNEXPLAINED * (1 - before)


def _sample_activations(lm: LanguageModel, hook: str, rows: TokenRows) -> Tensor:
    return _used_activations(capture(lm, hook, torch.from_numpy(rows.ids.astype(np.int64))), rows)


def _used_activations(x: Tensor, rows: TokenRows) -> Tensor:
    """Activations that count, float32 `[n, d_model]`, on the CPU."""
    wide = x.detach().float().cpu()
    return wide[kept_positions(wide, measure_norm_limit(wide[:, 1:]), rows.counts_of(0, len(rows)))][:_TOKENS]


def _explained(reading: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Explained variance; minus infinity where it is undefined or not finite."""
    sums = ReconstructionSums(x.shape[1])
    try:
        sums.add(x, reading(x).float())
        explained = sums.explained_variance()
    except Undefined:
        return -math.inf
    return explained if math.isfinite(explained) else -math.inf


def _best_reading(reading: Reading, x: Tensor, before: float) -> tuple[Reading, float]:
    """The best way to read the SAE, with at most two changes, the second better than the first."""
    best, after = reading, before
    for _ in range(2):
        candidates = [(other, _explained(other, x)) for other in _variations(best, x)]
        highest = max((value for _, value in candidates), default=-math.inf)
        if not _is_better(highest, after):
            break
        chosen, value = max(candidates, key=lambda pair: pair[1])
        if chosen.changes[-1].name == "scale":  # a factor that has a name, where it is as good as one between
            standard = [
                pair for pair in candidates if pair[0].changes[-1].name == "scale" and pair[1] >= highest - _TOLERANCE
            ]
            chosen, value = standard[0]
        best, after = chosen, value
    return _as_topk_if_as_good(best, x, after)


def _as_topk_if_as_good(reading: Reading, x: Tensor, before: float) -> tuple[Reading, float]:
    """The SAE as TopK, if a fraction of the active features explains as much: then it was trained as TopK."""
    cfg = reading.sae.cfg
    if cfg.architecture not in _THRESHOLDED or any(change.name == "architecture" for change in reading.changes):
        return reading, before
    l0 = float((reading.sae.encode(x * reading.scale) > 0).sum(1).double().mean())
    for k in (k for k in _K_VALUES if k < cfg.d_sae and _MIN_RATIO * k <= l0):
        other = reading.with_sae(_as_topk(reading.sae, k), _topk_change(k, cfg.architecture, l0))
        value = _explained(other, x)
        if 1 - value <= _MAX_RATIO * (1 - before):
            return other, value
    return reading, before


def _variations(reading: Reading, x: Tensor) -> Iterator[Reading]:
    """The same SAE with one more change."""
    changed = {change.name for change in reading.changes}
    sae, cfg = reading.sae, reading.sae.cfg
    if "centring" not in changed:
        on = not cfg.centre_input
        yield reading.with_sae(_with_config(sae, dataclasses.replace(cfg, centre_input=on)), _CENTRING[on])
    if "normalisation" not in changed:
        on = cfg.normalize_activations != "layer_norm"
        layer_norm = dataclasses.replace(cfg, normalize_activations="layer_norm" if on else "none", centre_input=False)
        yield reading.with_sae(_with_config(sae, layer_norm), _LAYER_NORM[on])
    if "decoder bias" not in changed:
        on = not cfg.apply_b_dec_to_input
        yield reading.with_sae(_with_config(sae, dataclasses.replace(cfg, apply_b_dec_to_input=on)), _DECODER_BIAS[on])
    if "architecture" not in changed and cfg.architecture in _THRESHOLDED:
        for k in (k for k in _K_VALUES if k < cfg.d_sae):
            yield reading.with_sae(_as_topk(sae, k), _topk_change(k, cfg.architecture))
    if "scale" not in changed:
        yield from _rescaled(reading, x)


_CENTRING = {
    True: Change(
        "centring",
        "missing centring: it fits activations whose mean over dimensions is subtracted (TransformerLens'"
        " center_writing_weights)",
        "say so in its cfg.json: metadata.model_from_pretrained_kwargs: {center_writing_weights: true}.",
    ),
    False: Change(
        "centring",
        "needless centring: it fits activations as they are, their mean over dimensions not subtracted",
        "take center_writing_weights out of its cfg.json.",
    ),
}
_LAYER_NORM = {
    True: Change(
        "normalisation",
        "missing normalisation: it fits activations that are standardised one by one",
        "say so in its cfg.json: normalize_activations: layer_norm.",
    ),
    False: Change(
        "normalisation",
        "needless normalisation: it fits activations as they are",
        "say so in its cfg.json: normalize_activations: none.",
    ),
}
_DECODER_BIAS = {
    True: Change(
        "decoder bias",
        "b_dec is not subtracted from the input, as it was in training",
        "say so in its cfg.json: apply_b_dec_to_input: true.",
    ),
    False: Change(
        "decoder bias",
        "b_dec is subtracted from the input, which it was not in training",
        "say so in its cfg.json: apply_b_dec_to_input: false.",
    ),
}


def _topk_change(k: int, architecture: str, l0: float | None = None) -> Change:
    activation = "ReLU" if architecture == "standard" else "JumpReLU"
    evidence = f"TopK read as {activation}: it fits with only the {k} largest activations of a token"
    if l0 is not None:
        evidence = (
            f"TopK read as {activation}: {l0:,.0f} features are active a token, and the {k} largest explain as much"
        )
    return Change(
        "architecture",
        evidence,
        f"say so in its cfg.json: architecture: topk, with the k of its training (about {k}); or find the thresholds"
        " if it is a JumpReLU or BatchTopK SAE.",
    )


def _with_config(sae: SparseAutoencoder, cfg: SaeConfig) -> SparseAutoencoder:
    """The same weights, not copied, with another configuration."""
    view = copy.copy(sae)
    view.cfg = cfg
    return view


def _as_topk(sae: SparseAutoencoder, k: int) -> SparseAutoencoder:
    with torch.device("meta"):
        topk = TopKSae(dataclasses.replace(sae.cfg, architecture="topk", k=k))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        setattr(topk, name, getattr(sae, name))
    return topk.eval().requires_grad_(False)


def _rescaled(reading: Reading, x: Tensor) -> Iterator[Reading]:
    """The SAE with inputs scaled otherwise: first by factors that trainers use, then by `_SCALES`."""
    norm, width = float(x.norm(dim=1).mean()), math.sqrt(x.shape[1])
    standard = {
        width / norm: "a mean norm of sqrt(d_in)",
        norm / width: "a mean norm of sqrt(d_in), twice",
        1.0 / norm: "a mean norm of 1",
    }
    for factor, why in (*standard.items(), *((factor, "") for factor in _SCALES)):
        if max(factor, 1 / factor) > _MIN_FACTOR:
            scale = reading.scale * factor
            origin = f" (it was trained on inputs scaled to {why})" if why else ""
            if why.endswith("twice"):
                origin = " (a scaling to a mean norm of sqrt(d_in) was folded into its weights twice)"
            change = Change(
                "scale",
                f"unfolded scaling: it fits activations multiplied by {factor:.4g}{origin}",
                f"fold it into the weights: W_enc times {factor:.4g}, W_dec and b_dec divided by it.",
            )
            yield Reading(reading.sae, scale, (*reading.changes, change))


def scan_hooks(
    lm: LanguageModel, reading: Reading, rows: TokenRows, *, near: str | None = None, log: Log = SILENT
) -> dict[str, float]:
    """Explained variance at the hooks of a model other than `near`, measured in one pass or two: first the residual
    hooks and hooks of the kind of `near`; if the SAE fits none of them, the other kinds.
    """
    point = None if near is None else parse_hook(near, lm.n_layers)
    layers = range(lm.n_layers)
    hooks = [f"blocks.{i}.hook_resid_pre" for i in layers] + [f"blocks.{lm.n_layers - 1}.hook_resid_post"]
    excluded = {near}
    if point is not None and point.kind == "hook_resid_post":
        excluded.add(f"blocks.{point.layer + 1}.hook_resid_pre")  # the same activation
    elif point is not None and not point.kind.startswith("hook_resid"):
        hooks += [f"blocks.{i}.{point.kind}" for i in layers]
    scores = _scan(lm, reading, [hook for hook in hooks if hook not in excluded], rows)
    log(f"  looked at {len(scores)} other hooks")
    if max(scores.values(), default=-math.inf) < 0.5:
        other_kinds = [f"blocks.{i}.{kind}" for i in layers for kind in _OTHER_KINDS if kind != (point and point.kind)]
        further = _scan(lm, reading, other_kinds, rows)
        log(f"  looked at {len(further)} further hooks")
        scores |= further
    return scores


def _scan(lm: LanguageModel, reading: Reading, hooks: Sequence[str], rows: TokenRows) -> dict[str, float]:
    scores: dict[str, float] = {}

    def listener(hook: str) -> Callable[[Tensor], Tensor]:
        def listen(x: Tensor) -> Tensor:
            if x.shape[:2] == rows.ids.shape:  # not the probe that attaching another hook runs
                scores[hook] = _explained(reading, _used_activations(x, rows))
            return x

        return listen

    with contextlib.ExitStack() as stack:
        for hook in hooks:
            with contextlib.suppress(ConfigError):  # an architecture without this kind
                stack.enter_context(edited(lm, hook, listener(hook)))
        if hooks:
            ids = torch.from_numpy(rows.ids.astype(np.int64)).to(lm.device)
            lm.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return scores


def _try_other_bos(
    lm: LanguageModel, hook: str, rows: TokenRows, reading: Reading, before: float
) -> tuple[Change, float, bool] | None:
    """The change, explained variance and `prepend_bos` if the SAE fits the same tokens better with BOS added in front
    (or taken away, if the rows have it); else None.
    """
    has = lm.n_bos(rows.ids[0]) == 1
    try:
        bos = find_bos_id(lm.tokenizer, prepend=True) if lm.tokenizer is not None else None
    except ConfigError:
        bos = None
    if bos is None or bos >= lm.d_vocab:
        return None
    cut = slice(1, None) if has else slice(-1)
    ids, on = rows.ids[:, cut], None if rows.counts is None else np.ascontiguousarray(rows.counts[:, cut])
    if not has:
        ids = np.concatenate([np.full_like(ids[:, :1], bos), ids], axis=1)
        on = None if on is None else np.concatenate([np.zeros_like(on[:, :1]), on], axis=1)
    value = _explained(reading, _sample_activations(lm, hook, dataclasses.replace(rows, ids=ids, counts=on)))
    if not _is_better(value, before):
        return None
    with_or_without = "without" if has else "with"
    change = Change(
        "bos",
        f"BOS: it fits texts that begin {with_or_without} the BOS token: explained variance {value:.2f}, not"
        f" {before:.2f}",
        f"say bos: {'never' if has else 'always'} (--bos), or prepend_bos: {str(not has).lower()} in its cfg.json.",
    )
    return change, value, not has


def mended(mismatch: Mismatch) -> SparseAutoencoder:
    """A copy of the SAE with the changes made: scaling folded into the weights, settings and hook in `cfg`."""
    reading = mismatch.reading
    sae = copy.deepcopy(reading.sae)
    if reading.scale != 1.0:
        with torch.no_grad():
            sae.W_enc.mul_(reading.scale)
            sae.W_dec.div_(reading.scale)
            sae.b_dec.div_(reading.scale)
    metadata = dict(sae.cfg.metadata) | {"hook_name": mismatch.hook, "mended": [c.found for c in mismatch.changes]}
    metadata["model_from_pretrained_kwargs"] = dict(metadata.get("model_from_pretrained_kwargs") or {}) | {
        "center_writing_weights": sae.cfg.centre_input
    }
    if mismatch.prepend_bos is not None:
        metadata["prepend_bos"] = mismatch.prepend_bos
    sae.cfg = dataclasses.replace(sae.cfg, metadata=metadata)
    return sae
