from __future__ import annotations

import pydantic
import pytest
from pydantic import Field

from saeffect.config import ModelConfig, SteeringConfig, StrictModel
from saeffect.errors import ConfigError, UnknownName


class Arm(StrictModel):
    width: int = Field(4, ge=1)
    rate: float = 0.5


class Study(StrictModel):
    name: str
    arms: dict[str, Arm] = Field({})
    parts: tuple[Arm, ...] = ()
    spare: Arm | None = None


def test_reads_plain_data_with_defaults() -> None:
    study = Study.read({"name": "a", "arms": {"control": {"width": 2}}}, at="a.yaml")
    assert study.arms["control"] == Arm(width=2, rate=0.5)


def test_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Arm().width = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "place", "valid"),
    [
        ({"name": "a", "nmae": 1}, "a.yaml, nmae", "arms, name, parts, spare"),
        ({"name": "a", "arms": {"control": {"widht": 1}}}, "a.yaml, arms.control.widht", "rate, width"),
        ({"name": "a", "parts": [{"widht": 1}]}, "a.yaml, parts.0.widht", "rate, width"),
        ({"name": "a", "spare": {"widht": 1}}, "a.yaml, spare.widht", "rate, width"),
    ],
)
def test_unknown_key_error_lists_valid_keys(values: object, place: str, valid: str) -> None:
    with pytest.raises(UnknownName) as caught:
        Study.read(values, at="a.yaml")
    assert caught.value.at == place
    assert f"valid: {valid}." in caught.value.message
    assert "did you mean" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("values", "place", "part"),
    [
        ({}, "a.yaml, name", "the key 'name' is missing."),
        ({"name": "a", "arms": {"control": {"width": 0}}}, "a.yaml, arms.control.width", "Got 0."),
        ({"name": "a", "arms": {"control": {"rate": float("nan")}}}, "a.yaml, arms.control.rate", "finite"),
        ([], "a.yaml", "dictionary"),
    ],
)
def test_wrong_values_name_their_key(values: object, place: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Study.read(values, at="a.yaml")
    assert caught.value.at == place
    assert part in caught.value.message


def test_a_model_may_be_a_plain_path() -> None:
    assert ModelConfig.read("org/name", at="model") == ModelConfig(path="org/name")


def test_remote_code_is_off_by_default() -> None:
    assert ModelConfig(path="org/name").trust_remote_code is False


@pytest.mark.parametrize("values", [{"path": ""}, {"path": "a", "dtype": "int8"}, {"path": "a", "device": 3}])
def test_bad_models(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.read(values, at="model")


def test_default_doses_and_search_prompts() -> None:
    assert SteeringConfig.read({}, at="s").doses == (0.4,)
    assert SteeringConfig.read({"operator": "clamp"}, at="s").doses == (5.0,)
    assert SteeringConfig.read({"operator": "ablate"}, at="s").doses == (1.0,)
    paper = SteeringConfig.read({"coefficient": 50}, at="s")
    assert (paper.doses, paper.unit) == ((50.0,), "coefficient")
    halved = SteeringConfig.read({"doses": [0.2, 0.4], "prompts": ["a", "b", "c"]}, at="s")
    assert (halved.search_prompts, halved.prompts) == (("a",), ("b", "c"))
    for config in (paper, halved):
        assert SteeringConfig.read(config.model_dump(mode="json"), at="s") == config


@pytest.mark.parametrize(
    "values",
    [
        {"coefficient": 5, "doses": [0.4]},
        {"coefficient": 5, "operator": "clamp"},
        {"operator": "ablate", "doses": [0.5]},
        {"doses": [0.1, 0.2]},
        {"outcomes": []},
        {"outcomes": ["kl", "kl"]},
        {"together": {"control": [[1]]}},
        {"together": {"control": [[1, 1]]}},
    ],
)
def test_steering_that_contradicts_itself(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SteeringConfig.read(values, at="s")
