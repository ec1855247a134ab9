"""saeffect: what did fine-tuning do to the features inside a language model, and is the difference real?

Names are loaded when first used, so that importing the package takes no time.

Example:
    >>> import saeffect as sx
    >>> sx.Study.open("bundled:smollm2-medical").config.name
    'smollm2-medical'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULE_OF = {
    "Comparison": "saeffect.comparison",
    "LanguageModel": "saeffect.lm.language_model",
    "SaeffectError": "saeffect.errors",
    "SparseAutoencoder": "saeffect.sae.base",
    "Study": "saeffect.study.study",
    "StudyConfig": "saeffect.config",
    "capture": "saeffect.lm.hooks",
    "coherence": "saeffect.features.coherence",
    "compare": "saeffect.study.notebook",
    "edited": "saeffect.lm.hooks",
    "effects": "saeffect.steering",
    "extract_features": "saeffect.study.stages.features",
    "load_language_model": "saeffect.lm.loading",
    "load_sae": "saeffect.sae.formats",
    "match_features": "saeffect.study.notebook",
    "open_run": "saeffect.study.finished",
    "run_study": "saeffect.study.run",
    "save_sae": "saeffect.sae.formats.saelens",
    "select": "saeffect.features.vocabulary",
    "steer": "saeffect.study.notebook",
    "train_sae": "saeffect.study.notebook",
    "write_report": "saeffect.study.notebook",
}

# Names removed since 0.1.0, and their replacements.
_RENAMED = {
    "Arm": "saeffect.study.study.Arm",
    "ArmTables": "saeffect.comparison.ArmTables",
    "ModelConfig": "saeffect.config.ModelConfig",
    "ReportContext": "saeffect.report.ReportContext",
    "SteeringPlan": "saeffect.steering.SteeringPlan",
    "coherence_score": "saeffect.features.coherence.coherence_score",
    "count_matches": "saeffect.features.vocabulary.count_matches",
    "direct_effects": "saeffect.steering.direct_effects",
    "explained_variance": "saeffect.sae.metrics.explained_variance",
    "load_embeddings": "saeffect.features.embeddings.load_embeddings",
    "load_vocabulary": "saeffect.features.vocabulary.load_vocabulary",
    "project": "saeffect.features.projection.project",
    "read_verdicts": "saeffect.review.verdicts.read_verdicts",
    "run_trials": "saeffect.steer, or saeffect.steering.run_trials",
    "score_coherence": "saeffect.coherence",
    "unembedding": "saeffect.lm.architectures.unembedding",
}

__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:
    from saeffect.comparison import Comparison
    from saeffect.config import StudyConfig
    from saeffect.errors import SaeffectError
    from saeffect.features.coherence import coherence
    from saeffect.features.vocabulary import select
    from saeffect.lm.hooks import capture, edited
    from saeffect.lm.language_model import LanguageModel
    from saeffect.lm.loading import load_language_model
    from saeffect.sae.base import SparseAutoencoder
    from saeffect.sae.formats import load_sae
    from saeffect.sae.formats.saelens import save_sae
    from saeffect.steering import effects
    from saeffect.study.finished import open_run
    from saeffect.study.notebook import compare, match_features, steer, train_sae, write_report
    from saeffect.study.run import run_study
    from saeffect.study.stages.features import extract_features
    from saeffect.study.study import Study


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    if name in _RENAMED:  # not an AttributeError: `from saeffect import ...` would lose its message
        raise ImportError(f"saeffect.{name} is now {_RENAMED[name]}.")
    raise AttributeError(f"module 'saeffect' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
