"""Compact SAEs, a quarter of the size, for further seeds: the decoder in eight bits and feature statistics."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from saeffect.errors import BadFile, NotFound
from saeffect.io import atomic_path, read_json, write_json
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats.saelens import WEIGHTS, config
from saeffect.sae.formats.weights import read_weights

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CompactSae", "config", "is_compact", "load", "load_compact", "matches", "save_compact", "weights"]

weights = "decoder.safetensors"
_STATISTICS = ("density", "mean_activation", "max_activation")
_LEVELS = 127
_CARD_NOTE = (
    "What lies here is its compact form: the decoder in eight bits, and how often and how strongly each feature"
    " fired. The measures above are of the whole SAE."
)


@dataclass(frozen=True, eq=False)
class CompactSae:
    """The decoder of an SAE and its features' statistics on text. Without an encoder it cannot run on new text.

    Comparisons need no more of further seeds: feature directions, and how often and how strongly features fire. On
    disk: `cfg.json`, SAELens' with `"decoder_only": true` in its metadata, and `decoder.safetensors`:

    | tensor | dtype, shape | what |
    |---|---|---|
    | `W_dec` | int8 `[d_sae, d_in]` | decoder rows, each divided by its scale and rounded |
    | `scale` | float32 `[d_sae]` | largest absolute number of a row / 127 |
    | `b_dec` | float32 `[d_in]` | decoder bias |
    | `density`, `mean_activation`, `max_activation` | float32 `[d_sae]` | see `saeffect.features.activity` |
    """

    cfg: SaeConfig  # of the whole SAE
    W_dec: Tensor  # float32 [d_sae, d_in]; each number within half a `scale` of the original
    b_dec: Tensor  # float32 [d_in]
    # One row a feature: feature (int64), density, mean_activation (NaN where it never fired), max_activation (float64).
    statistics: pd.DataFrame


def is_compact(folder: Path | str) -> bool:
    """Whether a folder holds only a compact SAE."""
    return (Path(folder) / weights).is_file() and not (Path(folder) / WEIGHTS).is_file()


def matches(folder: Path, raw: Any) -> bool:
    del raw
    return is_compact(folder)


def load(folder: Path, raw: Any, where: str) -> NoReturn:
    """Always raises NotFound: there is no encoder."""
    config(folder, raw, where)
    raise NotFound(
        f"there is no {WEIGHTS} beside cfg.json: this is a compact SAE, its decoder alone.",
        at=where,
        fix="list it under more_saes, beside a whole one.",
    )


def save_compact(sae: SparseAutoencoder, statistics: pd.DataFrame, source: Path | str, folder: Path | str) -> Path:
    """Write the compact form of an SAE loaded from its folder `source`, with its model card, to `folder`. `statistics`
    has one row a feature, as `ActivityAccumulator.result` returns. BadFile if the decoder is not finite.
    """
    from safetensors.torch import save_file

    source, folder = Path(source), Path(folder)
    W_dec = sae.W_dec.detach().float().cpu()
    if not bool(torch.isfinite(W_dec).all()):
        raise BadFile("the decoder holds NaN or infinity.", at=str(source))
    scale = W_dec.abs().amax(dim=1) / _LEVELS
    # A row of zeros has no scale: use any.
    quantised = (W_dec / scale.where(scale > 0, torch.ones(()))[:, None]).round().to(torch.int8)
    tensors = {"W_dec": quantised, "scale": scale, "b_dec": sae.b_dec.detach().float().cpu()}
    for name in _STATISTICS:
        tensors[name] = torch.tensor(statistics[name].to_numpy(dtype="float32", copy=True))
    with atomic_path(folder / weights) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    cfg = read_json(source / "cfg.json")
    cfg["metadata"] = {**(cfg.get("metadata") or {}), "decoder_only": True}
    write_json(folder / "cfg.json", cfg)
    if (source / "training.json").is_file():
        with atomic_path(folder / "training.json") as temporary:
            shutil.copyfile(source / "training.json", temporary)
    if (source / "README.md").is_file():
        card = [
            line
            for line in (source / "README.md").read_text(encoding="utf-8").splitlines()
            if not line.startswith("![")  # the figure stays with the whole SAE
        ]
        with atomic_path(folder / "README.md") as temporary:
            temporary.write_text("\n".join([*card, _CARD_NOTE, ""]), encoding="utf-8")
    return folder


def load_compact(folder: Path | str, *, at: str | None = None) -> CompactSae:
    """Read a compact SAE. NotFound: no file; BadFile: damaged or not finite; IncompatibleSae: wrong shapes."""
    import pandas as pd

    folder = Path(folder)
    where = at or str(folder)
    cfg = config(folder, read_json(folder / "cfg.json"), where)
    path = folder / weights
    if not path.is_file():
        raise NotFound(f"there is no {weights} beside cfg.json.", at=where, fix="is it a whole SAE?")
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (cfg.d_sae, cfg.d_in), "scale": (cfg.d_sae,), "b_dec": (cfg.d_in,)}
    shapes |= dict.fromkeys(_STATISTICS, (cfg.d_sae,))
    tensors = read_weights(path, where, shapes=shapes, required=tuple(shapes), dtypes={"W_dec": ("I8",)})
    for name in shapes:
        # A feature that never fired has no mean activation; everything else is a number.
        if name != "mean_activation" and not bool(torch.isfinite(tensors[name].float()).all()):
            raise BadFile(f"{name} holds NaN or infinite values.", at=where)
    statistics = pd.DataFrame({"feature": range(cfg.d_sae)}, dtype="int64")
    for name in _STATISTICS:
        statistics[name] = tensors[name].double().numpy()
    W_dec = tensors["W_dec"].float() * tensors["scale"].float()[:, None]
    return CompactSae(cfg, W_dec, tensors["b_dec"].float(), statistics)
