"""Train the null fine-tunes of the embedded pair, and copy them into the package.

    python scripts/build_nulls.py --medical medical.jsonl.gz --work work/nulls

The recipe is recipes/medical-lora.yaml except for the size of a step. An hour on two cores with bfloat16; an
interrupted run resumes. Several processes may run it at once on one folder. At the end, finished nulls are copied into
the package, so `--null` may grow from run to run.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from saeffect.diffing.nulls import CARD, null_files, read_nulls
from saeffect.io import atomic_path, read_json
from saeffect.lm.finetune import FinetuneConfig
from saeffect.progress import Log
from saeffect.study.nulls import make_nulls
from saeffect.study.study import Study

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "src" / "saeffect" / "bundled" / "nulls" / "smollm2-medical"
STUDY = "bundled:smollm2-medical"
BATCH_SIZE, CONTEXT_SIZE = 2, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medical", type=Path, required=True, help="medical text, .jsonl.gz")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "nulls", help="adapters and traces")
    parser.add_argument("--null", type=int, default=20, help="how many")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="rows a step; the recipe has 8")
    parser.add_argument("--context-size", type=int, default=CONTEXT_SIZE, help="tokens a row; the recipe has 256")
    parser.add_argument("--install-only", action="store_true", help="only copy finished nulls into the package")
    options = parser.parse_args()
    if not options.install_only:
        texts = {"text": str(options.medical.resolve()), "control_text": None}
        values = yaml.safe_load((ROOT / "recipes" / "medical-lora.yaml").read_text(encoding="utf-8"))
        sizes = {"batch_size": options.batch_size, "context_size": options.context_size}
        config = FinetuneConfig.read(values | texts | sizes, at="medical-lora.yaml")
        log = Log(partial(print, flush=True))
        make_nulls(config, options.work, options.null, study=Study.open(STUDY), keep_adapters=True, log=log)
    install(options.work)


def install(work: Path) -> None:
    """Copy the traces and their card into the package, and write the README."""
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for path in (*null_files(work).values(), work / CARD):
        shutil.copy(path, TARGET)
    with atomic_path(TARGET / "README.md") as temporary:
        temporary.write_text(_readme(read_json(TARGET / CARD)), encoding="utf-8")


def _readme(card: dict[str, Any]) -> str:
    recipe, nulls = card["recipe"], {trace.name: trace for trace in read_nulls(TARGET)}
    tokens = recipe["steps"] * recipe["batch_size"] * recipe["context_size"]
    rows = []
    for name, trace in nulls.items():
        entry = card["nulls"][name.removeprefix("null-")]
        pairs = " | ".join(f"{before:.1f} to {after:.1f}" for before, after in entry["perplexity"].values())
        rows.append(f"| {name} | {entry['text']} | {pairs} | {trace.numbers['kl']:.3f} |")
    kls = [trace.numbers["kl"] for trace in nulls.values()]
    return f"""# {len(nulls)} null fine-tunes of the embedded pair

What {len(nulls)} LoRA fine-tunes of SmolLM2-135M-Instruct changed that were taught nothing new: the recipe of the
adapter `medical-lora` (rank {recipe["rank"]}, alpha {recipe["alpha"]:g}, {recipe["steps"]} steps, peak learning rate
{recipe["learning_rate"]:g}), each with another seed. Made by `scripts/build_nulls.py`.

**They differ from that adapter in one thing besides the text: a step reads {recipe["batch_size"]} rows of
{recipe["context_size"]} tokens instead of 8 of 256** ({tokens:,} in all instead of 266,240), for time.

Each reads its own part of what the base model itself wrote after six stems without a subject (temperature 1, nothing
cut off): on average such text teaches the model nothing.

Each file is a trace on the study's control SAE and the first rows of its text (`saeffect.diffing.trace.Trace`).
Mean KL from the base model: {np.mean(kls):.3f} ({min(kls):.3f} to {max(kls):.3f}) nats a token.

| null | text | perplexity on it | on medical text | KL |
|---|---|---|---|---|
{chr(10).join(rows)}

Perplexities are on 8 held-out rows each, so they are rough. Licence: as the model (Apache-2.0); the files hold
statistics, and token ids of texts that the models wrote: what models say, not what is true.
"""


if __name__ == "__main__":
    main()
