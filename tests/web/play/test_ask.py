"""What can be asked, and that an address says all of it."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest

from saeffect.errors import ConfigError
from saeffect.web.play.ask import Ask

DEFAULTS = {"prompt": "Hello", "dose": 0.4}


def test_an_address_asks_for_the_same() -> None:
    ask = Ask(
        prompt="a & b\n=c", chat=True, arm="control", features=(3, 1), dose=-0.25, placebo="matched", seed=7, ends=False
    )
    assert Ask.from_query(parse_qsl(ask.query()), {}) == ask


def test_a_feature_page_links_with_arm_and_feature_alone() -> None:
    ask = Ask.from_query({"arm": "treatment", "feature": "12"}, DEFAULTS)
    assert (ask.prompt, ask.arm, ask.features, ask.dose) == ("Hello", "treatment", (12,), 0.4)
    assert Ask.from_query([("arm", "control"), ("feature", "1"), ("feature", "2")], DEFAULTS).features == (1, 2)


@pytest.mark.parametrize(
    "query",
    [
        {"features": "1,x"}, {"features": "1", "arm": ""}, {"arm": "a", "features": "1,1"}, {"arm": "a", "features": "-1"},
        {"dose": "nan"}, {"dose": "1e9"}, {"operator": "explode"}, {"seed": "-1"}, {"max_new_tokens": "100000"},
        {"prompt": ""}, {"prompt": "x" * 9000}, {"unknown": "1"}, {"operator": "clamp", "dose": "-1"},
        {"arm": "a", "features": ",".join(map(str, range(50)))},
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        Ask.from_query(query, DEFAULTS)
    assert "the address" in str(caught.value)


def test_the_plan_is_the_studys() -> None:
    plan = Ask(prompt="a", operator="ablate", dose=3.0, placebo="random", ends=False).plan("<a>")
    assert (plan.prompts, plan.doses, plan.placebos, plan.samples, plan.allow_end) == (
        ("<a>",),
        (1.0,),
        ("random",),
        1,
        False,
    )
