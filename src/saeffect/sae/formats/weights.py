"""Tensors of an SAE's file, read only if their shapes are those of its cfg.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from saeffect.checksums import NPZ_ERRORS, npz_shapes, open_tensors
from saeffect.errors import BadFile, IncompatibleSae, first_line
from saeffect.sae.base import SparseAutoencoder

__all__ = [
    "by_side",
    "decoder_dtype",
    "fill",
    "is_count",
    "joined",
    "read_npz",
    "read_weights",
    "sides_of",
    "tensor_shapes",
]

AnySae = TypeVar("AnySae", bound=SparseAutoencoder)

_FLOATS = ("F64", "F32", "F16", "BF16")


def read_weights(
    path: Path,
    where: str,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    required: tuple[str, ...] = (),
    dtypes: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Tensor]:
    """Read all tensors of a file. Memory is bounded by the file's size, whatever sizes cfg.json claims.

    `shapes`, by name, are checked before anything is read; tensors of other names may have any shape. `required` names
    must be present. `dtypes`: allowed dtypes by name, as safetensors writes them; floats for the other names in
    `shapes`. BadFile: truncated or malformed, a missing name, another dtype. IncompatibleSae: another shape.
    """
    with open_tensors(path, path.name, at=where, fix="copy or download it again.") as file:
        names = sorted(file.keys())
        missing = [name for name in required if name not in names]
        if missing:
            raise BadFile(f"{path.name} has no {missing[0]}; it has: {', '.join(names[:20]) or 'nothing'}.", at=where)
        for name in (name for name in shapes if name in names):
            part = file.get_slice(name)
            if tuple(part.get_shape()) != shapes[name]:
                raise IncompatibleSae(
                    f"{name} has shape {tuple(part.get_shape())}, but cfg.json asks for {shapes[name]}.",
                    at=where,
                    fix="cfg.json and the weights belong to different SAEs; find the pair.",
                )
            allowed = (dtypes or {}).get(name, _FLOATS)
            if part.get_dtype() not in allowed:
                raise BadFile(f"{name} holds {part.get_dtype()}; expected {' or '.join(allowed)}.", at=where)
        return {name: file.get_tensor(name) for name in names}


def tensor_shapes(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name in a safetensors or .npz file, from its headers; BadFile as `read_weights` and `read_npz`."""
    if path.suffix != ".npz":
        with open_tensors(path, path.name, at=where, fix="copy or download it again.") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    try:
        return npz_shapes(path)
    except NPZ_ERRORS as error:
        raise _unreadable(path, where, error) from error


def decoder_dtype(path: Path, where: str) -> str:
    """The dtype of the decoder in a safetensors or .npz file, such as "float32"."""
    if path.suffix == ".npz":
        return str(read_npz(path, where)["W_dec"].dtype).removeprefix("torch.")
    with open_tensors(path, path.name, at=where, fix="copy or download it again.") as file:
        names = sorted(file.keys())
        name = next((name for name in ("W_dec", "decoder.weight", "w_dec") if name in names), None)
        if name is None:
            raise BadFile(f"{path.name} has no W_dec; it has: {', '.join(names[:20]) or 'nothing'}.", at=where)
        return str(file.get_tensor(name).dtype).removeprefix("torch.")


def read_npz(path: Path, where: str) -> dict[str, Tensor]:
    """The arrays of a NumPy archive as tensors. BadFile: truncated, not an archive, Python objects, or arrays far
    larger than the file.
    """
    import numpy as np

    try:
        npz_shapes(path)
        with np.load(path, allow_pickle=False) as archive:  # objects would be pickled
            return {name: torch.from_numpy(np.atleast_1d(archive[name])) for name in archive.files}
    except NPZ_ERRORS as error:
        raise _unreadable(path, where, error) from error


def _unreadable(path: Path, where: str, error: Exception) -> BadFile:
    return BadFile(
        f"{path.name} cannot be read: {first_line(error).rstrip('.')}.", at=where, fix="copy or download it again."
    )


def fill(sae: AnySae, tensors: Mapping[str, Tensor], file: str, where: str) -> AnySae:
    """The SAE, with tensors copied into its parameters and buffers by name; BadFile if one is missing or not finite."""
    for name, target in (*sae.named_parameters(), *sae.named_buffers()):
        if name not in tensors:
            raise BadFile(f"{file} has no {name}; it has: {', '.join(sorted(tensors))}.", at=where)
        if not torch.isfinite(tensors[name]).all():
            raise BadFile(
                f"{name} holds NaN or infinite values.", at=where, fix="the training run diverged; use another."
            )
        with torch.no_grad():
            target.copy_(tensors[name].float())
    return sae


# The axis of the input's width, in the parameters that have it.
_WIDTH = {"W_enc": -2, "W_dec": -1, "b_dec": -1}


def sides_of(kind: type[SparseAutoencoder], name: str) -> dict[str, int]:
    """Names under which a parameter is stored, and the axis along which those tensors are concatenated.

    Example:
        >>> from saeffect.sae.crosscoder import L1CrosscoderSae
        >>> sides_of(L1CrosscoderSae, "W_dec"), sides_of(L1CrosscoderSae, "b_enc")
        ({'W_dec_base': -1, 'W_dec_tuned': -1}, {'b_enc': 0})
    """
    if name not in _WIDTH or not kind.sides:
        return {name: 0}
    return {f"{name}_{side}": _WIDTH[name] for side in kind.sides}


def by_side(kind: type[SparseAutoencoder], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are stored: a crosscoder's are split into one for each model."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = sides_of(kind, name)
        parts = tensor.chunk(len(names), dim=next(iter(names.values()))) if len(names) > 1 else (tensor,)
        stored |= {part: value.contiguous() for part, value in zip(names, parts, strict=True)}
    return stored


def joined(kind: type[SparseAutoencoder], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `by_side`."""
    result = dict(tensors)
    for name in _WIDTH if kind.sides else ():
        names = sides_of(kind, name)
        result[name] = torch.cat([result.pop(part) for part in names], dim=_WIDTH[name])
    return result


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number above 0 (true is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
