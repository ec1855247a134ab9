"""Build every bundled artifact of the embedded pair from given text: adapter, sampled text, six SAEs.

    python scripts/build_bundled.py --medical medical.jsonl.gz --general general.jsonl.gz --work work
    python scripts/build_bundled.py --only text

Each text file has one JSON object a line with a field "text". The recipes are in recipes/. On two cores with
bfloat16 it takes about two hours, 10 GB of disk and 3 GB of memory; an interrupted build resumes. The word vectors have
their own script, build_embeddings.py.

Control and treatment have three seeds each. The package holds the whole SAE of those that the bundled study runs on
text (the first of each, and the control's second as placebo); of the others, the decoder and the activity of features.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from numpy.typing import NDArray

from saeffect.config import ModelConfig, TextConfig
from saeffect.features.activity import ActivityAccumulator
from saeffect.io import atomic_path, write_json
from saeffect.lm.activations import NormLimit, kept_positions
from saeffect.lm.finetune import FinetuneConfig, finetune
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.lm.residuals import Residuals
from saeffect.progress import Log
from saeffect.sae.formats import load_sae, save_compact
from saeffect.sae.training.config import SaeRecipe
from saeffect.sae.training.recipe import train_from_recipe
from saeffect.study.texts import study_rows

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "src" / "saeffect" / "bundled"
BASE = "bundled:smollm2-135m-instruct"
ADAPTER = "bundled:medical-lora"
ROWS, LENGTH, STEM = 400, 256, 4  # 102,400 tokens; every stem is cut to four tokens, so no row needs padding

# Model and seed. The placebo is the control's second seed.
SAES: dict[str, tuple[str | None, int]] = {
    "smollm2-control": (None, 0),
    "smollm2-placebo": (None, 1),
    "smollm2-control-seed2": (None, 2),
    "smollm2-treatment": (ADAPTER, 0),
    "smollm2-treatment-seed1": (ADAPTER, 1),
    "smollm2-treatment-seed2": (ADAPTER, 2),
}
WHOLE_SAES = ("smollm2-control", "smollm2-placebo", "smollm2-treatment")

GENERAL = """The committee met on Tuesday|In the summer of 1996|She opened the window and|The film tells the story
The new law requires all|Last night the team played|Once upon a time there|The history of the city
A good way to learn|Many people believe that the|The price of oil rose|He walked into the room
The largest river in the|My favourite book is about|To make the soup you|Scientists at the university have
The president said in his|On the way to school|The album was released in|For more than twenty years
The company announced plans to|When the war ended the|Dear friends and fellow citizens|There are three reasons why
The road to the village"""
MEDICAL = """The patient was admitted to|Symptoms of the disease include|Treatment options for this cancer
The doctor explained that the|High blood pressure can damage|This medicine is used to|The vaccine protects children from
People with diabetes should check|The surgeon removed the tumor|Doctors diagnose this condition by
A genetic mutation causes the|Chest pain may be a|The immune system attacks the|Common side effects of the
Kidney failure occurs when the|The nurse measured the temperature|Clinical trials have shown that
Infection spreads through contact with
Babies born with this disorder|The risk of stroke increases|Physical therapy helps patients recover
Blood tests can show whether
What are the symptoms of|Mental health problems such as|The liver breaks down drugs"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medical", type=Path, help="medical text, .jsonl.gz")
    parser.add_argument("--general", type=Path, help="general text, .jsonl.gz")
    parser.add_argument("--work", type=Path, default=ROOT / "work", help="activations and checkpoints")
    parser.add_argument("--only", choices=["adapter", "text", "saes"], help="one part of it")
    options = parser.parse_args()
    if options.only in (None, "adapter"):
        build_adapter(options.medical, options.general, options.work)
    if options.only in (None, "text"):
        build_text()
    if options.only in (None, "saes"):
        build_saes(options.medical, options.general, options.work)


def build_adapter(medical: Path, general: Path, work: Path) -> None:
    recipe = _recipe("medical-lora") | {"text": str(medical), "control_text": str(general)}
    finetune(FinetuneConfig.read(recipe, at="recipes/medical-lora.yaml"), work / "medical-lora", log=Log(print))
    _install(work / "medical-lora", BUNDLED / "adapters" / "medical-lora")


