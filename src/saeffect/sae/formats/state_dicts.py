"""SAEs saved as a bare state dict (`torch.save`), told apart by the names of their tensors and normalised to ours.

What a state dict does not say, such as the k of some TopK SAEs or the hook, comes from the settings beside it or from
the list of published SAEs, as `facts`. The order of `LAYOUTS` is that in which they are asked.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae, NotFound, first_line, placed
from saeffect.sae.base import ARCHITECTURES, SaeConfig, SparseAutoencoder
from saeffect.sae.formats.weights import fill, is_count

__all__ = ["LAYOUTS", "PICKLED", "Recognised", "read_pickled", "sae_of_state_dict"]

#: Endings of files that are pickled.
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# State dicts hold tensors, counters and plain values. A torch.nn module runs the code of its class.
_HARMLESS = ("torch.", "collections.", "numpy.", "_codecs.")
_PLAIN = ("set", "frozenset", "dict", "list", "complex", "bytearray")
_FETCH_AGAIN = "copy or download it again."

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Recognised:
    """A state dict in our terms: `tensors` by our names, `W_enc` `[d_in, d_sae]`."""

    architecture: str
    tensors: dict[str, Tensor]
    takes_off: bool = True  # b_dec is taken off the input first
    layer_norm: bool = False
    k: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # for the metadata


def _dictionary(found: Tensors, facts: Mapping[str, Any]) -> Recognised | None:
    """dictionary_learning's AutoEncoder (`bias`) and AutoEncoderNew (`decoder.bias`, which stays on the input)."""
    del facts
    if not {"encoder.weight", "encoder.bias", "decoder.weight"} <= set(found):
        return None
    name = next((name for name in ("bias", "decoder.bias") if name in found), None)
    if name is None:
        return None
    return Recognised("standard", _linear(found, found[name]), takes_off=name == "bias")


def _dictionary_gated(found: Tensors, facts: Mapping[str, Any]) -> Recognised | None:
    del facts
    if not {"encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"} <= set(found):
        return None
    tensors = _linear(found, found["decoder_bias"]) | {"b_gate": found["gate_bias"], "b_mag": found["mag_bias"]}
    return Recognised("gated", tensors | {"r_mag": found["r_mag"]})


