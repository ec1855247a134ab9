"""The settings of the server, and the run directory behind all pages, read again when its files change."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saeffect.errors import NotFound, SaeffectError
from saeffect.io import read_json

if TYPE_CHECKING:
    import pandas as pd

    from saeffect.study.run_folder import RunFolder
    from saeffect.study.study import Study

__all__ = ["Settings", "Site", "is_loopback"]

_Value = TypeVar("_Value")
_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True)
class Settings:
    """How the app is served.

    Attributes:
        host: Address to listen on; any but a loopback address needs a token per rater.
        port: Port to listen on; named in the session cookie, since browsers share cookies between ports.
        names: Further host names that a browser may call the server by, such as that of a proxy, which lets others in.
        max_body: Largest accepted request body, in bytes.
        requests_per_second: Requests that one client may send, on average; 0 for no limit.
        burst: Requests that one client may send at once before that limit applies.
        attempts_per_minute: Wrong tokens that one address may send.
    """

    host: str = "127.0.0.1"
    port: int = 8321
    names: tuple[str, ...] = ()
    max_body: int = 1 << 20
    requests_per_second: float = 0.0
    burst: int = 200
    attempts_per_minute: int = 10

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the app, so that no token is asked for; not so behind a named proxy."""
        return is_loopback(self.host) and all(is_loopback(name) for name in self.names)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Site:
    """A run directory as the pages see it. Thread-safe; writes nothing.

    Attributes:
        folder: The run directory, absolute.
        settings: How the app is served.
    """

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.folder, self.settings = folder.absolute(), settings or Settings()
        self._cache: dict[str, tuple[tuple[_Stamp, ...], Any]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._closing: list[Callable[[], None]] = []

    def path(self, *parts: str) -> Path:
        """A path inside the run directory, which need not exist; NotFound if the parts lead out of it, also by a link.

        Example:
            >>> Site(Path("run")).path("arms", "control", "features.parquet").name
            'features.parquet'
            >>> Site(Path("run")).path("..", "secret")
            Traceback (most recent call last):
            saeffect.errors.NotFound: NotFound: there is no such file in the run directory.
        """
        file = self.folder.joinpath(*parts)
        try:
            resolved = file.resolve()  # a link to itself: unchanged since Python 3.13, an error before
            inside = resolved.is_relative_to(self.folder.resolve()) and not resolved.is_symlink()
        except (OSError, ValueError, RuntimeError):  # a name that cannot be one, or a link to itself
            inside = False
        if not inside or any(".." in Path(part).parts for part in parts):
            raise NotFound("there is no such file in the run directory.")
        return file

    def has(self, *parts: str) -> bool:
        """Whether there is such a file in the run directory."""
        return self.path(*parts).is_file()

    def cached(self, name: str, files: Sequence[Path], make: Callable[[], _Value]) -> _Value:
        """The result of `make`, cached by `name` until one of the files changes, appears or vanishes.

        Threads that ask for the same name wait for the first. Errors are not cached.
        """
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            stamps = tuple(_stamp(file) for file in files)
            entry = self._cache.get(name)
            if entry is None or entry[0] != stamps:
                entry = self._cache[name] = (stamps, make())
            value: _Value = entry[1]
            return value

    @property
    def study(self) -> Study:
        """The study as the run wrote it down; NotFound if no stage has finished, other SaeffectErrors if it is damaged.

        Nothing of a model is loaded.
        """
        from saeffect.study.study import Study

        file = self.folder / "study.yaml"
        if not file.is_file():
            raise NotFound(
                "no stage of a study has finished in this directory.",
                at=str(self.folder),
                fix="run saeffect run STUDY with this directory as --out; this page follows it.",
            )
        try:
            return self.cached("study.yaml", [file], lambda: Study.open(file))
        except SaeffectError as error:
            error.fix = error.fix or "another version of saeffect may have written it, or it is damaged: run it again."
            raise

    @property
    def run(self) -> RunFolder:
        """The run directory as stages see it; errors as `study`."""
        from saeffect.study.run_folder import RunFolder

        study = self.study  # outside of `cached`: a study that changes makes another folder
        files = [self.folder / "study.yaml", self.folder / "manifest.json"]
        return self.cached("run", files, lambda: RunFolder(self.folder, study))

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The run's manifest: versions, identities of the arms, stages; empty if unreadable."""
        file = self.folder / "manifest.json"

        def read() -> Mapping[str, Any]:
            try:
                content = read_json(file)
            except (SaeffectError, OSError):
                return {}
            return content if isinstance(content, dict) else {}

        return self.cached("manifest.json", [file], read)

    @property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """Finished stages by key ("steer control"), each with seconds and outputs; empty without a usable manifest."""
        stages = self.manifest.get("stages")
        return {key: note for key, note in stages.items() if isinstance(note, dict)} if isinstance(stages, dict) else {}

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in the order of the study file; errors as `study`."""
        return tuple(self.study.config.arms)

    def table(self, *parts: str) -> pd.DataFrame:
        """A table of the run, cached until the file changes: do not modify it. NotFound, or BadFile if it is broken.

        Example: `site.table("arms", "control", "features.parquet")`.
        """
        from saeffect.study.results import read_table

        file = self.path(*parts)
        if not file.is_file():
            raise NotFound(f"there is no {'/'.join(parts)} yet.", at=str(self.folder), fix="let the run go on.")
        return self.cached("/".join(parts), [file], lambda: read_table(file))

    def on_close(self, action: Callable[[], None]) -> None:
        """Call an action when the server stops, such as ending a worker."""
        self._closing.append(action)

    def close(self) -> None:
        """Run the actions of `on_close`, the latest first."""
        while self._closing:
            self._closing.pop()()


def _stamp(file: Path) -> _Stamp:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
