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
from saeffect.lm.language_model import LanguageModel, probe_logits

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

_OF_THE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
HOOK_KINDS = (*_OF_THE_STREAM, HOOK_Z)
_ALWAYS_THERE = "use hook_resid_pre or hook_resid_post, which every architecture has."

# By model and block: what its halves are multiplied by before they are added, by hook kind; NaN where they are not.
_FACTORS: weakref.WeakKeyDictionary[nn.Module, dict[int, dict[str, float]]] = weakref.WeakKeyDictionary()

Edit = Callable[[Tensor], Tensor]
Side = Literal["input", "output"]


@dataclass(frozen=True)
class HookPoint:
    """A place to read or edit: a TransformerLens name, its block (from 0), and one of `HOOK_KINDS`.

    `blocks.{i}.hook_resid_pre` is the residual stream that enters block i, `hook_resid_mid` after its attention,
    `hook_resid_post` what leaves it; `hook_attn_out` and `hook_mlp_out` are what the two halves add; `attn.hook_z` is
    what attention's output projection reads, the heads side by side (TransformerLens has them apart). Values are the
    model's own: for those of TransformerLens' default `center_writing_weights` (LayerNorm models) subtract the mean
    over dimensions. Other hooks are refused unless, on a few tokens, the stream is what was before plus what the halves
    add.
    """

    name: str
    layer: int
    kind: str


class _Reached(BaseException):
    """Ends a forward pass at the hook. Not an Exception, so that no model code swallows it."""


def parse_hook(name: str, n_layers: int | None = None, *, at: str | None = None) -> HookPoint:
    """Read a hook name, or the name of a transformers module as `hook_of_module` does. UnknownName: the kind is not
    in `HOOK_KINDS`; ConfigError: the name has another form, or the model has no such block.

    Example:
        >>> parse_hook("blocks.8.hook_resid_pre").layer
        8
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(attn\.hook_z|\w+)", hook_of_module(name) or name)
    if match is None:
        known = re.fullmatch(r"blocks\.\d+\.(\w+\.)+\w+|ln_final\.\w+|hook_\w+", name)
        raise ConfigError(
            f"TransformerLens' hook {name!r} is not supported; supported in each block: {', '.join(HOOK_KINDS)}."
            if known
            else f"{name!r} is not a hook name; expected blocks.<layer>.<kind>.",
            at=at,
            fix="use an SAE of the residual stream." if known else "for example blocks.8.hook_resid_pre.",
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
    """TransformerLens' name for the output of a transformers module; None for other modules than blocks and halves.

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
    """IncompatibleSae if a module's output, such as that of "layers.8.mlp", is not the tensor at the hook of that
    name: Gemma 2 and 3, for example, normalise the MLP's output, and `hook_mlp_out` is what they then add.
    """
    point = parse_hook(hook_of_module(path) or path, lm.n_layers, at=at)
    if point.kind not in ("hook_attn_out", "hook_mlp_out"):
        return
    own = dict(blocks(lm.model)[point.layer].named_children()).get(path.rpartition(".")[2])
    if _locate(lm.model, point)[0] is not own or _factor(lm.model, point) != 1.0:
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
    kept: list[Tensor] = []

    def listen(x: Tensor) -> Tensor:
        kept.append(x)
        raise _Reached

    with _attached(lm.model, point, listen), contextlib.suppress(_Reached):
        lm.model(input_ids=input_ids.to(lm.device), use_cache=False, logits_to_keep=1)
    if not torch.isfinite(kept[0]).all():
        dtype = str(lm.dtype).removeprefix("torch.")
        raise ConfigError(
            f"activations of {lm.name} are not finite at {hook} in {dtype}.",
            at=hook,
            fix="set the model's dtype to bfloat16 or float32, which hold larger numbers."
            if lm.dtype == torch.float16
            else "check the model: its own computation gives no numbers.",
        )
    return kept[0]


@contextlib.contextmanager
def edited(lm: LanguageModel, hook: str, edit: Edit) -> Iterator[None]:
    """While the block runs, every forward pass has the activation at `hook` replaced by `edit(activation)`, which
    gets and returns `[batch, sequence, d_model]` and must not change its input. ConfigError: no such hook.
    """
    with _attached(lm.model, parse_hook(hook, lm.n_layers), edit):
        yield


