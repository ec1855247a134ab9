"""A quality table of the embedded pair's SAEs: reconstruction from their cards, and coherence of their features.

    python scripts/measure_bundled.py                       those that are bundled
    python scripts/measure_bundled.py --saes work           those in other folders of the same names

Coherence is that of the ten top tokens on the cosine scale, with the bundled word vectors, over all features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from saeffect.config import ModelConfig
from saeffect.features.coherence import coherence
from saeffect.features.table import FeatureOptions, feature_table
from saeffect.io import read_json
from saeffect.lm.architectures import unembedding
from saeffect.lm.loading import load_language_model
from saeffect.sae.formats import is_compact, load_compact, load_sae

BUNDLED = Path(__file__).resolve().parents[1] / "src" / "saeffect" / "bundled" / "saes"
MODEL = "bundled:smollm2-135m-instruct"
COLUMNS = ("explained variance", "CE loss score", "l0", "never fire", "coherence defined", "mean coherence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=Path, default=BUNDLED, help="folder of the SAEs' folders")
    folder = parser.parse_args().saes
    print(f"| SAE | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    adapters = {None: "control|placebo", "bundled:medical-lora": "treatment"}
    for adapter, names in adapters.items():
        lm = load_language_model(ModelConfig(path=MODEL, adapter=adapter))
        W_U, tokens, valid = unembedding(lm), lm.token_strings(), lm.plain_tokens()
        for sae_folder in sorted(p for p in folder.iterdir() if any(n in p.name for n in names.split("|"))):
            if not (sae_folder / "cfg.json").is_file():
                continue
            W_dec = (load_compact(sae_folder) if is_compact(sae_folder) else load_sae(sae_folder)).W_dec.detach()
            table = feature_table(W_dec, W_U, tokens, options=FeatureOptions(), valid=valid)
            scores = coherence(table)["coherence"].to_numpy(dtype=np.float64)
            held_out = read_json(sae_folder / "cfg.json")["metadata"]["held_out"]
            cells = [
                f"{held_out['explained_variance']:.4f}",
                f"{held_out['ce_loss_score']:.4f}",
                f"{held_out['l0']:.1f}",
                f"{held_out['dead_share']:.2%}",
                f"{np.isfinite(scores).mean():.1%}",
                f"{np.nanmean(scores):.4f}",
            ]
            print(f"| {sae_folder.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
