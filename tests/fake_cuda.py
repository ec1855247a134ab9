"""A GPU for machines without one: tensors that say they are on cuda:0, are computed on the CPU, and refuse to meet
tensors of the CPU where CUDA would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = ["fake_cuda"]

aten = torch.ops.aten
_CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
_CROSS_DEVICES = (aten.copy_.default, aten._to_copy.default)
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)


class FakeCudaTensor(Tensor):
    """`inner` holds the numbers, on the CPU. To torch's own code the device is "meta", of which every build knows."""

    inner: Tensor
    device = property(lambda self: _CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> FakeCudaTensor:
        strided = inner.layout == torch.strided
        with torch.inference_mode(mode=False):  # whose tensors torch's detach does not take here
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                inner.shape,
                strides=inner.stride() if strided else None,
                storage_offset=inner.storage_offset() if strided else None,
                dtype=inner.dtype,
                device=_META,
            )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeCudaTensor({self.inner})"

    def __deepcopy__(self, memo: Any) -> FakeCudaTensor:
        return FakeCudaTensor(self.inner.clone())

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _OnCuda(TorchFunctionMode):
    """Gives "cuda" its number, and makes the tensors that torch makes without dispatch."""

    asks_for_meta = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return _CUDA if _is_cuda(args[0]) else func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_cuda(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(_CUDA)
        if func is Tensor.__setitem__ and isinstance(args[0], FakeCudaTensor) and not isinstance(args[2], Tensor):
            args = args[0], args[1], torch.tensor(args[2], dtype=args[0].dtype)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], FakeCudaTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            args = args[0], index, *args[2:]
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], FakeCudaTensor):
            args = args[0], _CUDA, args[1].dtype, *args[2:]
        args, kwargs = tree_map(lambda value: _CUDA if _is_cuda(value) else value, (args, kwargs))
        before = _OnCuda.asks_for_meta
        _OnCuda.asks_for_meta = any(map(_is_meta, (*args[1:], kwargs.get("device"))))
        try:
            return func(*args, **kwargs)
        finally:
            _OnCuda.asks_for_meta = before


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode also those arrive that are made of others, such as Tensor.to.
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _run(func, args, kwargs or {})


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value) in ("cuda", "cuda:0")


def _is_meta(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value) == "meta"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    fakes = [tensor for tensor in tensors if isinstance(tensor, FakeCudaTensor)]
    device, generator = kwargs.get("device"), kwargs.get("generator")
    # What torch's own code makes beside a fake tensor, it makes on "meta".
    own = _is_meta(device) and not _OnCuda.asks_for_meta
    on_cuda = own or _is_cuda(device) or (bool(fakes) and device is None)
    if fakes:
        _refuse_mixed(func, args, tensors)
    if on_cuda and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' in {func}")
    wrappers = {id(fake.inner): fake for fake in fakes}
    inner_args, inner_kwargs = tree_map_only(FakeCudaTensor, lambda fake: fake.inner, (args, kwargs))
    if on_cuda and device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if not on_cuda:
        return result
    given = {id(tensor) for tensor in tensors}

    def wrap(tensor: Tensor) -> Tensor:
        if id(tensor) in wrappers:
            return wrappers[id(tensor)]
        return tensor if id(tensor) in given else FakeCudaTensor(tensor)

    return tree_map_only(Tensor, wrap, result)


def _refuse_mixed(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """CUDA's rules: one device, but for copies, numbers (0-dim) that are read, and indices into a tensor on the GPU."""
    if func in _CROSS_DEVICES:
        return
    if func in _INDEXING and isinstance(args[0], FakeCudaTensor):
        tensors = [value for value in (args[0], *args[2:3]) if isinstance(value, Tensor)]
    written = {
        id(value)
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    for tensor in tensors:
        if not isinstance(tensor, FakeCudaTensor) and (tensor.ndim or id(tensor) in written):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {func}")


@contextmanager
def fake_cuda(monkeypatch: MonkeyPatch) -> Iterator[None]:
    """While the block runs, there is one GPU, cuda:0."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_: True,
        "get_device_name": lambda *_: "fake",
        "synchronize": lambda *_: None,
        "set_device": lambda *_: None,
        "_lazy_init": lambda: None,
    }
    # A module's parameters are exchanged: their numbers cannot be, as those of torch's own tensors.
    with monkeypatch.context() as patched, _OnCuda(), _Mode():
        patched.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            patched.setattr(
                torch.optim.Optimizer, name, lambda *_: None, raising=False
            )  # a build for CUDA asks its driver
        for name, answer in answers.items():
            patched.setattr(torch.cuda, name, answer)
        yield
