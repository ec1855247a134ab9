"""One tiny random model for all steering tests; nobody changes it."""

from __future__ import annotations

import pytest

from saeffect.lm.language_model import LanguageModel
from steering.tiny_model import tiny_model


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_model()
