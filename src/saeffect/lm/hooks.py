"""Read and edit activations inside any decoder-only transformers model, by TransformerLens names (see `HookPoint`)."""

from __future__ import annotations

import contextlib
import math
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saeffect.errors import ConfigError, IncompatibleSae, ShapeMismatch, unknown_name
from saeffect.lm.architectures import HOOK_Z, HookMapping, blocks, hook_width, mapping_of, output_projection
from saeffect.lm.language_model import LanguageModel, probe_logits, replaced_forwards, undefined_numbers

__all__ = [
    "HOOK_KINDS",
    "HookPoint",
    "Rest",
    "capture",
    "edited",
    "hook_of_module",
    "parse_hook",
    "recorded",
    "require_module_output",
]

_RESIDUAL_KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
HOOK_KINDS = (*_RESIDUAL_KINDS, HOOK_Z)
_USE_RESIDUAL = "use hook_resid_pre or hook_resid_post, which every architecture has."

# For each model, block and hook kind: the factor with which the module's output enters the residual stream; NaN where
# the stream is not such a sum.
_FACTORS: weakref.WeakKeyDictionary[nn.Module, dict[int, dict[str, float]]] = weakref.WeakKeyDictionary()

Edit = Callable[[Tensor], Tensor]
Side = Literal["input", "output"]


@dataclass(frozen=True)
class HookPoint:
    """A place to read or edit: a TransformerLens name, its block (from 0), and one of `HOOK_KINDS`.

    `blocks.{i}.hook_resid_pre` is the residual stream that enters block i, `hook_resid_mid` the stream after its
    attention, `hook_resid_post` the stream that leaves it; `hook_attn_out` and `hook_mlp_out` are what attention and
    MLP add; `attn.hook_z` is the input of attention's output projection, the heads concatenated (TransformerLens has
    an axis for them). Values are the model's own: for those of TransformerLens' default `center_writing_weights`
    (LayerNorm models) subtract the mean over dimensions. Other hooks than those of the stream are refused unless, on a
    few tokens, the stream is measured to be the sum of what entered and what attention and MLP add.
    """

    name: str
    layer: int
    kind: str


class _Reached(BaseException):
    """Ends a forward pass at the hook. Not an Exception, so that no model code swallows it."""


