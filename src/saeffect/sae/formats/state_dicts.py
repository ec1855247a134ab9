"""SAEs saved as a bare state dict (`torch.save`), recognised by their tensors' names, which are converted to ours.

What a state dict does not contain, such as the k of some TopK SAEs or the hook, comes from the settings beside it or
from the list of published SAEs, as `facts`. `LAYOUTS` has those that are known.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeffect.errors import BadFile, IncompatibleSae, NotFound, first_line, placed
from saeffect.sae.base import ARCHITECTURES, SaeConfig, SparseAutoencoder
from saeffect.sae.formats.weights import fill, is_count

__all__ = ["LAYOUTS", "Layout", "PICKLED", "Recognised", "read_pickled", "sae_of_state_dict"]

#: Endings of files that are pickled.
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# Modules and builtins that tensors, counters and plain values need. Unpickling a torch.nn module runs its class's code.
_SAFE_MODULES = ("torch.", "collections.", "numpy.", "_codecs.")
_SAFE_BUILTINS = ("set", "frozenset", "dict", "list", "complex", "bytearray")
_FETCH_AGAIN = "copy or download it again."

Tensors = Mapping[str, Tensor]
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Recognised:
    """A state dict in our terms: `tensors` by our names, `W_enc` `[d_in, d_sae]`."""

    architecture: str
    tensors: dict[str, Tensor]
    subtracts_b_dec: bool = True  # from the input, before the encoder
    layer_norm: bool = False
    k: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # for the metadata


def _dictionary(state: Tensors, _: Facts) -> Recognised:
    """dictionary_learning's AutoEncoder (`bias`) and AutoEncoderNew (`decoder.bias`, not subtracted from the input)."""
    name = "bias" if "bias" in state else "decoder.bias"
    return Recognised("standard", _from_linear(state, state[name]), subtracts_b_dec=name == "bias")


def _dictionary_gated(state: Tensors, _: Facts) -> Recognised:
    tensors = _from_linear(state, state["decoder_bias"]) | {"b_gate": state["gate_bias"], "b_mag": state["mag_bias"]}
    return Recognised("gated", tensors | {"r_mag": state["r_mag"]})


def _dictionary_topk(state: Tensors, facts: Facts) -> Recognised:
    """AutoEncoderTopK and BatchTopKSAE: the same tensors, but BatchTopKSAE is read as a JumpReLU by its threshold."""
    tensors, k, class_name = _from_linear(state, state["b_dec"]), _k(state, facts), str(facts.get("dict_class", ""))
    if "Batch" in class_name:
        return Recognised("jumprelu", tensors | _thresholds(state, tensors), extra={"k": k} if k else {})
    if "threshold" in state and not class_name:
        raise IncompatibleSae(
            "this is AutoEncoderTopK or BatchTopKSAE of dictionary_learning, whose tensors have the same names.",
            fix="put the config.json of its trainer beside it, which says trainer.dict_class.",
        )
    return Recognised("topk", tensors, k=k)


def _dictionary_jumprelu(state: Tensors, facts: Facts) -> Recognised:
    """JumpReluAutoEncoder (one threshold a feature) and MatryoshkaBatchTopKSAE (one in all, b_dec subtracted)."""
    tensors = _by_our_names(state)
    batchtopk = "group_sizes" in state or "BatchTopK" in str(facts.get("dict_class", ""))
    shared = state["threshold"].numel() == 1 or batchtopk
    return Recognised("jumprelu", tensors | _thresholds(state, tensors), subtracts_b_dec=shared)


