"""Files of `torch.save`, read as weights alone: what else a pickle could do is refused, and named.

A pickle is a program, which may call any function. torch's reader of weights knows the few that build tensors and stops
at any other; before it starts, the file is searched for what it would call.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import BadFile, NotFound, first_line

__all__ = ["PICKLED", "read_pickled"]

#: Endings of files that are pickled.
PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# State dicts hold tensors, counters and plain values. A torch.nn module runs the code of its class.
_HARMLESS = ("torch.", "collections.", "numpy.", "_codecs.")
_PLAIN = ("set", "frozenset", "dict", "list", "complex", "bytearray")
_FETCH_AGAIN = "copy or download it again."


def read_pickled(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and other values by name, of a file that `torch.save` wrote; a state dict under one of the
    usual keys (`state_dict`, `model`) is opened. NotFound: no such file. BadFile: it would run code, is damaged, or
    holds no state dict.
    """
    if not path.is_file():
        raise NotFound(f"there is no file {path.name!r}.", at=where)
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
        raise BadFile(f"{path.name} cannot be read: {first_line(error)[:200]}.", at=where, fix=_FETCH_AGAIN) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    tensors = {str(k): v.detach() for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, dict) else {}
    if not tensors:
        raise BadFile(f"{path.name} holds no state dict, but {type(held).__name__}.", at=where)
    return tensors, {str(key): value for key, value in held.items() if not isinstance(value, Tensor)}


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
