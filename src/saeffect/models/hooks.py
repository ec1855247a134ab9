"""Reading and editing activations inside any decoder-only transformers model, by TransformerLens names.

`blocks.{i}.hook_resid_pre` is the residual stream that enters block i, `hook_resid_mid` after its attention,
`hook_resid_post` what leaves it; `hook_attn_out` and `hook_mlp_out` are what the two halves add.

The names follow TransformerLens; the values are the model's own. (With TransformerLens' default
`center_writing_weights` LayerNorm models have their residuals centred: subtract the mean over dimensions
to get those.)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saeffect.errors import ConfigError, ShapeMismatch, unknown_name
from saeffect.models.language_model import LanguageModel

__all__ = ["HOOK_KINDS", "HookPoint", "blocks", "capture", "edited", "parse_hook"]

HOOK_KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")

_BLOCK_PATHS = (
    "model.layers",  # Llama, Mistral, Qwen, Gemma, SmolLM, Phi, OLMo
    "transformer.h",  # GPT-2, GPT-J, Bloom, Falcon
    "gpt_neox.layers",  # Pythia
    "model.decoder.layers",  # OPT
    "model.language_model.layers",  # multimodal wrappers
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn")
_MID_NORM = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")
# Their attention and MLP add the stream themselves, so what they add cannot be told apart.
_ADDS_INSIDE = ("BloomBlock",)

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HookPoint:
    """Where to listen.

    Attributes:
        name: The TransformerLens name.
        layer: Block index, from 0.
        kind: One of `HOOK_KINDS`.
    """

    name: str
    layer: int
    kind: str


class _Reached(BaseException):
    """Ends a forward pass at the hook. Not an Exception, so that no model code swallows it."""


def parse_hook(name: str, n_layers: int | None = None, *, at: str | None = None) -> HookPoint:
    """Read a hook name.

    Raises:
        UnknownName: The kind is not in `HOOK_KINDS`.
        ConfigError: The name has another form, or the model has no such block.

    Example:
        >>> parse_hook("blocks.8.hook_resid_pre").layer
        8
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
    if match is None:
        raise ConfigError(
            f"{name!r} is not a hook name; expected blocks.<layer>.<kind>.",
            at=at,
            fix="for example blocks.8.hook_resid_pre.",
        )
    layer, kind = int(match[1]), match[2]
    if kind not in HOOK_KINDS:
        raise unknown_name("hook kind", kind, HOOK_KINDS, at=at)
    if n_layers is not None and layer >= n_layers:
        raise ConfigError(
            f"{name} needs block {layer}, but the model has {n_layers} (0 to {n_layers - 1}).",
            at=at,
            fix=f"choose a layer below {n_layers}, or the model that the SAE was trained on.",
        )
    return HookPoint(name, layer, kind)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's list of transformer blocks.

    Raises:
        ConfigError: The architecture keeps them in none of the known places.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    for path in _BLOCK_PATHS:
        with contextlib.suppress(AttributeError):
            found = base.get_submodule(path)
            if isinstance(found, nn.ModuleList):
                return found
    raise ConfigError(
        f"{type(base).__name__} keeps its blocks in none of the known places: {', '.join(_BLOCK_PATHS)}.",
        fix="use a decoder-only model of a supported family: Llama, Mistral, Qwen, Gemma, GPT-2, Pythia.",
    )


@torch.inference_mode()
def capture(lm: LanguageModel, hook: str, input_ids: Tensor) -> Tensor:
    """The activation at a hook; the model runs no further than that.

    Args:
        lm: The model.
        hook: TransformerLens name.
        input_ids: Token ids, int64 `[batch, sequence]`, without padding.

    Returns:
        `[batch, sequence, d_model]` in the model's dtype, on its device.

    Raises:
        ConfigError: The model has no such hook.
        ShapeMismatch: `input_ids` has not two axes, or no tokens.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ShapeMismatch(f"token ids have shape {tuple(input_ids.shape)}; expected [batch, sequence], not empty.")
    point = parse_hook(hook, lm.n_layers)
    kept: list[Tensor] = []

    def listen(x: Tensor) -> Tensor:
        kept.append(x)
        raise _Reached

    with _attached(lm.model, point, listen), contextlib.suppress(_Reached):
        lm.model(input_ids=input_ids.to(lm.device), use_cache=False, logits_to_keep=1)
    return kept[0]


@contextlib.contextmanager
def edited(lm: LanguageModel, hook: str, edit: Edit) -> Iterator[None]:
    """While inside, every forward pass has the activation at `hook` replaced by `edit(activation)`.

    `edit` gets and returns `[batch, sequence, d_model]`; it must not change its input in place. The hook is
    removed when the block ends, also after an exception.

    Raises:
        ConfigError: The model has no such hook.
    """
    with _attached(lm.model, parse_hook(hook, lm.n_layers), edit):
        yield


@contextlib.contextmanager
def _attached(model: nn.Module, point: HookPoint, edit: Edit) -> Iterator[None]:
    block = blocks(model)[point.layer]
    module, side = _locate(block, point)
    handles = []
    if point.kind == "hook_resid_mid":
        # The stream itself passes by this norm, so the change is added again to what leaves the block.
        changes: list[Tensor] = []

        def change(x: Tensor) -> Tensor:
            new = edit(x)
            changes[:] = [new - x]
            return new

        handles.append(module.register_forward_pre_hook(_on_input(change), with_kwargs=True))
        handles.append(block.register_forward_hook(_on_output(lambda out: out + changes[0])))
    elif side == "input":
        handles.append(module.register_forward_pre_hook(_on_input(edit), with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(_on_output(edit)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _locate(block: nn.Module, point: HookPoint) -> tuple[nn.Module, Literal["input", "output"]]:
    if point.kind == "hook_resid_pre":
        return block, "input"
    if point.kind == "hook_resid_post":
        return block, "output"
    children = dict(block.named_children())
    # Gemma 2 and 3 and OLMo 2 normalise what each half adds before adding it, and so does GLM 4 under other
    # names; TransformerLens hooks the normalised value.
    post_normed = "post_feedforward_layernorm" in children
    wanted: tuple[str, ...]
    if point.kind == "hook_resid_mid":
        # Where attention and MLP run side by side there is no stream between them. OLMo 2 has no norm before
        # its MLP, which reads the stream as it is.
        raw = post_normed and "pre_feedforward_layernorm" not in children
        wanted = () if getattr(block, "use_parallel_residual", False) else _MLP if raw else _MID_NORM
    elif type(block).__name__ in _ADDS_INSIDE:
        wanted = ()
    elif point.kind == "hook_attn_out":
        wanted = ("post_attention_layernorm",) if post_normed else ("post_self_attn_layernorm", *_ATTENTION)
    else:
        wanted = ("post_feedforward_layernorm",) if post_normed else ("post_mlp_layernorm", *_MLP)
    for name in wanted:
        if name in children:
            return children[name], "input" if point.kind == "hook_resid_mid" else "output"
    raise ConfigError(
        f"{type(block).__name__} has no {point.kind}.",
        at=point.name,
        fix="use hook_resid_pre or hook_resid_post, which every architecture has.",
    )


def _on_input(edit: Edit) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return hook


def _on_output(edit: Edit) -> Callable[..., Any]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook
