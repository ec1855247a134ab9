"""What harvesting in bfloat16 does to explained variance, on the embedded model, its bundled SAE and bundled text."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["bfloat16_bound"]

HOOK = "blocks.26.hook_resid_pre"


def bfloat16_bound(n_rows: int = 48, rows_a_pass: int = 8) -> dict[str, Any]:
    """Explained variance of the bundled control SAE on activations computed in float32 and in bfloat16.

    The text is the bundled one that the models sampled themselves; the SAE has not been trained on it. The same
    positions count on both sides: those that count in float32.

    Args:
        n_rows: Rows of 256 tokens.
        rows_a_pass: Rows a forward pass.

    Returns:
        `explained_variance` in `float32` and `bfloat16`; their difference, `change`; and
        `error_share_of_variance`, the squared difference of the activations over their variance about the mean.
        `tokens_per_second` of each, on however many threads are set.
    """
    import numpy as np
    import torch
    from safetensors.numpy import load_file

    from saeffect.config import ModelConfig
    from saeffect.lm.activations import first_limit, kept_positions
    from saeffect.lm.hooks import capture
    from saeffect.lm.language_model import fused
    from saeffect.lm.loading import bundled_path, load_language_model
    from saeffect.sae.formats import load_sae
    from saeffect.sae.metrics import ReconstructionSums

    ids = load_file(bundled_path("texts", "smollm2-sampled") / "tokens.safetensors")["ids"][:n_rows].astype(np.int32)
    sae = load_sae(bundled_path("saes", "smollm2-control"))
    models = {
        dtype: load_language_model(ModelConfig(path="bundled:smollm2-135m-instruct", dtype=dtype))
        for dtype in ("float32", "bfloat16")
    }
    limit = first_limit(models["float32"], HOOK, ids[:rows_a_pass])
    reconstruction = {dtype: ReconstructionSums(sae.cfg.d_in) for dtype in models}
    rounding = ReconstructionSums(sae.cfg.d_in)
    seconds = dict.fromkeys(models, 0.0)
    for start in range(0, len(ids), rows_a_pass):
        x = {}
        for dtype, lm in models.items():
            started = time.perf_counter()
            with fused(lm):
                x[dtype] = capture(
                    lm, HOOK, torch.from_numpy(ids[start : start + rows_a_pass].astype(np.int64))
                ).float()
            seconds[dtype] += time.perf_counter() - started
        mask = kept_positions(x["float32"], limit)
        x = {dtype: values[mask] for dtype, values in x.items()}
        rounding.add(x["float32"], x["bfloat16"])
        with torch.inference_mode():
            for dtype, values in x.items():
                reconstruction[dtype].add(values, sae(values))
    explained_variance = {dtype: sums.explained_variance() for dtype, sums in reconstruction.items()}
    return {
        "hook": HOOK,
        "n_tokens": rounding.n_tokens,
        "explained_variance": explained_variance,
        "change": explained_variance["bfloat16"] - explained_variance["float32"],
        "error_share_of_variance": 1 - rounding.explained_variance(),
        "threads": torch.get_num_threads(),
        "tokens_per_second": {dtype: ids.size / elapsed for dtype, elapsed in seconds.items()},
    }
