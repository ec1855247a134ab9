"""modeldiffr's feature diff on the fine-tunes of this benchmark, after run.py has trained them.

    python benchmarks/naming/peer_modeldiffr.py --work <folder> --python <python with modeldiffr[hf]>

Smaller than its own settings, which take 40 minutes of one core a fine-tune: see `SETTINGS`. Each fine-tune's result is
kept in the folder, so an interrupted run resumes. run.py puts the counts into its table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pairs import BASE, PAIRS, Pair
from training import adapter_of

from saeffect.config import TextConfig
from saeffect.io import atomic_path, read_json, write_json
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.study.texts import study_rows

SETTINGS = {"max-tokens": 12_000, "dict-size": 1024, "batch-size": 1024, "steps": 1000}
_HERE = Path(__file__).parent
# Products of float32 matrices may be rounded to bfloat16, which some CPUs multiply several times as fast.
_RUN = (
    "import sys, torch; torch.set_float32_matmul_precision('medium'); from modeldiffr.cli import main; sys.exit(main())"
)
_CLASSES = {"new": "derivative_only", "lost": "base_only", "shifted": "shifted", "shared": "shared", "dead": "dead"}


def main() -> None:
    """Run the feature diff where it has not run, and write modeldiffr.json: how many features of each class."""
    options = _options()
    folder = options.work / "modeldiffr"
    base = load_language_model(BASE)
    _save(base, folder / "base")
    _write_text(base, folder / "general.jsonl")
    for pair in PAIRS:
        out = folder / "out" / pair.name
        if (out / "run.json").is_file():
            continue
        _save(load_language_model(adapter_of(pair, options.work)), folder / pair.name)
        settings = [part for key, value in SETTINGS.items() for part in (f"--{key}", str(value))]
        command = ["features", "base", pair.name, "--corpus", "general.jsonl", "--device", "cpu", "--no-weight-hash"]
        subprocess.run(
            [options.python, "-c", _RUN, *command, *settings, "--dtype", options.dtype, "--out", f"out/{pair.name}"],
            cwd=folder,
            check=True,
        )
        shutil.rmtree(folder / pair.name)
        write_json(out / "run.json", {"dtype": options.dtype})
    write_json(_HERE / "modeldiffr.json", {"settings": SETTINGS, "features": counts(folder / "out", PAIRS)})


def counts(folder: Path, pairs: tuple[Pair, ...]) -> dict[str, dict[str, Any]]:
    """Features of each class by fine-tune, of those that were run, and the `dtype` that each was run in."""
    ran = [pair.name for pair in pairs if (folder / pair.name / "run.json").is_file()]
    classes = {name: read_json(folder / name / "features.json")["classes"] for name in ran}
    return {
        name: {ours: classes[name][theirs] for ours, theirs in _CLASSES.items()}
        | {"dtype": read_json(folder / name / "run.json")["dtype"]}
        for name in ran
    }


def _save(lm: LanguageModel, folder: Path) -> None:
    """A model, its adapter merged when it was loaded, as transformers reads it."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def _write_text(lm: LanguageModel, path: Path) -> None:
    """The general rows of the bundled text, as documents."""
    rows = study_rows(TextConfig(bundled="smollm2-sampled", tokens=10**9), lambda: lm, prepend_bos=None)
    general = rows.ids[rows.sources == rows.names.index("general")]
    with atomic_path(path) as temporary:
        texts = (json.dumps({"text": lm.decode(ids.tolist())}) for ids in general)
        temporary.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder of run.py")
    parser.add_argument("--python", default="python", help="a Python that has modeldiffr")
    parser.add_argument("--dtype", default="bfloat16", help="or float32, without bfloat16 products")
    return parser.parse_args()


if __name__ == "__main__":
    main()
