"""One tiny random model for all steering tests; nobody changes it."""

from __future__ import annotations

import pytest
from steering.tiny_model import tiny_model

from saeffect.models.language_model import LanguageModel


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_model()
