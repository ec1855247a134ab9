"""The bundled study with less text and fewer interventions: every stage on the real models, in two minutes.

python scripts/reduced_demo.py runs/reduced
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import yaml

from saeffect.diffing import trace, written
from saeffect.progress import Log
from saeffect.study.run import run_study
from saeffect.study.stages import push, put_back
from saeffect.study.study import Study


def main(out: Path) -> None:
    config = yaml.safe_load(Study.open("bundled:smollm2-medical").source.read_text(encoding="utf-8"))
    config["name"] = "smollm2-medical-reduced"
    config["text"] |= {"context_size": 32, "tokens": 1280}
    config["gate"]["tokens"] = 256
    # One further SAE of the base model is enough to separate fine-tuning from seeds.
    del config["arms"]["placebo"], config["arms"]["treatment"]["more_saes"]
    # Null fine-tunes are measured on more rows than this.
    config["nulls"], config["changes"] = None, {"rows": 16}
    config["put_back"] = {"rows": 2, "tokens_per_row": 16, "sizes": [20], "sizes_reversed": [20]}
    trace.NEW_TOKENS = written.NEW_TOKENS = 4
    # One dose: with so few texts a search may find no dose that works.
    config["steering"] |= {"max_features": 4, "search_prompts": [], "doses": [0.4], "samples": 1}
    config["steering"] |= {"max_new_tokens": 6, "baseline_features": 1, "prompts": config["steering"]["prompts"][:4]}
    config["comparison"] = {"n_boot": 200, "n_permutations": 500}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for module in (trace, written, put_back, push):
            stack.enter_context(patch.object(module, "OPENINGS", trace.OPENINGS[-6:]))
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        run = run_study(Study.open(path), out, log=Log(partial(print, flush=True)))
    report = run.path("report.html")
    assert report.stat().st_size > 100_000, "the report is too small to be one"
    print(f"report: {report}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
