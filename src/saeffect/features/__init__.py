"""What each feature is: the tokens it promotes, where it fires, how coherent and how much of a domain it is.

`projection` reads tokens off the decoder, `activity` and `examples` watch the features on text, and `table`
joins the three into one row a feature. `embeddings`, `coherence` and `vocabulary` then score and select rows.

The names below load on first use, so importing this package costs nothing. The function `coherence` is not
among them: it would share its name with the module `saeffect.features.coherence`, and which of the two one
got would depend on what had been imported before. Import it from its module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saeffect.features.activity import ActivityAccumulator
    from saeffect.features.coherence import Coverage, coherence_score, coverage
    from saeffect.features.embeddings import WordVectors, load_embeddings
    from saeffect.features.examples import ExampleCollector
    from saeffect.features.projection import PROJECTIONS, Projection, ProjectionPair, project, project_both
    from saeffect.features.table import (
        ActivationBatch,
        FeatureOptions,
        FeatureTables,
        HasDecoder,
        extract_tables,
        feature_table,
    )
    from saeffect.features.vocabulary import (
        MatchCounts,
        Vocabulary,
        bundled_vocabularies,
        count_matches,
        domain_features,
        load_vocabulary,
        require_domain_features,
        select,
    )

__all__ = [
    "PROJECTIONS",
    "ActivationBatch",
    "ActivityAccumulator",
    "Coverage",
    "ExampleCollector",
    "FeatureOptions",
    "FeatureTables",
    "HasDecoder",
    "MatchCounts",
    "Projection",
    "ProjectionPair",
    "Vocabulary",
    "WordVectors",
    "bundled_vocabularies",
    "coherence_score",
    "count_matches",
    "coverage",
    "domain_features",
    "extract_tables",
    "feature_table",
    "load_embeddings",
    "load_vocabulary",
    "project",
    "project_both",
    "require_domain_features",
    "select",
]

_HOME = {
    "PROJECTIONS": "projection",
    "ActivationBatch": "table",
    "ActivityAccumulator": "activity",
    "Coverage": "coherence",
    "ExampleCollector": "examples",
    "FeatureOptions": "table",
    "FeatureTables": "table",
    "HasDecoder": "table",
    "MatchCounts": "vocabulary",
    "Projection": "projection",
    "ProjectionPair": "projection",
    "Vocabulary": "vocabulary",
    "WordVectors": "embeddings",
    "bundled_vocabularies": "vocabulary",
    "coherence_score": "coherence",
    "count_matches": "vocabulary",
    "coverage": "coherence",
    "domain_features": "vocabulary",
    "extract_tables": "table",
    "feature_table": "table",
    "load_embeddings": "embeddings",
    "load_vocabulary": "vocabulary",
    "project": "projection",
    "project_both": "projection",
    "require_domain_features": "vocabulary",
    "select": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access skips this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
