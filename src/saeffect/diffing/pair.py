"""The input of diffing methods: SAEs of two models, their firing, and the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.progress import SILENT, Log
from saeffect.stats.arguments import Resampling

if TYPE_CHECKING:  # torch takes a second to import, and readers of finished tables do not need it
    from torch import Tensor

    from saeffect.diffing.coactivity import FiringLog
    from saeffect.diffing.matching import Matching
    from saeffect.sae.base import SparseAutoencoder

__all__ = ["ActsOfBoth", "MatchingStore", "ModelPair", "ResidualBatch", "SaeView"]


@dataclass(frozen=True, eq=False)
class SaeView:
    """An SAE and its activity on the study's text.

    Attributes:
        W_dec: [d_sae, d_in].
        features: One row a feature in order, with `density` and `decoder_norm`.
        firing: Its activations, on the same tokens for every SAE; None, as `sae`, where only the decoder is known.
        warm_started: It was trained from the control's SAE, so features have the same numbers.
    """

    name: str
    W_dec: Tensor
    features: pd.DataFrame
    firing: FiringLog | None = None
    sae: SparseAutoencoder | None = None
    warm_started: bool = False

    @property
    def fires(self) -> npt.NDArray[np.bool_]:
        """Bool [d_sae]: features that fire on the text."""
        return np.asarray(self.features["density"].to_numpy(dtype=np.float64) > 0)


class ResidualBatch(NamedTuple):
    """Activations at an arm's hook: ids int64 [B, S]; x [B, S, d_in]; mask bool [B, S], the tokens that count."""

    ids: Tensor
    x: Tensor
    mask: Tensor


class ActsOfBoth(NamedTuple):
    """`feature_acts` [B, S, d_sae] of the control's SAE on both models; mask bool [B, S], the tokens that count."""

    control: Tensor
    treatment: Tensor
    mask: Tensor


class MatchingStore(Protocol):
    """Stores matchings, so that a resumed comparison need not compute them again."""

    def read(self, measure: str, a: str, b: str) -> Matching | None:
        """The matching stored for these SAEs, by name; None for none."""

    def write(self, measure: str, a: str, b: str, matching: Matching) -> None:
        """Store it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelPair:
    """Control and treatment of a study: the input of every diffing method.

    Attributes:
        others: Further SAEs of the control's model, trained from other seeds: the null of most methods.
        is_domain: Bool [d_sae], the control's domain features.
        acts_of_both: Runs the control's SAE on both models, over the whole text in batches.
        residuals: Gives the activations at the hook of a named arm, over the whole text in batches; loads its model.
        store: Of matchings; None for no store.
    """

    control: SaeView
    treatment: SaeView
    others: Sequence[SaeView] = ()
    treatment_seeds: Sequence[SaeView] = ()
    is_domain: npt.NDArray[np.bool_] | None = None
    acts_of_both: Callable[[], Iterator[ActsOfBoth]] = lambda: iter(())
    residuals: Callable[[str], Iterator[ResidualBatch]] = lambda arm: iter(())
    alpha: float = 0.05
    resampling: Resampling = field(default_factory=Resampling)
    log: Log = SILENT
    store: MatchingStore | None = None
