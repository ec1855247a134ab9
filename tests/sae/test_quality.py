from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saeffect.checksums import save_tensors
from saeffect.lm.harvest import ActivationStore, shard_name
from saeffect.sae.base import SaeConfig
from saeffect.sae.topk import TopKSae
from saeffect.sae.training.quality import training_quality


def test_quality_by_hand(tmp_path: Path) -> None:
    """Feature 0 of three keeps the first dimension; the second dimension is lost."""
    sae = TopKSae(SaeConfig("topk", 2, 3, k=1))
    with torch.no_grad():
        sae.W_enc[0, 0] = 1.0
        sae.W_dec[0, 0] = 1.0
    (tmp_path / "harvest.json").write_text('{"made_by": {}}')
    save_tensors(tmp_path / shard_name(0), {"activations": torch.tensor([[3.0, 4.0], [0.0, 2.0]])})
    quality = training_quality(sae, ActivationStore.open(tmp_path))
    assert quality.explained_variance == pytest.approx(1 - 20 / (2 * 1.5**2 + 2 * 1.0**2))
    assert quality.l0 == 0.5
    assert quality.l2_ratio == pytest.approx((3 / 5 + 0) / 2)
    assert quality.dead_share == pytest.approx(2 / 3)
    assert quality.mean_log10_density == pytest.approx((-0.30103 - 10 - 10) / 3, abs=1e-4)
    assert quality.n_tokens == 2
