"""saeffect: what did fine-tuning do to the features inside a language model, and is the difference real?

Names are loaded when first used, so that importing the package takes no time.

Example:
    >>> import saeffect as sx
    >>> sx.coherence_score([" cancer", " tumor"], [2.0, 1.0]) > 0.7
    True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Arm": "saeffect.study.study",
    "ArmTables": "saeffect.comparison",
    "Comparison": "saeffect.comparison",
    "LanguageModel": "saeffect.lm.language_model",
    "ModelConfig": "saeffect.config",
    "ReportContext": "saeffect.report",
    "SaeffectError": "saeffect.errors",
    "SparseAutoencoder": "saeffect.sae.base",
    "SteeringPlan": "saeffect.steering",
    "Study": "saeffect.study.study",
    "StudyConfig": "saeffect.config",
    "capture": "saeffect.lm.hooks",
    "coherence_score": "saeffect.features.coherence",
    "compare": "saeffect.comparison",
    "count_matches": "saeffect.features.vocabulary",
    "direct_effects": "saeffect.steering",
    "edited": "saeffect.lm.hooks",
    "effects": "saeffect.steering",
    "explained_variance": "saeffect.sae.metrics",
    "extract_features": "saeffect.study.stages.features",
    "load_embeddings": "saeffect.features.embeddings",
    "load_language_model": "saeffect.lm.loading",
    "load_sae": "saeffect.sae.formats",
    "load_vocabulary": "saeffect.features.vocabulary",
    "project": "saeffect.features.projection",
    "read_verdicts": "saeffect.review.verdicts",
    "run_study": "saeffect.study.run",
    "run_trials": "saeffect.steering",
    "save_sae": "saeffect.sae.formats",
    "score_coherence": "saeffect.features.coherence:coherence",
    "select": "saeffect.features.vocabulary",
    "unembedding": "saeffect.lm.architectures",
    "write_report": "saeffect.report",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from saeffect.comparison import ArmTables, Comparison, compare
    from saeffect.config import ModelConfig, StudyConfig
    from saeffect.errors import SaeffectError
    from saeffect.features.coherence import coherence as score_coherence
    from saeffect.features.coherence import coherence_score
    from saeffect.features.embeddings import load_embeddings
    from saeffect.features.projection import project
    from saeffect.features.vocabulary import count_matches, load_vocabulary, select
    from saeffect.lm.architectures import unembedding
    from saeffect.lm.hooks import capture, edited
    from saeffect.lm.language_model import LanguageModel
    from saeffect.lm.loading import load_language_model
    from saeffect.report import ReportContext, write_report
    from saeffect.review.verdicts import read_verdicts
    from saeffect.sae.base import SparseAutoencoder
    from saeffect.sae.formats import load_sae, save_sae
    from saeffect.sae.metrics import explained_variance
    from saeffect.steering import SteeringPlan, direct_effects, effects, run_trials
    from saeffect.study.run import run_study
    from saeffect.study.stages.features import extract_features
    from saeffect.study.study import Arm, Study


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saeffect' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return list(__all__)