@contextlib.contextmanager
def recorded(lm: LanguageModel, *hooks: str) -> Iterator[dict[str, Tensor]]:
    """While the block runs, the activations of the latest forward pass, `[batch, sequence, d_model]`, by hook."""
    found: dict[str, Tensor] = {}

    def keep(hook: str) -> Edit:
        def edit(x: Tensor) -> Tensor:
            found[hook] = x
            return x

        return edit

    with contextlib.ExitStack() as stack:
        for hook in dict.fromkeys(hooks):
            stack.enter_context(edited(lm, hook, keep(hook)))
        yield found


@contextlib.contextmanager
def _attached(model: nn.Module, point: HookPoint, edit: Edit) -> Iterator[None]:
    module, side = _locate(model, point)
    factor = _factor(model, point)
    if factor != 1.0:  # what the block adds is not what the module gives
        inner = edit
        edit = lambda x: inner(factor * x) / factor  # noqa: E731
    with contextlib.ExitStack() as stack:
        if point.kind == "hook_resid_mid":
            # The stream itself passes by this norm, so the change is added again to what leaves the block.
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


def _hook_on(stack: contextlib.ExitStack, module: nn.Module, side: Side, edit: Edit) -> None:
    """Replace a module's first input or output by the edited one until the stack closes."""

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edited_there(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited_there(kwargs["hidden_states"])}

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (edited_there(output[0]), *output[1:]) if isinstance(output, tuple) else edited_there(output)

    def edited_there(x: Tensor) -> Tensor:
        found = edit(x)
        # Of a model that is spread, another device than the edit's may go on.
        return found.to(x.device) if isinstance(x, Tensor) else found

    if side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    stack.callback(handle.remove)


def _locate(model: nn.Module, point: HookPoint) -> tuple[nn.Module, Side]:
    """The module of a hook, and whether the hook is its input or its output."""
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
        # Where attention and MLP run side by side there is no stream between them.
        "hook_resid_mid": () if getattr(block, "use_parallel_residual", False) else mapping.resid_mid,
    }[point.kind]
    children = dict(block.named_children())
    for name in names:
        if name in children:
            return children[name], "input" if point.kind == "hook_resid_mid" else "output"
    raise ConfigError(f"{type(block).__name__} has no {point.kind}.", at=point.name, fix=_ALWAYS_THERE)


def _factor(model: nn.Module, point: HookPoint) -> float:
    """The stream's factor for the output of the hook's module; measured once for a block."""
    if point.kind in ("hook_resid_pre", "hook_resid_post", HOOK_Z):
        return 1.0
    known = _FACTORS.setdefault(model, {})
    if point.layer not in known:
        known[point.layer] = _measured(model, point.layer)
    factor = known[point.layer].get(point.kind, math.nan)
    if math.isnan(factor):
        raise ConfigError(
            f"{type(blocks(model)[point.layer]).__name__} does not add up by its {point.kind}: the residual stream is"
            " not what was before plus what attention and MLP give.",
            at=point.name,
            fix=_ALWAYS_THERE,
        )
    return factor


@torch.no_grad()
def _measured(model: nn.Module, layer: int) -> dict[str, float]:
    """By hook kind, the factor of its tensor in the stream, measured on a few tokens; NaN where no known one fits."""
    seen: dict[str, Tensor] = {}

    def store(kind: str) -> Edit:
        return lambda x: seen.setdefault(kind, x)

    with contextlib.ExitStack() as stack:
        for kind in _OF_THE_STREAM:
            with contextlib.suppress(ConfigError):
                _hook_on(stack, *_locate(model, HookPoint(kind, layer, kind)), store(kind))
        probe_logits(model)
    before, mid, after, attention, mlp = map(seen.get, _OF_THE_STREAM)
    if before is None or after is None or attention is None or mlp is None:
        return {}
    named = getattr(model.config, "residual_multiplier", None)
    if mid is None:
        both = _fit(before, after, attention + mlp, named)
        return {"hook_attn_out": both, "hook_mlp_out": both}
    first, second = _fit(before, mid, attention, named), _fit(mid, after, mlp, named)
    middle = math.nan if math.isnan(first) or math.isnan(second) else 1.0
    return {"hook_attn_out": first, "hook_mlp_out": second, "hook_resid_mid": middle}


