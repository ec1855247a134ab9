"""Build wheel and sdist, and check what they hold: the files that git knows, the licence, type information, the size.

    python scripts/check_package.py [--out dist] [--install]

With `--install` the wheel is also installed into an empty environment, and its commands are started there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["in_sdist", "in_wheel", "main", "sdist_complaints", "wheel_complaints"]

ROOT = Path(__file__).parents[1]
LARGEST = 100_000_000  # bytes that the package index takes
SOURCES = ("src/", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml")
_ADDED = ("PKG-INFO", ".gitignore")
_STRAY = re.compile(r"__pycache__|\.py[cod]$|\.DS_Store|~$|\.ipynb_checkpoints|tests/reference")


def in_wheel(tracked: Iterable[str]) -> set[str]:
    """The files of a wheel, of those that git tracks."""
    return {name.removeprefix("src/") for name in tracked if name.startswith("src/saeffect/")}


def in_sdist(tracked: Iterable[str]) -> set[str]:
    """The files of an sdist, of those that git tracks."""
    return {name for name in tracked if name.startswith(SOURCES)}


def wheel_complaints(names: Iterable[str], tracked: Iterable[str], size: int) -> list[str]:
    """What is wrong with a wheel."""
    held = set(names)
    own = {name for name in held if not re.match(r"saeffect-[^/]+\.dist-info/", name)}
    found = _differences(own, in_wheel(tracked)) + _size("wheel", size)
    if "saeffect/py.typed" not in own:
        found.append("no type information: saeffect/py.typed")
    if not any(re.fullmatch(r"saeffect-[^/]+\.dist-info/licenses/LICENSE", name) for name in held):
        found.append("no licence: dist-info/licenses/LICENSE")
    return found


def sdist_complaints(names: Iterable[str], tracked: Iterable[str], size: int) -> list[str]:
    """What is wrong with an sdist; names are within its top folder."""
    return _differences(set(names) - set(_ADDED), in_sdist(tracked)) + _size("sdist", size)


def _differences(held: set[str], wanted: set[str]) -> list[str]:
    stray = sorted((held - wanted) | {name for name in held if _STRAY.search(name)})
    return [f"stray file: {name}" for name in stray] + [f"missing: {name}" for name in sorted(wanted - held)]


def _size(what: str, size: int) -> list[str]:
    return [f"the {what} has {size / 1e6:.0f} MB, over {LARGEST / 1e6:.0f}"] if size > LARGEST else []


def _environment(folder: Path, *packages: str) -> Path:
    """Folder of the programs of a new environment that has these packages."""
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True)
    return folder / "bin"


def _try(wheel: Path, scratch: Path) -> None:
    programs = _environment(scratch / "empty", str(wheel))
    for arguments in (["--version"], ["--help"], ["run", "--help"], ["check", "--keys"]):
        subprocess.run([programs / "saeffect", *arguments], check=True, stdout=subprocess.DEVNULL, cwd=scratch)
    code = "import saeffect as sx; print(sx.Study.open('bundled:smollm2-medical').config.name)"
    subprocess.run([programs / "python", "-c", code], check=True, cwd=scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for both files")
    parser.add_argument("--install", action="store_true", help="try the wheel in an empty environment")
    arguments = parser.parse_args()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    with tempfile.TemporaryDirectory() as name:
        scratch, out = Path(name), arguments.out.resolve()
        python = _environment(scratch / "build", "hatchling>=1.24") / "python"
        subprocess.run([python, "-m", "hatchling", "build", "-d", scratch / "new"], cwd=ROOT, check=True)
        (wheel,), (sdist,) = (scratch / "new").glob("*.whl"), (scratch / "new").glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as archive:
            found = wheel_complaints(archive.namelist(), tracked, wheel.stat().st_size)
        with tarfile.open(sdist) as tar:
            names = [member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()]
        found += sdist_complaints(names, tracked, sdist.stat().st_size)
        for line in found:
            print(line)
        if found:
            sys.exit(1)
        if arguments.install:
            _try(wheel, scratch)
        out.mkdir(parents=True, exist_ok=True)
        for file in (wheel, sdist):
            print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
            (out / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
