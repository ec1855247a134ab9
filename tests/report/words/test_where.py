"""What changed, where, in a few lines."""

from __future__ import annotations

from saeffect.report.words.where import where_lines
from synthetic_where import NO_NULLS, where_tables


def test_lines_name_numbers_words_and_a_text():
    lines = where_lines(where_tables())
    text = "\n".join(lines)
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 80
    assert "residual stream" in text
    assert "0.048" in text
    assert "differ after  patients, \\n" in text
    assert "<b>" not in text  # it does not stand out
    assert "expects       +fever, −sea" in text
    assert "writes        fever 30, symptoms 20" in text
    assert "tuned writes  The| Human Phenotype\\nOntology" in text


def test_without_nulls_the_numbers_stay_and_the_reason_is_said():
    lines = where_lines(where_tables(nulls=False))
    assert lines[-1] == f"({NO_NULLS})"
    assert any("divergence on text" in line and "0.600" in line for line in lines)
    assert not any(line.startswith("null writes") for line in lines)
