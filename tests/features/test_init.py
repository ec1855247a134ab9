"""The package's names: all there, and none loaded before it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import saeffect.features


def test_every_name_is_found_where_it_lives():
    assert sorted(saeffect.features._HOME) == sorted(saeffect.features.__all__)
    for name, module in saeffect.features._HOME.items():
        home = importlib.import_module(f"saeffect.features.{module}")
        assert name in home.__all__
        assert getattr(saeffect.features, name) is getattr(home, name)
        assert name in dir(saeffect.features)


def test_a_typo_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'projct'"):
        saeffect.features.projct


def test_import_is_light():
    code = "import sys, saeffect.features; print(*{'torch', 'pandas', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
