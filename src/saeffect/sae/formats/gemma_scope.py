"""SAEs of Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, perhaps with config.json): JumpReLU.

Neither file names a model or a hook; both are parsed from the path, as in the hub's repositories:
`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`, `gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_big`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae
from saeffect.published import named_by_path
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats.weights import fill, read_npz, read_weights, tensor_shapes
from saeffect.sae.jumprelu import JumpReluSae

__all__ = ["GemmaScope"]

_NAMES = {"w_enc": "W_enc", "b_enc": "b_enc", "w_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
_CONTEXT = 1024


class GemmaScope:
    """One of the two layouts; `weights` is the name of its file. See `SaeFormat`."""

    settings = ""

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def matches(self, folder: Path, raw: Any) -> bool:
        del raw
        return (folder / self.weights).is_file()

    def config(self, folder: Path, raw: Any, where: str) -> SaeConfig:
        """BadFile without the five arrays; IncompatibleSae for a transcoder."""
        del raw
        shapes = {name.lower(): shape for name, shape in tensor_shapes(folder / self.weights, where).items()}
        missing = [name for name in _NAMES if name not in shapes]
        if missing:
            raise BadFile(f"{self.weights} has no {missing[0]}; it has: {', '.join(sorted(shapes))}.", at=where)
        path = folder.resolve().as_posix()
        width, d_sae = (*shapes["w_enc"], 0, 0)[:2]
        if len(shapes["w_enc"]) != 2 or len(shapes["w_dec"]) != 2:
            raise BadFile(f"W_enc and W_dec of {self.weights} are no matrices.", at=where)
        if re.search("transcoder|/clt", path) or "affine_skip_connection" in shapes or shapes["w_dec"][-1] != width:
            raise IncompatibleSae(
                "this is a transcoder, which rebuilds the output of an MLP from its input.",
                at=where,
                fix="choose an SAE: res, mlp or att in Gemma Scope, resid_post, mlp_out or attn_out in Gemma Scope 2.",
            )
        metadata = {"trained_by": "Gemma Scope", "prepend_bos": True, "context_size": _CONTEXT} | named_by_path(path)
        return SaeConfig("jumprelu", width, d_sae, apply_b_dec_to_input=False, metadata=metadata)

    def load(self, folder: Path, raw: Any, where: str) -> SparseAutoencoder:
        """The SAE. SAEs of the embedding are rescaled to the input of block 0, which is the embedding times √d_in."""
        cfg, path = self.config(folder, raw, where), folder / self.weights
        stored = read_npz(path, where) if path.suffix == ".npz" else read_weights(path, where, shapes={})
        tensors: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            parameter = _NAMES.get(name.lower())
            if parameter is None and not (name == "scaling_factor" and bool(torch.all(tensor == 1))):
                raise IncompatibleSae(f"{self.weights} holds {name}, whose meaning is not known.", at=where)
            if parameter is not None:
                tensors[parameter] = tensor
        expected = JumpReluSae.shapes(cfg)
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise IncompatibleSae(
                    f"{name} has shape {tuple(tensors[name].shape)}, but W_enc asks for {shape}.", at=where
                )
        if cfg.metadata.get("of_embedding"):
            scale = cfg.d_in**0.5
            tensors |= {"W_enc": tensors["W_enc"] / scale}
            tensors |= {name: tensors[name] * scale for name in ("W_dec", "b_dec")}
        return fill(JumpReluSae(cfg), tensors, self.weights, where)