def parse_hook(name: str, n_layers: int | None = None, *, at: str | None = None) -> HookPoint:
    """Parse a hook name, or a module's name that `hook_of_module` knows. UnknownName: the kind is not in `HOOK_KINDS`;
    ConfigError: the name has another form, or the model has no such block.

    Example:
        >>> parse_hook("blocks.8.hook_resid_pre").layer
        8
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(attn\.hook_z|\w+)", hook_of_module(name) or name)
    if match is None:
        other_hook = re.fullmatch(r"blocks\.\d+\.(\w+\.)+\w+|ln_final\.\w+|hook_\w+", name)
        raise ConfigError(
            f"TransformerLens' hook {name!r} is not supported; supported in each block: {', '.join(HOOK_KINDS)}."
            if other_hook
            else f"{name!r} is not a hook name; expected blocks.<layer>.<kind>.",
            at=at,
            fix="use an SAE of the residual stream." if other_hook else "for example blocks.8.hook_resid_pre.",
        )
    layer, kind = int(match[1][:9]), match[2]
    if kind not in HOOK_KINDS:
        raise unknown_name("hook kind", kind, HOOK_KINDS, at=at)
    if n_layers is not None and layer >= n_layers:
        raise ConfigError(
            f"{name} needs block {layer}, but the model has {n_layers} (0 to {n_layers - 1}).",
            at=at,
            fix=f"choose a layer below {n_layers}, or the model that the SAE was trained on.",
        )
    return HookPoint(name, layer, kind)


def hook_of_module(path: str) -> str | None:
    """TransformerLens' name for the output of a transformers module; None unless it is a block, attention or MLP.

    Example:
        >>> hook_of_module("model.layers.8"), hook_of_module("transformer.h.3.mlp"), hook_of_module("lm_head")
        ('blocks.8.hook_resid_post', 'blocks.3.hook_mlp_out', None)
    """
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(\w+))?", path)
    if match is None:
        return None
    usual = HookMapping()
    kinds = dict.fromkeys(usual.mlp_out, "hook_mlp_out") | dict.fromkeys(usual.attn_out, "hook_attn_out")
    kind = kinds.get(match[2]) if match[2] else "hook_resid_post"
    return f"blocks.{match[1]}.{kind}" if kind else None


def require_module_output(lm: LanguageModel, path: str, *, at: str) -> None:
    """IncompatibleSae if a module's output, such as that of "layers.8.mlp", is not the tensor at its hook: Gemma 2
    and 3, for example, normalise the MLP's output, and `hook_mlp_out` is the normalised value that they add.
    """
    point = parse_hook(hook_of_module(path) or path, lm.n_layers, at=at)
    if point.kind not in ("hook_attn_out", "hook_mlp_out"):
        return
    module = dict(blocks(lm.model)[point.layer].named_children()).get(path.rpartition(".")[2])
    if _locate_module(lm.model, point)[0] is not module or _factor(lm.model, point) != 1.0:
        raise IncompatibleSae(
            f"the SAE reads what {path} gives, but {lm.name} normalises or scales that before adding it,"
            f" and {point.name} is what it adds.",
            at=at,
            fix="use an SAE of the residual stream.",
        )


@torch.inference_mode()
def capture(lm: LanguageModel, hook: str, input_ids: Tensor) -> Tensor:
    """The activation at a hook, `[batch, sequence, d_model]` in the model's dtype; later blocks do not run.

    ConfigError: no such hook, or activations that its dtype cannot hold. ShapeMismatch: `input_ids`, int64, are not
    `[batch, sequence]` (without padding), or empty.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ShapeMismatch(f"token ids have shape {tuple(input_ids.shape)}; expected [batch, sequence], not empty.")
    point = parse_hook(hook, lm.n_layers)
    captured: list[Tensor] = []

    def listen(x: Tensor) -> Tensor:
        captured.append(x)
        raise _Reached

    with _attach(lm.model, point, listen), contextlib.suppress(_Reached):
        lm.model(input_ids=input_ids.to(lm.device), use_cache=False, logits_to_keep=1)
    if not torch.isfinite(captured[0]).all():
        raise undefined_numbers(lm, f"activations of {lm.name} are not finite at {hook}", at=hook)
    return captured[0]


@contextlib.contextmanager
def edited(lm: LanguageModel, hook: str, edit: Edit) -> Iterator[None]:
    """While the block runs, every forward pass replaces the activation at `hook` by `edit(activation)`, which takes
    and returns `[batch, sequence, d_model]` and must not change its input. ConfigError: no such hook.
    """
    with _attach(lm.model, parse_hook(hook, lm.n_layers), edit):
        yield


@contextlib.contextmanager
def recorded(lm: LanguageModel, *hooks: str) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds, while the block runs, the latest pass's `[batch, sequence, d_model]` for each hook."""
    activations: dict[str, Tensor] = {}

    def keep(hook: str) -> Edit:
        def edit(x: Tensor) -> Tensor:
            activations[hook] = x
            return x

        return edit

    with contextlib.ExitStack() as stack:
        for hook in dict.fromkeys(hooks):
            stack.enter_context(edited(lm, hook, keep(hook)))
        yield activations


@contextlib.contextmanager
def _attach(model: nn.Module, point: HookPoint, edit: Edit) -> Iterator[None]:
    module, side = _locate_module(model, point)
    factor = _factor(model, point)
    if factor != 1.0:  # the block scales the module's output before adding it
        inner = edit
        edit = lambda x: inner(factor * x) / factor  # noqa: E731
    with contextlib.ExitStack() as stack:
        if point.kind == "hook_resid_mid":
            # The stream bypasses this norm, so the change is added again to the block's output.
            changes: list[Tensor] = []

            def change(x: Tensor) -> Tensor:
                new = edit(x)
                changes[:] = [new - x]
                return new

            _hook_on(stack, module, side, change)
            _hook_on(stack, blocks(model)[point.layer], "output", lambda out: out + changes[0])
        else:
            _hook_on(stack, module, side, edit)
        yield