def _openai(state: Tensors, facts: Facts) -> Recognised:
    """OpenAI's sparse_autoencoder: TopK ones read normalised inputs; the decoder may be the encoder's transpose."""
    decoder = state.get("decoder.weight")
    tensors = {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["latent_bias"],
        "W_dec": state["encoder.weight"] if decoder is None else decoder.T,
        "b_dec": state["pre_bias"],
    }
    activation, options = facts.get("activation", "ReLU"), facts.get("activation_state_dict") or {}
    if activation == "TopK":
        if options.get("postact_fn", "ReLU") != "ReLU":
            raise IncompatibleSae(f"this TopK SAE has postact_fn={options['postact_fn']!r}; supported: ReLU.")
        return Recognised("topk", tensors, layer_norm=True, k=options.get("k"))
    if activation != "ReLU":
        raise IncompatibleSae(f"this SAE has activation={activation!r}; supported: ReLU, TopK.")
    return Recognised("standard", tensors)


def _goodfire(state: Tensors, _: Facts) -> Recognised:
    names = {name.replace("_linear", ""): tensor for name, tensor in state.items()}
    return Recognised("standard", _from_linear(names, names["decoder.bias"]), subtracts_b_dec=False)


def _plain_names(state: Tensors, facts: Facts) -> Recognised:
    """`W_enc`, `b_enc`, `W_dec`, `b_dec` only: a ReLU SAE, or Qwen Scope's TopK, with features on the first axis."""
    topk = facts.get("architecture") == "topk"
    return Recognised(
        "topk" if topk else "standard",
        _by_our_names(state),
        subtracts_b_dec=bool(facts.get("subtracts_b_dec", True)),
        k=_k(state, facts) if topk else None,
    )


class Layout(NamedTuple):
    """A layout: its name, the tensors by which it is recognised, and their conversion."""

    name: str
    tensors: set[str]
    convert: Callable[[Tensors, Facts], Recognised]


_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_GATED = {"encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"}
_OURS = {"W_enc", "b_enc", "W_dec", "b_dec"}
LAYOUTS = (  # in the order in which they are tried
    Layout("openai", {"pre_bias", "latent_bias", "encoder.weight"}, _openai),
    Layout("goodfire", {"encoder_linear.weight"}, _goodfire),
    Layout("dictionary_learning gated", _GATED, _dictionary_gated),
    Layout("dictionary_learning topk", _LINEAR | {"b_dec"}, _dictionary_topk),
    Layout("dictionary_learning", _LINEAR | {"bias"}, _dictionary),
    Layout("dictionary_learning", _LINEAR | {"decoder.bias"}, _dictionary),
    Layout("dictionary_learning jumprelu", _OURS | {"threshold"}, _dictionary_jumprelu),
    Layout("plain names", _OURS, _plain_names),
)


def sae_of_state_dict(state: Tensors, facts: Facts, *, file: str, where: str) -> SparseAutoencoder:
    """The SAE, float32.

    `facts` may have: `architecture`, `k`, `subtracts_b_dec` (from the input), `dict_class`, OpenAI's `activation`, and
    `metadata`; `file` is the file's name, for messages. IncompatibleSae: tensors of no known layout, or whose shapes
    contradict each other. BadFile: not finite, or a TopK SAE whose k is unknown.
    """
    layout = next((layout for layout in LAYOUTS if layout.tensors <= state.keys()), None)
    if layout is None:
        raise IncompatibleSae(
            f"{file} holds the tensors of no known SAE: {', '.join(sorted(state)[:12]) or 'none'}.",
            at=where,
            fix=f"known are those of: {', '.join(dict.fromkeys(layout.name for layout in LAYOUTS))}.",
        )
    with placed(where):
        recognised = layout.convert(state, facts)
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
        apply_b_dec_to_input=recognised.subtracts_b_dec,
        normalize_activations="layer_norm" if recognised.layer_norm else "none",
        metadata={"layout": layout.name, **recognised.extra, **dict(facts.get("metadata") or {})},
    )
    for name, shape in kind.shapes(cfg).items():
        if tuple(tensors[name].shape) != shape:
            raise IncompatibleSae(
                f"{name} of {file} has shape {tuple(tensors[name].shape)}; expected {shape}.", at=where
            )
    return fill(kind(cfg), tensors, file, where).eval().requires_grad_(False)