def _dictionary_topk(found: Tensors, facts: Mapping[str, Any]) -> Recognised | None:
    """AutoEncoderTopK and BatchTopKSAE: the same tensors, but the second one is read with its threshold."""
    if not {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"} <= set(found):
        return None
    tensors, k, named = _linear(found, found["b_dec"]), _k(found, facts), str(facts.get("dict_class", ""))
    if "Batch" in named:
        return Recognised("jumprelu", tensors | _threshold(found, tensors), extra={"k": k} if k else {})
    if "threshold" in found and not named:
        raise IncompatibleSae(
            "this is AutoEncoderTopK or BatchTopKSAE of dictionary_learning, whose tensors have the same names.",
            fix="put the config.json of its trainer beside it, which says trainer.dict_class.",
        )
    return Recognised("topk", tensors, k=k)


def _dictionary_jumprelu(found: Tensors, facts: Mapping[str, Any]) -> Recognised | None:
    """JumpReluAutoEncoder (one threshold a feature) and MatryoshkaBatchTopKSAE (one for all, b_dec off the input)."""
    if not {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} <= set(found):
        return None
    tensors = _plain(found)
    one = found["threshold"].numel() == 1 or "group_sizes" in found or "BatchTopK" in str(facts.get("dict_class", ""))
    return Recognised("jumprelu", tensors | _threshold(found, tensors), takes_off=one)


def _openai(found: Tensors, facts: Mapping[str, Any]) -> Recognised | None:
    """OpenAI's sparse_autoencoder: TopK ones read normalised inputs; the decoder may be the encoder's transpose."""
    if not {"pre_bias", "latent_bias", "encoder.weight"} <= set(found):
        return None
    decoder = found.get("decoder.weight")
    tensors = {
        "W_enc": found["encoder.weight"].T,
        "b_enc": found["latent_bias"],
        "W_dec": found["encoder.weight"] if decoder is None else decoder.T,
        "b_dec": found["pre_bias"],
    }
    named, state = facts.get("activation", "ReLU"), facts.get("activation_state_dict") or {}
    if named == "TopK":
        if state.get("postact_fn", "ReLU") != "ReLU":
            raise IncompatibleSae(f"this TopK SAE has postact_fn={state['postact_fn']!r}; supported: ReLU.")
        return Recognised("topk", tensors, layer_norm=True, k=state.get("k"))
    if named != "ReLU":
        raise IncompatibleSae(f"this SAE has activation={named!r}; supported: ReLU, TopK.")
    return Recognised("standard", tensors)


def _goodfire(found: Tensors, facts: Mapping[str, Any]) -> Recognised | None:
    del facts
    if "encoder_linear.weight" not in found:
        return None
    names = {name.replace("_linear", ""): tensor for name, tensor in found.items()}
    return Recognised("standard", _linear(names, names["decoder.bias"]), takes_off=False)


def _plain_names(found: Tensors, facts: Mapping[str, Any]) -> Recognised | None:
    """`W_enc`, `b_enc`, `W_dec`, `b_dec` alone: a ReLU, or the TopK with features first of Qwen Scope."""
    if not {"W_enc", "b_enc", "W_dec", "b_dec"} <= set(found):
        return None
    if facts.get("architecture") == "topk":
        return Recognised("topk", _plain(found), takes_off=bool(facts.get("takes_off", True)), k=_k(found, facts))
    return Recognised("standard", _plain(found), takes_off=bool(facts.get("takes_off", True)))


#: By name: from the tensors and the facts to what they are, or None.
LAYOUTS: dict[str, Callable[[Tensors, Mapping[str, Any]], Recognised | None]] = {
    "openai": _openai,
    "goodfire": _goodfire,
    "dictionary_learning gated": _dictionary_gated,
    "dictionary_learning topk": _dictionary_topk,
    "dictionary_learning": _dictionary,
    "dictionary_learning jumprelu": _dictionary_jumprelu,
    "plain names": _plain_names,
}


def sae_of_state_dict(found: Tensors, facts: Mapping[str, Any], *, file: str, where: str) -> SparseAutoencoder:
    """The SAE, float32.

    `facts` say what is known besides: `architecture`, `k`, `takes_off` (of b_dec, from the input), `dict_class`,
    OpenAI's `activation`, and `metadata`; `file` is its name, for messages. IncompatibleSae: tensors of no known
    layout, or whose shapes contradict each other. BadFile: not finite, or a TopK SAE whose k is unknown.
    """
    recognised, layout = None, ""
    for layout, recognise in LAYOUTS.items():  # noqa: B007 - the name is used below
        with placed(where):
            recognised = recognise(found, facts)
        if recognised is not None:
            break
    if recognised is None:
        raise IncompatibleSae(
            f"{file} holds the tensors of no known SAE: {', '.join(sorted(found)[:12]) or 'none'}.",
            at=where,
            fix=f"known are those of: {', '.join(LAYOUTS)}.",
        )
    tensors = recognised.tensors
    if tensors["W_enc"].ndim != 2:
        raise IncompatibleSae(f"W_enc has shape {tuple(tensors['W_enc'].shape)}; expected two axes.", at=where)
    d_in, d_sae = tensors["W_enc"].shape
    kind = ARCHITECTURES[recognised.architecture]
    if recognised.architecture == "topk" and not (is_count(recognised.k) and recognised.k <= d_sae):
        raise BadFile(
            f"{file} is a TopK SAE, but nothing says its k. Got {recognised.k!r}.",
            at=where,
            fix="give it: saeffect convert-sae ... --k 64.",
        )
    cfg = SaeConfig(
        recognised.architecture,
        d_in,
        d_sae,
        k=recognised.k,
        apply_b_dec_to_input=recognised.takes_off,
        normalize_activations="layer_norm" if recognised.layer_norm else "none",
        metadata={"layout": layout, **recognised.extra, **dict(facts.get("metadata") or {})},
    )
    for name, shape in kind.shapes(cfg).items():
        if tuple(tensors[name].shape) != shape:
            raise IncompatibleSae(
                f"{name} of {file} has shape {tuple(tensors[name].shape)}; expected {shape}.", at=where
            )
    return fill(kind(cfg), tensors, file, where).eval().requires_grad_(False)


def _linear(found: Tensors, b_dec: Tensor) -> dict[str, Tensor]:
    """Weights of two `nn.Linear`, each with its outputs first."""
    tensors = {"W_enc": found["encoder.weight"].T, "W_dec": found["decoder.weight"].T, "b_dec": b_dec}
    return tensors | ({"b_enc": found["encoder.bias"]} if "encoder.bias" in found else {})


def _plain(found: Tensors) -> dict[str, Tensor]:
    """Tensors by our names, turned if features come first in the encoder."""
    tensors = {name: found[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    features, width = len(tensors["b_enc"]), len(tensors["b_dec"])
    if features != width and tuple(tensors["W_enc"].shape) == (features, width):
        tensors |= {"W_enc": tensors["W_enc"].T, "W_dec": tensors["W_dec"].T}
    return tensors


def _threshold(found: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """One threshold a feature; an untrained one, below zero, lets all positive activations pass."""
    threshold = found["threshold"].float().clamp_min(0.0)
    return {"threshold": threshold.expand(tensors["W_enc"].shape[1]) if threshold.numel() == 1 else threshold}


def _k(found: Tensors, facts: Mapping[str, Any]) -> int | None:
    own = found.get("k")
    known = int(own) if own is not None and torch.numel(own) == 1 else facts.get("k")
    return known if is_count(known) else None


def read_pickled(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and other values by name, of a file that `torch.save` wrote; a state dict under one of the
    usual keys (`state_dict`, `model`) is opened. NotFound: no such file. BadFile: it would run code, is damaged, or
    holds no state dict.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path.name!r}.", at=where)
    _refuse_packed(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the protocol's number
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: whatever stops it, the file is none that can be read
        if called := _called(path):
            raise BadFile(
                f"{path.name} holds more than weights: reading it would call {called}.",
                at=where,
                fix="do not load it, unless you trust who made it: then load it with the package that did,"
                " and save its state_dict().",
            ) from error
        says_why = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "UnpicklingError"
        why = first_line(error)[:200].rstrip(".") if says_why else "torch.save did not write it, or not all of it"
        raise BadFile(f"{path.name} cannot be read: {why}.", at=where, fix=_FETCH_AGAIN) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    tensors = {str(k): v.detach() for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, dict) else {}
    if not tensors:
        raise BadFile(f"{path.name} holds no state dict, but {type(held).__name__}.", at=where)
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise BadFile(f"{name} claims more numbers than {path.name} holds of it.", at=where, fix=_FETCH_AGAIN)
    return tensors, {str(key): value for key, value in held.items() if not isinstance(value, Tensor)}


def _refuse_packed(path: Path, where: str) -> None:
    """Refuse an archive that takes more memory than disk; `torch.save` packs nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            taken = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):  # reading it will tell
        return
    if taken > path.stat().st_size:
        raise BadFile(
            f"{path.name} would take {taken:,} bytes of memory, which the file does not hold.",
            at=where,
            fix=_FETCH_AGAIN,
        )


def _called(path: Path) -> str:
    """Functions and classes that reading a pickle would call, apart from those that build tensors; "" for none."""
    names: list[str] = []
    try:
        for data in _programs(path):
            names += [name for name in _globals(data) if _runs(name)]
    except (OSError, ValueError, IndexError, zipfile.BadZipFile):
        pass  # damaged: what was found up to there counts
    return ", ".join(dict.fromkeys(names))


def _runs(name: str) -> bool:
    module, _, function = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return function not in _PLAIN
    return not name.startswith(_HARMLESS) or name.startswith("torch.nn.")


def _programs(path: Path) -> Iterator[bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith(".pkl"):
                    yield archive.read(entry)
    else:
        yield path.read_bytes()


def _globals(data: bytes) -> Iterator[str]:
    """`module.name` of everything that a pickle looks up; it is only parsed."""
    strings: list[str] = []
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif code.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
