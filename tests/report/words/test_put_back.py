"""The sentence on what features carry, and the picture: what is not shown is said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from saeffect.diffing.put_back_shares import COLUMNS, OWN_WRITING
from saeffect.errors import Undefined
from saeffect.report.figures.learned import draw_shares
from saeffect.report.words.causes import put_back_sentence, what_it_causes

_NAN = (math.nan, math.nan, math.nan)
_Numbers = tuple[float, float, float]


def _rows(measure: str, features: str, n: int | None, reason: str = "", **kinds: _Numbers) -> list[dict[str, Any]]:
    shared = {"edited": "tuned", "source": "domain", "measure": measure, "features": features, "n_features": n}
    shared |= {"whole": 0.2, "n_rows": 24, "n_tokens": 1512, "p": math.nan, "reason": reason}
    return [
        shared | {"kind": kind, **dict(zip(("share", "low", "high"), ends, strict=True))}
        for kind, ends in kinds.items()
    ]


def _table(*rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame([row for some in rows for row in some], columns=list(COLUMNS))
    return table.astype({"n_features": "Int64"})


CLEAR = {"own": (0.41, 0.33, 0.48), "matched": (0.02, -0.01, 0.05), "difference": (0.39, 0.31, 0.47)}
NOT_MORE = {"own": (0.08, 0.02, 0.15), "matched": (0.06, 0.01, 0.12), "difference": (0.02, -0.04, 0.08)}
NOTHING = {"own": (0.01, -0.03, 0.05), "matched": (0.0, -0.02, 0.02), "difference": (0.01, -0.03, 0.05)}
AGAINST = {"own": (-0.2, -0.3, -0.1), "matched": (0.0, -0.02, 0.02), "difference": (-0.2, -0.3, -0.1)}


def _said(text: str) -> str:
    return text.replace("\u202f", " ").replace("\u2212", "-")


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (
            CLEAR,
            "The 20 features that changed most carry 41 % [33, 48] of what fine-tuning does at this layer to the loss on"
            " medical text (0.200 nats a token); 20 matched features carry 2 % [-1, 5].",
        ),
        (NOT_MORE, "carry 8 % [2, 15] of what fine-tuning does at this layer to the loss on medical text (0.200 nats a"
         " token); 20 matched features carry 6 % [1, 12], which is not clearly less."),
        (NOTHING, "(0.200 nats a token), so it is not shown that they carry any of it; 20 matched features carry 0 %"),
        (AGAINST, "carry -20 % [-30, -10] of what fine-tuning does at this layer to the loss on medical text (0.200 nats"
         " a token): put back, they move it the other way; 20 matched"),
    ],
)  # fmt: skip
def test_the_sentence(kinds: dict[str, _Numbers], said: str) -> None:
    table = _table(_rows("loss", "changed", 20, **kinds), _rows("kl", "changed", 20, **CLEAR))
    text = _said(put_back_sentence(table))
    assert said in text
    end = " Of what fine-tuning does at this layer to the predictions there (KL) they carry 41 % [33, 48]; 20 matched"
    assert end in text
    assert put_back_sentence(table, 50) == ""


def test_an_undefined_share_is_said_and_predictions_speak() -> None:
    why = "what the whole activation does to the loss, +0.001 nats a token [-0.002, 0.004], is not clear of zero"
    table = _table(_rows("loss", "changed", 20, why, own=_NAN), _rows("kl", "changed", 20, **CLEAR))
    text = _said(put_back_sentence(table, subject="general"))
    assert text.startswith(
        "What share the 20 features that changed most carry of what fine-tuning does at this layer to the loss on general"
        f" text cannot be said: {why}. Of what"
    )


def test_named_groups_single_features_and_the_other_direction() -> None:
    one = {"own": (0.1, 0.05, 0.15)}
    table = _table(
        _rows("loss", "fever", 8, **CLEAR), _rows("kl", "fever", 8, **CLEAR), _rows("loss", "changed", 1, **one)
    )
    table = pd.concat([table, _table(_rows("kl", "changed", 1, **CLEAR))], ignore_index=True)
    text = put_back_sentence(table, None, features="fever", called="the 8 features of “fever”")
    assert text.startswith("The 8 features of “fever” carry 41")
    assert put_back_sentence(table, 1).startswith("The feature that changed most carries 10")
    back = put_back_sentence(table.assign(edited="base"), None, features="fever", edited="base")
    assert (
        "of what the fine-tuned model's activations at this layer do to the base model's loss on medical text" in back
    )


def test_the_picture() -> None:
    rows = []
    for measure in ("loss", "kl"):
        rows.append(_rows(measure, "whole", None, own=(1.0, 1.0, 1.0)))
        for place, n in enumerate((1, 5, 20, 200)):
            share = 0.1 + 0.15 * place
            kinds = {"own": (share, share - 0.05, share + 0.08), "matched": (0.02, -0.01, 0.04)}
            rows.append(_rows(measure, "changed", n, **kinds, difference=(share, 0.0, 1.0)))
        rows.append(_rows(measure, "changed", 4608, own=(0.9, 0.8, 0.95)))
    table = _table(*rows)
    drawn = draw_shares(table)
    assert len(drawn.figure.axes) == 2
    lines = {line.get_label(): line for line in drawn.figure.axes[0].get_lines()}
    own = next(line for line in lines.values() if len(line.get_xdata()) == 5)
    assert np.asarray(own.get_ydata()).tolist() == pytest.approx([0.1, 0.25, 0.4, 0.55, 0.9])
    assert "24 texts" in drawn.caption and "40" in drawn.alt
    unclear = table.copy()
    of_loss = unclear["measure"] == "loss"
    unclear.loc[of_loss, ["share", "low", "high"]] = math.nan
    unclear.loc[of_loss, "reason"] = "it hardly differs"
    half = draw_shares(unclear)
    assert len(half.figure.axes) == 1 and "is undefined: it hardly differs." in half.caption
    with pytest.raises(Undefined, match="it hardly differs"):
        draw_shares(unclear[of_loss])
    with pytest.raises(Undefined, match="source 'code'"):
        draw_shares(table, source="code")


def test_own_writing_replaces_an_undefined_share_of_the_loss() -> None:
    undefined = {"own": _NAN, "matched": _NAN, "difference": _NAN}
    whole = {"own": (1.0, 1.0, 1.0)}
    text = (_rows("loss", "changed", 20, "not clear of zero", **undefined), _rows("kl", "changed", 20, **NOT_MORE))
    own = _table(_rows("loss", "changed", 20, **CLEAR), _rows("kl", "changed", 20, **CLEAR),
                 _rows("loss", "whole", None, **whole)).assign(source=OWN_WRITING)  # fmt: skip
    table = pd.concat([_table(*text, _rows("kl", "whole", None, **whole)), own], ignore_index=True)
    said = _said(what_it_causes(table, "medical"))
    assert said == (
        "The 20 features that changed most carry 8 % [2, 15] of what fine-tuning does at this layer to the predictions on"
        " medical text (KL); 20 matched features carry 6 % [1, 12], which is not clearly less. Of what it does to the"
        " loss on what the fine-tuned model itself writes (0.200 nats a token) they carry 41 % [33, 48]; 20 matched"
        " features carry 2 % [-1, 5]."
    )
    drawing = draw_shares(table)
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in drawing.figure.axes]
    assert titles == [
        "Share of the change in loss on what the fine-tuned model itself writes",
        "Share of the change in predictions (KL) on medical text",
    ]
    assert "undefined" not in drawing.caption
    assert what_it_causes(_table(*text), "medical") == put_back_sentence(_table(*text))