def _hook_on(
    stack: contextlib.ExitStack, module: nn.Module, side: Side, edit: Edit, *, before_others: bool = False
) -> None:
    """Edit a module's first input or output until the stack closes; after the edits that are there, or before them."""

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (apply(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": apply(kwargs["hidden_states"])}

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (apply(output[0]), *output[1:]) if isinstance(output, tuple) else apply(output)

    def apply(x: Tensor) -> Tensor:
        new = edit(x)
        # In a model that is spread over devices, the next module may be on another device than the edit.
        return new.to(x.device) if isinstance(x, Tensor) else new

    if side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=before_others)
    else:
        handle = module.register_forward_hook(on_output, prepend=before_others)
    stack.callback(handle.remove)


def _locate_module(model: nn.Module, point: HookPoint) -> tuple[nn.Module, Side]:
    """The module of a hook, and whether the hook is the module's input or output."""
    block = blocks(model)[point.layer]
    if point.kind == "hook_resid_pre":
        return block, "input"
    if point.kind == "hook_resid_post":
        return block, "output"
    if point.kind == HOOK_Z:
        return output_projection(model, point.layer), "input"
    mapping = mapping_of(model)
    names = {
        "hook_attn_out": mapping.attn_out,
        "hook_mlp_out": mapping.mlp_out,
        # Where attention and MLP run in parallel there is no stream between them.
        "hook_resid_mid": () if getattr(block, "use_parallel_residual", False) else mapping.resid_mid,
    }[point.kind]
    children = dict(block.named_children())
    for name in names:
        if name in children:
            return children[name], "input" if point.kind == "hook_resid_mid" else "output"
    raise ConfigError(f"{type(block).__name__} has no {point.kind}.", at=point.name, fix=_USE_RESIDUAL)


def _factor(model: nn.Module, point: HookPoint) -> float:
    """The factor with which the output of the hook's module enters the stream; measured once for each model."""
    if point.kind in ("hook_resid_pre", "hook_resid_post", HOOK_Z):
        return 1.0
    factors = _FACTORS.setdefault(model, {})
    if point.layer not in factors:
        factors |= _measure_factors(model)
    factor = factors.get(point.layer, {}).get(point.kind, math.nan)
    if math.isnan(factor):
        raise ConfigError(
            f"{type(blocks(model)[point.layer]).__name__} does not add up by its {point.kind}: the residual stream is"
            " not what was before plus what attention and MLP give.",
            at=point.name,
            fix=_USE_RESIDUAL,
        )
    return factor


@torch.no_grad()
def _measure_factors(model: nn.Module) -> dict[int, dict[str, float]]:
    """For each block and hook kind its factor in the stream, measured on a few tokens; NaN where neither 1 nor the
    configured factor fits. A block that does not run, or is not made of attention and MLP, is left out.
    """
    captured: dict[tuple[int, str], Tensor] = {}

    def store(layer: int, kind: str) -> Edit:
        return lambda x: captured.setdefault((layer, kind), x)

    with contextlib.ExitStack() as stack:
        for layer in range(len(blocks(model))):
            for kind in _RESIDUAL_KINDS:
                # Edits of others may be attached: a block starts from the edited stream and adds the edited parts.
                before_edits = kind in ("hook_resid_mid", "hook_resid_post")
                with contextlib.suppress(ConfigError):
                    module, side = _locate_module(model, HookPoint(kind, layer, kind))
                    _hook_on(stack, module, side, store(layer, kind), before_others=before_edits)
        probe_logits(model)
    configured = getattr(model.config, "residual_multiplier", None)
    factors: dict[int, dict[str, float]] = {}
    for layer in range(len(blocks(model))):
        before, mid, after, attention, mlp = (captured.get((layer, kind)) for kind in _RESIDUAL_KINDS)
        if before is None or after is None or attention is None or mlp is None:
            continue
        if mid is None:
            factor = _fit_factor(before, after, attention + mlp, configured)
            factors[layer] = {"hook_attn_out": factor, "hook_mlp_out": factor}
            continue
        first, second = _fit_factor(before, mid, attention, configured), _fit_factor(mid, after, mlp, configured)
        middle = math.nan if math.isnan(first) or math.isnan(second) else 1.0
        factors[layer] = {"hook_attn_out": first, "hook_mlp_out": second, "hook_resid_mid": middle}
    return factors


def _fit_factor(before: Tensor, after: Tensor, added: Tensor, configured: object) -> float:
    """The factor, 1 or `configured`, with which `before + factor * added` is `after` up to rounding; NaN if none."""
    rounding = torch.finfo(added.dtype).eps * (before.abs() + after.abs() + added.abs()).double() + 1e-30
    change, part = (after.double() - before.double()) / rounding, added.double() / rounding
    size = float((part * part).sum())
    fitted = float((change * part).sum()) / size if size > 0 else 1.0
    for factor in (1.0, float(configured) if isinstance(configured, int | float) else 1.0):
        close = abs(fitted - factor) <= 5 * (size**-0.5 + torch.finfo(added.dtype).eps) if size > 0 else True
        if close and float((change - factor * part).abs().max()) <= 4.0:
            return factor
    return math.nan


class Rest:
    """The rest of a model after a hook of the residual stream; for other hooks, the whole model with the activation
    at the hook replaced.

    The `n_skipped` blocks before the hook do not run, if skipping them is measured to give the same logits on a few
    tokens (some architectures pass more than the stream between blocks); else every block runs. ConfigError: no such
    hook.
    """

    def __init__(self, lm: LanguageModel, hook: str) -> None:
        point = parse_hook(hook, lm.n_layers)
        self._lm, self._hook = lm, hook
        self.n_skipped = {"hook_resid_pre": point.layer, "hook_resid_post": point.layer + 1}.get(point.kind, 0)
        self._pass_on: Callable[..., Any] = _pass_tensor
        if self.n_skipped and not self._skipping_is_exact():
            self.n_skipped = 0

    @torch.inference_mode()
    def logits(self, ids: Tensor, x: Tensor) -> Tensor:
        """Logits `[batch, sequence, d_vocab]`, of the model's dtype, with `x` `[batch, sequence, d_model]` at the
        hook.

        `ids`, int64 `[batch, sequence]`, give the positions (and the input of blocks that are not skipped).
        ShapeMismatch if the two do not fit.
        """
        width = hook_width(self._lm, self._hook)
        if ids.ndim != 2 or x.shape != (*ids.shape, width):
            raise ShapeMismatch(f"x has shape {list(x.shape)}; expected {[*ids.shape, width]} for these ids.", at="x")
        lm = self._lm
        x = x.to(lm.device, lm.dtype)
        skipped = dict.fromkeys(blocks(lm.model)[: self.n_skipped], self._pass_on)
        with replaced_forwards(skipped), edited(lm, self._hook, lambda _: x):
            logits: Tensor = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
        return logits

    @torch.inference_mode()
    def _skipping_is_exact(self) -> bool:
        lm = self._lm
        ids = (torch.arange(1, 17) * max(1, lm.d_vocab // 18) % lm.d_vocab)[None]
        output_types: list[type] = []

        def record_type(_: nn.Module, __: Any, output: Any) -> None:
            output_types.append(type(output))

        handle = blocks(lm.model)[0].register_forward_hook(record_type)
        try:
            expected = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
        finally:
            handle.remove()
        self._pass_on = _pass_tuple if issubclass(output_types[0], tuple) else _pass_tensor
        x = capture(lm, self._hook, ids)
        # Other text last, so that state which a block kept of this text cannot help.
        lm.model(input_ids=ids.flip(1).to(lm.device), use_cache=False)
        try:
            logits = self.logits(ids, x)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
                raise
            return False  # something that a skipped block makes is needed
        return torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)


def _pass_tensor(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _pass_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)
