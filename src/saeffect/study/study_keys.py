"""The keys of a study file as a page of Markdown, from the descriptions that stand beside the fields."""

from __future__ import annotations

from collections.abc import Mapping

from saeffect.config import (
    ArmConfig,
    CoherenceConfig,
    ComparisonConfig,
    FeaturesConfig,
    GateConfig,
    ModelConfig,
    SelectionConfig,
    SteeringConfig,
    StudyConfig,
    TextConfig,
    TextSource,
)
from saeffect.config_keys import keys_table
from saeffect.steering import BASELINES, OUTCOMES, PLACEBOS

__all__ = ["study_keys"]

_HEAD = """# The keys of a study file

What `saeffect run`, `saeffect check` and the commands of single stages read from a YAML file. Keys that are not here
are refused, and so is a key that stands twice. What steering does and measures is explained in
[steering.md](steering.md), how things are tested in [statistics.md](statistics.md). This page is what
`saeffect check --keys` prints.

Paths in the file are relative to the file, wherever one stands; those typed on the command line are relative to the
current folder. A name such as `gpt2` or `org/name` is a hub id, unless something of that name lies beside the file; of
the names that come with the package (`medical`, `glove-wiki-gigaword-100`) none is ever taken for a file: write
`./medical` for yours. Paths in a bundled study are relative to the current folder.
"""

_SECTIONS = (
    ("The file", StudyConfig),
    ("each of `arms`", ArmConfig),
    ("`model`: a name, or a mapping", ModelConfig),
    ("`text`", TextConfig),
    ("each of `text.sources`", TextSource),
    ("`gate`", GateConfig),
    ("`features`", FeaturesConfig),
    ("`coherence`", CoherenceConfig),
    ("`selection`", SelectionConfig),
    ("`steering`: a mapping, or `null` for a study without it", SteeringConfig),
    ("`comparison`", ComparisonConfig),
)


# Keys whose names are registered, not listed in the model.
_REGISTERED: Mapping[str, Mapping[str, object]] = {"placebos": PLACEBOS, "baselines": BASELINES, "outcomes": OUTCOMES}


def study_keys() -> str:
    """A table for the file and one for each kind of mapping in it."""

    def names(key: str) -> str:
        return f"Any of {', '.join(_REGISTERED[key])}." if key in _REGISTERED else ""

    sections = [keys_table(title, model, more=names) for title, model in _SECTIONS]
    return "\n".join(
        [_HEAD, *sections, "`training` has the keys of a [recipe](recipe.md), without `model` and `hook`.\n"]
    )
