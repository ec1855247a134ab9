"""An architecture that the package does not know is read after one call."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saeffect.errors import ConfigError
from saeffect.lm.architectures import HOOK_MAPPINGS, HookMapping, register_hook_mapping, unembedding
from saeffect.lm.hooks import HOOK_KINDS, capture, edited
from saeffect.lm.language_model import LanguageModel

HOOKS = [f"blocks.1.{kind}" for kind in HOOK_KINDS]
MAPPING = HookMapping(
    blocks=("trunk.stages",), final_norm=("trunk.last",), attn_out=("mixer",), mlp_out=("wide",), resid_mid=("scale",)
)


class Stage(nn.Module):
    """A block with names of its own; its mixer looks at what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.scale, self.wide = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x.cumsum(1))
        return x + self.wide(self.scale(x))


class Stranger(nn.Module):
    """A causal language model of a type that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="stranger", num_hidden_layers=2)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.trunk = nn.ModuleDict({"stages": nn.ModuleList([Stage(), Stage()]), "last": nn.LayerNorm(8)})

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        x = self.embed(input_ids)
        for stage in self.trunk["stages"]:
            x = stage(x)
        return SimpleNamespace(logits=self.head(self.trunk["last"](x)))


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setattr("saeffect.lm.architectures.HOOK_MAPPINGS", dict(HOOK_MAPPINGS))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(Stranger().eval().requires_grad_(False), None, "stranger")


def test_unknown_architecture_says_how_to_register_it(lm: LanguageModel, complains: Callable[..., Any]) -> None:
    with complains(ConfigError, "Stranger keeps its blocks in none", "register_hook_mapping"):
        capture(lm, HOOKS[0], torch.tensor([[1, 2, 3]]))


def test_registered_architecture_is_captured_and_edited(lm: LanguageModel, complains: Callable[..., Any]) -> None:
    register_hook_mapping("stranger", MAPPING)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    pre, mid, post, attention, mlp = (capture(lm, hook, ids) for hook in HOOKS)
    torch.testing.assert_close(pre + attention, mid)
    torch.testing.assert_close(mid + mlp, post)
    with edited(lm, "blocks.1.hook_mlp_out", lambda x: x + 1):
        torch.testing.assert_close(capture(lm, "blocks.1.hook_resid_post", ids), post + 1)
    assert unembedding(lm).shape == (8, 20)
    with complains(ConfigError, "a hook mapping for 'stranger' already"):
        register_hook_mapping("stranger", MAPPING)


def test_wrong_mapping_is_found_out(lm: LanguageModel, complains: Callable[..., Any]) -> None:
    register_hook_mapping("stranger", HookMapping(blocks=("trunk.stages",), attn_out=("scale",), mlp_out=("wide",)))
    with complains(ConfigError, "Stage does not add up by its hook_attn_out"):
        capture(lm, "blocks.1.hook_attn_out", torch.tensor([[1, 2, 3]]))
