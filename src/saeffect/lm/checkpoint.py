"""The folder that a training writes to: its owner, its checkpoints, and whether its results are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.checksums import read_tensors, save_tensors
from saeffect.errors import BadFile, ConfigError, SaeffectError
from saeffect.io import hash_file, read_json, remove_leftovers, sole_writer, write_json

__all__ = ["Checkpoint", "TrainingFolder"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PATTERN, _MARK = "step-*.safetensors", "run.json"
_FINISHED = "finished.json"
# Settings of models, adapters and SAEs: with two of these it is unclear what a folder holds.
_CONFIG_FILES = ("config.json", "adapter_config.json", "cfg.json")
_ANOTHER_FOLDER = "choose another output folder, or move away what is there."


class Checkpoint:
    """Weights, Adam's moments, other tensors, and the number of finished steps, in files that are whole or absent.

    `folder` keeps the `keep` newest. `made_by` is a fingerprint of everything that decides the run; checkpoints with
    another fingerprint are refused.
    """

    def __init__(self, folder: Path, made_by: str, *, keep: int = 1) -> None:
        self.folder = folder
        self._made_by, self._keep = made_by, keep

    def owner(self) -> str | None:
        """Fingerprint of the run that marked this folder as its own; None without one."""
        with contextlib.suppress(SaeffectError):
            mark = read_json(self.folder / _MARK)
            if isinstance(mark, dict) and isinstance(mark.get("made_by"), str):
                return str(mark["made_by"])
        return None

    def begin(self) -> None:
        """Mark the folder as this run's; remove half-written files."""
        remove_leftovers(self.folder)
        if self.owner() != self._made_by:
            write_json(self.folder / _MARK, {"made_by": self._made_by})

    def steps(self) -> list[int]:
        """Numbers of the finished steps that have a checkpoint, ascending."""
        numbers = [path.stem.removeprefix("step-") for path in self.folder.glob(_PATTERN)]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Tensor],
        *,
        drop_old: bool = True,
    ) -> None:
        """Save the state after `step` steps: weights by name, Adam's moments of each, and extra tensors.

        Runs that resume together pass `drop_old=False` and call `drop_old` when all have saved. BadFile if the disk is
        full or not writable; older checkpoints stay.
        """
        tensors = {f"other.{name}": t for name, t in extra.items()}
        for name, p in weights.items():
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in _MOMENTS}
        try:
            save_tensors(self._file(step), tensors, {"step": str(step), "made_by": self._made_by})
        except BadFile as error:
            steps = self.steps()
            raise BadFile(
                f"the checkpoint after step {step:,} cannot be written: {error.message}",
                at=str(self.folder),
                fix=f"{error.fix}" + (f" It goes on from step {steps[-1]:,}." if steps else ""),
            ) from error
        if drop_old:
            self.drop_old(step)

    def drop_old(self, newest: int) -> None:
        """Delete all but the newest checkpoints up to step `newest`, and all after it (from before a return to it)."""
        steps = self.steps()
        keep = [step for step in steps if step <= newest][-self._keep :]
        for step in set(steps) - set(keep):
            self._file(step).unlink(missing_ok=True)

    def drop_all(self) -> None:
        """Delete all checkpoints, and the folder if it is empty then."""
        for step in self.steps():
            self._file(step).unlink(missing_ok=True)
        remove_leftovers(self.folder)
        (self.folder / _MARK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            self.folder.rmdir()

    def restore(
        self,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        extra: Mapping[str, Tensor],
        *,
        step: int | None = None,
    ) -> int:
        """Restore in place what `save` was given, from step `step` (0: nothing) or the newest; returns that step.
        ConfigError if the checkpoint is another run's; BadFile if it is damaged.
        """
        if step is None:
            step = max(self.steps(), default=0)
        if not step:
            return 0
        path = self._file(step)
        fix = "delete it; the run goes on from the one before, or starts anew if there is none."
        tensors, metadata = read_tensors(path, "this checkpoint", fix=fix)
        if metadata.get("made_by") != self._made_by:
            raise self.another_run_error()
        try:
            with torch.no_grad():
                for name, tensor in extra.items():
                    tensor.copy_(tensors[f"other.{name}"])
                for name, p in weights.items():
                    p.copy_(tensors[f"weight.{name}"])
                    # Copied, since the tensors read may be the file itself, mapped into memory.
                    moments = {key: torch.empty_like(p).copy_(tensors[f"{key}.{name}"]) for key in _MOMENTS}
                    optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
        except KeyError as error:
            raise BadFile(f"this checkpoint cannot be read: it has no {error}.", at=str(path), fix=fix) from error
        return step

    def another_run_error(self) -> ConfigError:
        return ConfigError(
            "this folder holds a checkpoint of another run: of another recipe, or of this one before model or text"
            " were exchanged.",
            at=str(self.folder),
            fix="delete it, or choose another output folder.",
        )

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"


class TrainingFolder:
    """One training's folder: one writer at a time, the newest `keep` checkpoints, and a note of the results.

    Files that no training wrote are never touched; a folder where they have our file names is refused. `made_by` is a
    fingerprint of everything that decides the results, contents of files included; `leaves` names the files that such
    a training leaves.
    """

    def __init__(self, path: Path, made_by: str, leaves: Sequence[str], *, keep: int = 1) -> None:
        self.path, self._made_by, self._leaves = path, made_by, (*leaves, _FINISHED)
        self.checkpoint = Checkpoint(path / "checkpoint", made_by, keep=keep)

    def refuse_strangers(self) -> None:
        """ConfigError if files with our names were not written by a training; BadFile if the note is damaged."""
        if self.checkpoint.owner() is not None or self.note() is not None:
            return
        names = dict.fromkeys((*self._leaves, self.checkpoint.folder.name, *_CONFIG_FILES))
        present = [name for name in names if os.path.lexists(self.path / name)]
        if present:
            raise ConfigError(
                f"this folder holds {', '.join(present)}, and nothing says that a training wrote it here.",
                at=str(self.path),
                fix=_ANOTHER_FOLDER,
            )

    def refuse_others(self) -> None:
        """As `refuse_strangers`, and ConfigError for another training's folder. Cheap: call it before heavy work."""
        self.refuse_strangers()
        note, owner = self.note(), self.checkpoint.owner()
        if note is not None and note["made_by"] != self._made_by:
            raise ConfigError(
                "this folder holds what another recipe made, or this one from another model or text.",
                at=str(self.path),
                fix=_ANOTHER_FOLDER,
            )
        if owner not in (None, self._made_by):
            raise self.checkpoint.another_run_error()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder while the block runs; half-written files are removed. Errors of `refuse_others`; InUse if
        another process trains here; BadFile if the folder is not writable.
        """
        with sole_writer(self.path):
            self.refuse_others()
            remove_leftovers(self.path)
            yield

    def finish(self, files: Iterable[str], **details: Any) -> None:
        """Note that the training is finished, with hashes of the files that cannot be remade without training."""
        hashes = {name: hash_file(self.path / name) for name in files}
        write_json(self.path / _FINISHED, {"made_by": self._made_by, "files": hashes, **details})

    def remove(self) -> None:
        """Delete what a training left, and the folder if it is empty then."""
        self.checkpoint.drop_all()
        for name in self._leaves:
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody's own files
            self.path.rmdir()

    def note(self) -> dict[str, Any] | None:
        """A finished training's note, None without one; BadFile if it is damaged."""
        path = self.path / _FINISHED
        if not path.is_file():
            return None
        with contextlib.suppress(SaeffectError):
            note = read_json(path)
            files = note.get("files") if isinstance(note, dict) and isinstance(note.get("made_by"), str) else None
            if isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values()):
                return note
        raise BadFile(
            f"{_FINISHED} is damaged, so nothing says which recipe made the files beside it.",
            at=str(self.path),
            fix=f"restore it; or delete the folder, and the same command makes it again. {_ANOTHER_FOLDER}",
        )

    def damaged(self) -> list[str] | None:
        """Names of files missing or changed since this training finished, None if unfinished. BadFile: damaged note."""
        note = self.note()
        if note is None or note["made_by"] != self._made_by:
            return None
        digests = {self.path / name: digest for name, digest in note["files"].items()}
        return [path.name for path, digest in digests.items() if not path.is_file() or hash_file(path) != digest]
