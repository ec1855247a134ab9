"""The house: imports go down, files and functions stay small, importing does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "saeffect"
TESTS = Path(__file__).parent

# From the ground up. Neighbours on one floor may see each other. The report is one stage of a study, so it lies below.
GROUND = (
    "errors",
    "progress",
    "config",
    "config_chat",
    "config_keys",
    "config_steering",
    "paths",
    "io",
    "checksums",
    "parallel",
    "published",
)
FLOORS = (
    (*GROUND, "interruption", "sole_writer"),
    ("stats",),
    ("lm", "config_file"),
    ("sae",),
    ("features",),
    ("steering", "diffing", "review"),
    ("comparison",),
    ("report",),
    ("study",),
    ("cli", "web", "commands"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
ABOVE_ALL = {"__init__", "__main__"}
NO_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}

MODULES = sorted(p for p in ROOT.rglob("*.py") if "bundled" not in p.relative_to(ROOT).parts)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _named(path: Path, node: ast.AST) -> list[str]:
    """What a node of a file imports, by whole names; nothing if it is no import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ["saeffect", *path.relative_to(ROOT).parts[:-1]]
    up = package[: len(package) - node.level + 1] if node.level else []
    module = ".".join([*up, *([node.module] if node.module else [])])
    return [f"{module}.{alias.name}" for alias in node.names]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, part of saeffect that is imported), wherever in the file the import stands."""
    for node in ast.walk(_tree(path)):
        for name in _named(path, node):
            parts = name.split(".")
            if parts[0] == "saeffect" and len(parts) > 1:
                yield node.lineno, parts[1]


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_the_modules_were_found() -> None:
    assert len(MODULES) > 50


def test_every_part_has_a_floor() -> None:
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    assert parts - ABOVE_ALL <= set(FLOOR)


def test_imports_only_go_down() -> None:
    parts = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in MODULES}
    # A name of the package itself (its version, say) is on no floor: importing it would import every floor.
    upward = [
        f"{_name(path)}:{line} imports saeffect.{imported}"
        for path, part in parts.items()
        if part not in ABOVE_ALL
        for line, imported in _imports(path)
        if imported not in FLOOR or FLOOR[imported] > FLOOR[part]
    ]
    assert upward == []


def test_an_upward_import_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "stats" / "a.py"
    file.parent.mkdir()
    file.write_text(
        "import saeffect.cli.app\nfrom ..sae import base\nfrom .. import report\n"
        "def f():\n    from saeffect import web\n    from . import near\n    import torch\n"
    )
    assert [part for _, part in _imports(file)] == ["cli", "sae", "report", "web", "stats"]


def _needs(path: Path) -> set[str]:
    """The modules that must be loaded before this one: what it imports outside of functions, each by its whole name."""
    inner = {id(node) for function in _functions(path) for node in ast.walk(function)}
    modules = _module_names()
    names: set[str] = set()
    for statement in _tree(path).body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        for node in ast.walk(statement):
            if id(node) not in inner:
                names |= {name if name in modules else name.rpartition(".")[0] for name in _named(path, node)}
    return names


@cache
def _module_names() -> set[str]:
    return {_module_name(path) for path in MODULES}


def _module_name(path: Path) -> str:
    parts = ("saeffect", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _circle(needs: dict[str, set[str]]) -> list[str]:
    """Modules that need one another, in the order of their imports; empty if there are none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for needed in sorted(needs[name] & needs.keys() - {name}):
            if found := visit(needed, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(needs) if (found := visit(name, []))), [])


def test_no_circle_of_files() -> None:
    assert _circle({_module_name(path): _needs(path) for path in MODULES}) == []


def test_a_circle_would_be_seen() -> None:
    assert _circle({"a": {"b"}, "b": {"c", "os"}, "c": {"b"}}) == ["b", "c", "b"]


def _too_large(path: Path) -> Iterator[str]:
    length = len(path.read_text(encoding="utf-8").splitlines())
    if length > 400:
        yield f"{_name(path)} has {length} lines"
    for function in _functions(path):
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1 - _docstring_lines(function)
        if lines > 60:
            yield f"{_name(path)}: {function.name} has {lines} lines without its docstring"
        a = function.args
        names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        count = len([n for n in names if n not in ("self", "cls")]) + bool(a.vararg) + bool(a.kwarg)
        if count > 8 and not _is_command(function):
            yield f"{_name(path)}: {function.name} has {count} parameters"


def test_sizes() -> None:
    assert [said for path in MODULES for said in _too_large(path)] == []


def _docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    if ast.get_docstring(function) is None or first.end_lineno is None:
        return 0
    return first.end_lineno - first.lineno + 1


def _is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A command's parameters are its options, which typer wants one by one."""
    decorated = any("command" in ast.unparse(d) or "callback" in ast.unparse(d) for d in function.decorator_list)
    return decorated or "typer." in ast.unparse(function.args)


def test_names_say_what_is_inside() -> None:
    parts = {path: {part.removesuffix(".py").strip("_") for part in path.relative_to(ROOT).parts} for path in MODULES}
    assert [_name(path) for path, names in parts.items() if names & NO_NAMES] == []


def _unsaid(path: Path) -> Iterator[str]:
    tree = _tree(path)
    if path.name in ("__init__.py", "__main__.py") and not tree.body:
        return
    if not ast.get_docstring(tree):
        yield f"{_name(path)} has no docstring"
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    if path.name != "__main__.py" and public - set(_listed(tree)):
        yield f"{_name(path)}: {sorted(public - set(_listed(tree)))} are not in __all__"


def test_modules_have_docstring_and_all() -> None:
    assert [said for path in MODULES for said in _unsaid(path)] == []


def _listed(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [e.value for e in ast.walk(node.value) if isinstance(e, ast.Constant)]
    return []


def _runs_foreign_code(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = {a.name for a in node.names} | {getattr(node, "module", None)}
        return not names.isdisjoint({"pickle", "dill", "joblib", "cloudpickle"})
    if not isinstance(node, ast.Call):
        return False
    given = {k.arg for k in node.keywords if getattr(k.value, "value", None) is True}
    if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
        return True
    loads = getattr(node.func, "attr", None) == "load" and ast.unparse(node.func) == "torch.load"
    return (loads and "weights_only" not in given) or not given.isdisjoint({"trust_remote_code", "allow_pickle"})


def test_no_pickles_or_remote_code_by_default() -> None:
    nodes = [(path, node) for path in MODULES for node in ast.walk(_tree(path))]
    assert [f"{_name(path)}:{node.lineno}" for path, node in nodes if _runs_foreign_code(node)] == []


def test_tests_mirror_the_source() -> None:
    """Each test folder is a package's, so a module's tests are where one looks for them."""
    folders = {p.name for p in TESTS.iterdir() if p.is_dir() and list(p.glob("test_*.py"))}
    assert folders <= set(FLOOR) | {"scripts", "bundled", "benchmarks"}


def test_importing_does_nothing() -> None:
    code = "import sys, saeffect; print(sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT.parent), "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert (done.stdout, done.stderr) == ("[]\n", "")
