"""Keys of chats in study and recipe files."""

from __future__ import annotations

from typing import Any

import pytest

from saeffect.config import SteeringConfig, TextConfig
from saeffect.config_chat import Message, as_chat, prompt_name
from saeffect.errors import ConfigError
from saeffect.lm.finetune import FinetuneConfig
from saeffect.sae.training.config import SaeRecipe

SOURCE = {"name": "general", "path": "talks.jsonl"}
RECIPE = {"model": "m", "hook": "blocks.0.hook_resid_pre", "text": [SOURCE], "format": "chat"}


def test_messages_are_the_usual_field_of_chats() -> None:
    assert TextConfig.read({"sources": [SOURCE]}, at="").sources[0].field == "text"
    assert TextConfig.read({"sources": [SOURCE], "format": "chat"}, at="").sources[0].field == "messages"
    named = TextConfig.read({"sources": [SOURCE | {"field": "turns"}], "format": "chat"}, at="")
    assert named.sources[0].field == "turns"
    assert SaeRecipe.read(RECIPE, at="").text[0].field == "messages"
    assert FinetuneConfig.read({"model": "m", "text": "t.jsonl", "format": "chat"}, at="").field == "messages"


def test_prompts_as_chats() -> None:
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    plain = SteeringConfig.read({"prompts": ["a", [user]]}, at="")
    assert plain.prompts == ("a", (Message(role="user", content="a"),)) and plain.has_chats
    chats = SteeringConfig.read(
        {"prompts": ["a", [system, user | {"content": "b"}]], "format": "chat", "system": "t"}, at=""
    )
    assert [[m.content for m in prompt] for prompt in chats.prompts if not isinstance(prompt, str)] == [
        ["t", "a"],
        ["s", "b"],
    ]
    halves = SteeringConfig.read({"prompts": ["a", "b"], "doses": [1, 2], "format": "chat"}, at="")
    assert [prompt_name(p) for p in halves.search_prompts] == [prompt_name(as_chat("a", None, at=""))]
    assert not SteeringConfig.read({}, at="").has_chats
    # A manifest holds the resolved section, which reads as it was.
    assert SteeringConfig.read(chats.model_dump(mode="json"), at="") == chats


@pytest.mark.parametrize(
    ("section", "model", "said"),
    [
        ({"positions": "user"}, SteeringConfig, "format: chat"),
        ({"positions": "narrator"}, SteeringConfig, "first_assistant"),
        ({"prompts": [[]]}, SteeringConfig, "no messages"),
        ({"prompts": [[{"role": "narrator", "content": "a"}]]}, SteeringConfig, "narrator"),
        ({"prompts": [[{"role": "user"}]]}, SteeringConfig, "prompts.0"),
        ({"prompts": ["a", "A"], "format": "chat"}, SteeringConfig, "twice"),
        ({"sources": [SOURCE], "positions": "assistant"}, TextConfig, "format: chat"),
        ({"sources": [SOURCE], "system": "s"}, TextConfig, "format: chat"),
        ({"sources": [SOURCE], "format": "chat", "positions": []}, TextConfig, "positions"),
        ({"bundled": "x", "format": "chat"}, TextConfig, "messages"),
        ({"model": "m", "text": "t", "loss": "assistant"}, FinetuneConfig, "format: chat"),
        (RECIPE | {"activations": "streamed", "tokens": 9, "positions": "user"}, SaeRecipe, "harvest shards"),
    ],
)
def test_what_does_not_go_together(section: dict[str, Any], model: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model.read(section, at="study.yaml")
    assert said in str(caught.value)