def _from_linear(state: Tensors, b_dec: Tensor) -> dict[str, Tensor]:
    """Weights of two `nn.Linear`, whose first axis is the output."""
    tensors = {"W_enc": state["encoder.weight"].T, "W_dec": state["decoder.weight"].T, "b_dec": b_dec}
    return tensors | ({"b_enc": state["encoder.bias"]} if "encoder.bias" in state else {})


def _by_our_names(state: Tensors) -> dict[str, Tensor]:
    """The four tensors with our names, the matrices transposed if features are on the encoder's first axis."""
    tensors = {name: state[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    features, width = len(tensors["b_enc"]), len(tensors["b_dec"])
    if features != width and tuple(tensors["W_enc"].shape) == (features, width):
        tensors |= {"W_enc": tensors["W_enc"].T, "W_dec": tensors["W_dec"].T}
    return tensors


def _thresholds(state: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """One threshold a feature; negative ones, as before training, become 0."""
    threshold = state["threshold"].float().clamp_min(0.0)
    return {"threshold": threshold.expand(tensors["W_enc"].shape[1]) if threshold.numel() == 1 else threshold}


def _k(state: Tensors, facts: Facts) -> int | None:
    stored = state.get("k")
    k = int(stored) if stored is not None and torch.numel(stored) == 1 else facts.get("k")
    return k if is_count(k) else None


def read_pickled(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and other values by name, of a file that `torch.save` wrote; a state dict under one of the
    usual keys (`state_dict`, `model`) is opened. NotFound: no such file. BadFile: it would run code, is damaged, or
    holds no state dict.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path.name!r}.", at=where)
    _refuse_compressed(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the protocol's number
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, all of which mean that the file cannot be read
        if calls := _unsafe_calls(path):
            raise BadFile(
                f"{path.name} holds more than weights: reading it would call {calls}.",
                at=where,
                fix="do not load it, unless you trust who made it: then load it with the package that did,"
                " and save its state_dict().",
            ) from error
        informative = isinstance(error, OSError | RuntimeError) or type(error).__name__ == "UnpicklingError"
        why = first_line(error)[:200].rstrip(".") if informative else "torch.save did not write it, or not all of it"
        raise BadFile(f"{path.name} cannot be read: {why}.", at=where, fix=_FETCH_AGAIN) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = (
        {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    )
    if not tensors:
        raise BadFile(f"{path.name} holds no state dict, but {type(content).__name__}.", at=where)
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise BadFile(f"{name} claims more numbers than {path.name} holds of it.", at=where, fix=_FETCH_AGAIN)
    return tensors, {str(key): value for key, value in content.items() if not isinstance(value, Tensor)}


def _refuse_compressed(path: Path, where: str) -> None:
    """BadFile for a compressed archive, which may fill the memory; `torch.save` does not compress."""
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


def _unsafe_calls(path: Path) -> str:
    """Functions and classes, other than those that build tensors, that unpickling would call; "" for none."""
    names: list[str] = []
    try:
        for data in _pickle_data(path):
            names += [name for name in _pickle_globals(data) if _is_unsafe(name)]
    except (OSError, ValueError, IndexError, zipfile.BadZipFile):
        pass  # damaged: the names up to there count
    return ", ".join(dict.fromkeys(names))


def _is_unsafe(name: str) -> bool:
    module, _, function = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return function not in _SAFE_BUILTINS
    return not name.startswith(_SAFE_MODULES) or name.startswith("torch.nn.")


def _pickle_data(path: Path) -> Iterator[bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith(".pkl"):
                    yield archive.read(entry)
    else:
        yield path.read_bytes()


def _pickle_globals(data: bytes) -> Iterator[str]:
    """`module.name` of every global that a pickle looks up; it is parsed, not run."""
    strings: list[str] = []
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif code.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
