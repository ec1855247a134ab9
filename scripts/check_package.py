"""Build wheel and sdist, and check their contents: the files that git tracks, the licence, type information, the size.

    python scripts/check_package.py [--out dist] [--install [PYTHON ...]]

With `--install` the wheel is also installed into an empty environment of each Python named, by default of this one, and
runs a tiny study there; the versions of its dependencies are pip's choice (PIP_CONSTRAINT=constraints.txt for ours).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
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
    """Complaints about the files and size of a wheel."""
    held = set(names)
    package_files = {name for name in held if not re.match(r"saeffect-[^/]+\.dist-info/", name)}
    complaints = _file_complaints(package_files, in_wheel(tracked)) + _size_complaints("wheel", size)
    if "saeffect/py.typed" not in package_files:
        complaints.append("no type information: saeffect/py.typed")
    if not any(re.fullmatch(r"saeffect-[^/]+\.dist-info/licenses/LICENSE", name) for name in held):
        complaints.append("no licence: dist-info/licenses/LICENSE")
    return complaints


def sdist_complaints(names: Iterable[str], tracked: Iterable[str], size: int) -> list[str]:
    """Complaints about the files and size of an sdist; names are relative to its top folder."""
    return _file_complaints(set(names) - set(_ADDED), in_sdist(tracked)) + _size_complaints("sdist", size)


def _file_complaints(held: set[str], wanted: set[str]) -> list[str]:
    stray = sorted((held - wanted) | {name for name in held if _STRAY.search(name)})
    return [f"stray file: {name}" for name in stray] + [f"missing: {name}" for name in sorted(wanted - held)]


def _size_complaints(what: str, size: int) -> list[str]:
    return [f"the {what} has {size / 1e6:.0f} MB, over {LARGEST / 1e6:.0f}"] if size > LARGEST else []


def _make_environment(folder: Path, *packages: str, python: str = sys.executable) -> Path:
    """Make an environment with these packages; the folder of its programs."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True)
    return folder / "bin"


def _sdist_complaints_of_wheel(sdist: Path, wheel: Path, python: Path, scratch: Path) -> list[str]:
    """Complaints about the wheel built from the sdist."""
    with tarfile.open(sdist) as tar:
        tar.extractall(scratch / "sdist", filter="data")
    (folder,) = (scratch / "sdist").iterdir()
    subprocess.run([python, "-m", "hatchling", "build", "-t", "wheel", "-d", scratch / "again"], cwd=folder, check=True)
    names = [set(zipfile.ZipFile(file).namelist()) for file in (scratch / "again" / wheel.name, wheel)]
    return [] if names[0] == names[1] else [f"the sdist makes another wheel: {sorted(names[0] ^ names[1])}"]


def _try_install(wheel: Path, scratch: Path, python: str) -> None:
    """Install a wheel without access to the sources; run every kind of command, and a tiny study."""
    programs = _make_environment(scratch / "empty", str(wheel), python=python)
    code_of_study = "import sys, pathlib, tiny_study; tiny_study.make_study(pathlib.Path(sys.argv[1]))"
    study = scratch / "study"
    study.mkdir()
    sources = os.pathsep.join(str(ROOT / name) for name in ("src", "tests"))
    subprocess.run([sys.executable, "-c", code_of_study, study], check=True, env=os.environ | {"PYTHONPATH": sources})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for arguments in (
        *(["--version"], ["--help"], ["check", "--keys"]),
        *(["check", "study/study.yaml"], ["run", "study/study.yaml", "--out", "run"], ["verify", "run"]),
    ):
        subprocess.run(
            [programs / "saeffect", *arguments], check=True, stdout=subprocess.DEVNULL, cwd=scratch, env=environment
        )
    code = "from saeffect import Study, open_run; Study.open('bundled:smollm2-medical'); print(*open_run('run').tables)"
    subprocess.run([programs / "python", "-c", code], check=True, cwd=scratch, env=environment)
    shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for both files")
    parser.add_argument("--install", nargs="*", metavar="PYTHON", help="try the wheel in empty environments")
    arguments = parser.parse_args()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    with tempfile.TemporaryDirectory() as name:
        scratch, out = Path(name), arguments.out.resolve()
        python = _make_environment(scratch / "build", "hatchling>=1.24") / "python"
        subprocess.run([python, "-m", "hatchling", "build", "-d", scratch / "new"], cwd=ROOT, check=True)
        (wheel,), (sdist,) = (scratch / "new").glob("*.whl"), (scratch / "new").glob("*.tar.gz")
        with zipfile.ZipFile(wheel) as archive:
            complaints = wheel_complaints(archive.namelist(), tracked, wheel.stat().st_size)
        with tarfile.open(sdist) as tar:
            names = [member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()]
        complaints += sdist_complaints(names, tracked, sdist.stat().st_size)
        complaints += _sdist_complaints_of_wheel(sdist, wheel, python, scratch)
        for line in complaints:
            print(line)
        if complaints:
            sys.exit(1)
        pythons = [] if arguments.install is None else arguments.install or [sys.executable]
        for number, python_path in enumerate(pythons):
            _try_install(wheel, scratch / str(number), python_path)
        out.mkdir(parents=True, exist_ok=True)
        for file in (wheel, sdist):
            print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
            (out / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main()
