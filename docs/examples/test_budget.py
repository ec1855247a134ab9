"""The budget as tests, one a rule: pytest test_budget.py, in the folder with the models."""

import pytest

from saeffect.study.guard import guard, read_budget

BUDGET = read_budget("budget.yaml")


@pytest.fixture(scope="session")
def verdicts():
    found = guard("base", "tuned", BUDGET, nulls="nulls", sae="sae", text=["general.jsonl"])
    return {verdict.rule: verdict for verdict in found}


@pytest.mark.parametrize("rule", BUDGET.rules)
def test_the_budget_is_kept(verdicts, rule):
    assert verdicts[rule].status in ("kept", "reported"), verdicts[rule].reason