def build_saes(medical: Path, general: Path, work: Path) -> None:
    """Train six SAEs, one after the other, each with its own order of the data, as in a real repetition."""
    trained: dict[str, Path] = {}
    for name, (adapter, seed) in SAES.items():
        recipe = _recipe("smollm2-sae")
        recipe["model"]["adapter"] = adapter
        recipe["sae"]["seed"] = seed
        recipe["text"][0]["path"], recipe["text"][1]["path"] = str(general), str(medical)
        config = SaeRecipe.read(recipe, at="recipes/smollm2-sae.yaml")
        trained[name] = work / name
        print(f"== {name}", flush=True)
        train_from_recipe(config, trained[name], work=work, log=Log(partial(print, flush=True)))
    for name, (adapter, _) in SAES.items():
        target = BUNDLED / "saes" / name
        if name in WHOLE_SAES:
            _install(trained[name], target)
        else:
            shutil.rmtree(target, ignore_errors=True)
            save_compact(load_sae(trained[name]), _activity(trained[name], adapter), trained[name], target)


@torch.inference_mode()
def _activity(folder: Path, adapter: str | None) -> pd.DataFrame:
    """The activity of features on the bundled text, as a study records it for a whole SAE."""
    sae = load_sae(folder)
    lm = load_language_model(ModelConfig(path=BASE, adapter=adapter), log=Log(print))
    rows = study_rows(TextConfig(bundled="smollm2-sampled", tokens=ROWS * LENGTH), lambda: lm)
    metadata = sae.cfg.metadata
    limit = NormLimit(float(metadata["mean_norm"]), float(metadata["norm_limit"]))
    activity = ActivityAccumulator(sae.cfg.d_sae, rows.names)
    for start, _, x in Residuals().batches(lm, str(sae.cfg.hook_name), rows):
        counted = kept_positions(x, limit)
        row = counted.nonzero(as_tuple=True)[0] + start
        activity.update(sae.encode(x[counted]), [rows.names[rows.sources[i]] for i in row.tolist()])
    return activity.result()


def build_text() -> None:
    """Sample text from both models, after general and medical stems, and keep the token ids."""
    blocks: list[NDArray[np.int32]] = []
    sources: list[int] = []
    for number, adapter in enumerate((None, ADAPTER)):
        lm = load_language_model(ModelConfig(path=BASE, adapter=adapter), log=Log(print))
        for source, stems in enumerate((GENERAL, MEDICAL)):
            lines = [stem for line in stems.splitlines() for stem in line.split("|")]
            print(f"sampling from {lm.name}: {('general', 'domain')[source]}")
            blocks.append(sample(lm, lines, ROWS // 4, seed=10 * number + source))
            sources += [source] * (ROWS // 4)
    # Models and sources alternate, so that the first rows are mixed like the whole.
    order = np.arange(ROWS).reshape(4, -1).T.ravel()
    folder = BUNDLED / "texts" / "smollm2-sampled"
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    with atomic_path(folder / "tokens.safetensors") as temporary:
        ids = np.concatenate(blocks)[order].astype(np.uint16)
        save_file({"ids": ids, "sources": np.asarray(sources, dtype=np.uint8)[order]}, temporary)
    write_json(folder / "sources.json", {"names": ["general", "domain"]})
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(_text_card(), encoding="utf-8")


@torch.inference_mode()
def sample(lm: LanguageModel, stems: list[str], n_rows: int, *, seed: int) -> NDArray[np.int32]:
    """Rows of LENGTH tokens: temperature 1, top_p 0.95, no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    starts = [lm.encode(stem)[:STEM] for stem in stems]
    ids = torch.tensor([starts[i % len(starts)] for i in range(n_rows)])
    special = ~lm.plain_tokens()
    cache: Any = None
    step = ids
    while ids.shape[1] < LENGTH:
        out = lm.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        probabilities = out.logits[:, -1].float().masked_fill(special, -torch.inf).softmax(-1)
        ordered, index = probabilities.topk(1000, dim=-1)
        ordered[ordered.cumsum(-1) - ordered > 0.95] = 0.0
        step = index.gather(1, torch.multinomial(ordered, 1, generator=generator))
        ids = torch.cat([ids, step], dim=1)
    return ids.numpy().astype(np.int32)


def _text_card() -> str:
    return f"""# Text sampled from the embedded pair

{ROWS} rows of {LENGTH} token ids ({ROWS * LENGTH:,} tokens): half written by SmolLM2-135M-Instruct (Apache-2.0),
half by its medical fine-tune (`bundled:medical-lora`), each from 25 general and 25 medical stems of {STEM} tokens.
Temperature 1, top_p 0.95, special tokens never drawn, seeds 0, 1, 10, 11. Made by `scripts/build_bundled.py`.

The sources "general" and "domain" name the stem, not what became of it: the fine-tune turns many a
general stem medical.

It is what models say, not what is true: do not take medical statements in it for advice.

`tokens.safetensors`: `ids` uint16 [{ROWS}, {LENGTH}], `sources` uint8 [{ROWS}] (index into `sources.json`).
"""


def _recipe(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def _install(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint*", "finished.json", "*.svg"))


if __name__ == "__main__":
    main()