def _fit(before: Tensor, after: Tensor, added: Tensor, named: object) -> float:
    """The factor (1, or one in the configuration) with which `before + factor * added` is `after` up to rounding."""
    rounding = torch.finfo(added.dtype).eps * (before.abs() + after.abs() + added.abs()).double() + 1e-30
    change, part = (after.double() - before.double()) / rounding, added.double() / rounding
    size = float((part * part).sum())
    fitted = float((change * part).sum()) / size if size > 0 else 1.0
    for factor in (1.0, float(named) if isinstance(named, int | float) else 1.0):
        near = abs(fitted - factor) <= 5 * (size**-0.5 + torch.finfo(added.dtype).eps) if size > 0 else True
        if near and float((change - factor * part).abs().max()) <= 4.0:
            return factor
    return math.nan


class Rest:
    """The part of a model behind a hook of the residual stream; behind another hook, the model with that value
    there.

    That skipping the `n_skipped` blocks before gives the same is measured on a few tokens (some architectures pass more
    from block to block than the stream). Where it does not, every block runs. ConfigError: no such hook.
    """

    def __init__(self, lm: LanguageModel, hook: str) -> None:
        point = parse_hook(hook, lm.n_layers)
        self._lm, self._hook = lm, hook
        self.n_skipped = {"hook_resid_pre": point.layer, "hook_resid_post": point.layer + 1}.get(point.kind, 0)
        self._pass_on: Callable[..., Any] = _tensor
        if self.n_skipped and not self._gives_the_same():
            self.n_skipped = 0

    @torch.inference_mode()
    def logits(self, ids: Tensor, x: Tensor) -> Tensor:
        """Logits `[batch, sequence, d_vocab]`, of the model's dtype, with `x` `[batch, sequence, d_model]` at the
        hook.

        `ids`, int64 `[batch, sequence]`, give the positions (and what ran before, if not all of it is skipped).
        ShapeMismatch if the two do not fit.
        """
        width = hook_width(self._lm, self._hook)
        if ids.ndim != 2 or x.shape != (*ids.shape, width):
            raise ShapeMismatch(f"x has shape {list(x.shape)}; expected {[*ids.shape, width]} for these ids.", at="x")
        lm = self._lm
        x = x.to(lm.device, lm.dtype)
        with self._skipping(), edited(lm, self._hook, lambda _: x):
            found: Tensor = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
        return found

    @contextlib.contextmanager
    def _skipping(self) -> Iterator[None]:
        """While the block runs, the first blocks pass on what they get."""
        with contextlib.ExitStack() as stack:
            for block in blocks(self._lm.model)[: self.n_skipped]:
                stack.callback(_restore, block, vars(block).get("forward"))
                block.forward = self._pass_on
            yield

    @torch.inference_mode()
    def _gives_the_same(self) -> bool:
        lm = self._lm
        ids = (torch.arange(1, 17) * max(1, lm.d_vocab // 18) % lm.d_vocab)[None]
        kinds: list[type] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            kinds.append(type(output))

        listening = blocks(lm.model)[0].register_forward_hook(note)
        try:
            whole = lm.model(input_ids=ids.to(lm.device), use_cache=False).logits
        finally:
            listening.remove()
        self._pass_on = _in_tuple if issubclass(kinds[0], tuple) else _tensor
        x = capture(lm, self._hook, ids)
        # Other text last, so that nothing which a block left behind helps.
        lm.model(input_ids=ids.flip(1).to(lm.device), use_cache=False)
        try:
            found = self.logits(ids, x)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate" in str(error):
                raise
            return False  # a skipped block's part is missed
        return torch.allclose(found, whole, rtol=1e-3, atol=1e-3)


def _tensor(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _in_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward
