"""From text and a model to an SAE with its card, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeffect.config import ModelConfig
from saeffect.errors import ConfigError, EmptySelection, NotFound
from saeffect.models.language_model import LanguageModel
from saeffect.sae.recipe import SaeRecipe, TextSource, text_rows, train_from_recipe
from saeffect.sae.saelens_format import load_sae
from saeffect.sae.training import SaeTrainingConfig
from saeffect.text.corpora import is_held_out

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def recipe(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SaeRecipe:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("general", "train town river snow"), ("medical", "nurse dose fever blood")):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(150):
                text = f"The {words.split()[i % 4]} number {i} and the {words.split()[i // 4 % 4]}."
                file.write(json.dumps({"text": text}) + "\n")
    return SaeRecipe(
        model=ModelConfig(path=str(tiny_llama_folder), dtype="float32"),
        hook=HOOK,
        text=(
            TextSource(name="general", path=str(folder / "general.jsonl"), licence="CC0-1.0"),
            TextSource(name="medical", path=str(folder / "medical.jsonl")),
        ),
        tokens=2048,
        held_out_tokens=256,
        held_out=0.2,
        context_size=16,
        ce_rows=4,
        sae=SaeTrainingConfig(d_sae=64, k=4, epochs=2, batch_size=128),
    )


def test_rows_alternate_and_held_out_documents_are_apart(recipe: SaeRecipe, tiny_llama: LanguageModel) -> None:
    train, held_out = (text_rows(recipe, tiny_llama, held_out=h) for h in (False, True))
    assert train.ids.shape == (128, 16)
    assert held_out.ids.shape == (16, 16)
    assert train.sources.tolist() == [0, 1] * 64
    assert train.names == ("general", "medical")
    documents = {False: set(), True: set()}
    for rows, part in ((train, False), (held_out, True)):
        for source in (0, 1):
            stream = tiny_llama.tokenizer.decode(
                rows.ids[rows.sources == source].ravel().tolist(), clean_up_tokenization_spaces=False
            )
            documents[part] |= set(stream.split("<|endoftext|>")[1:-1])
    assert documents[True]
    assert all(is_held_out(text, 0.2) for text in documents[True])
    assert not any(is_held_out(text, 0.2) for text in documents[False])


def test_the_order_of_documents_has_its_own_seed(recipe: SaeRecipe, tiny_llama: LanguageModel) -> None:
    def digest(**changes: Any) -> str:
        return text_rows(recipe.model_copy(update=changes), tiny_llama, held_out=False).digest()

    assert digest() == digest(sae=SaeTrainingConfig(seed=5))
    assert digest() != digest(text_seed=1)


def test_everything(recipe: SaeRecipe, tmp_path: Path, tiny_llama_folder: Path) -> None:
    said: list[str] = []
    measured = train_from_recipe(recipe, tmp_path / "sae", work=tmp_path / "work", say=said.append)
    names = {p.name for p in (tmp_path / "sae").iterdir()}
    assert names == {"README.md", "cfg.json", "metrics.jsonl", "sae_weights.safetensors", "training.json"}
    sae = load_sae(tmp_path / "sae")
    metadata = sae.cfg.metadata
    assert sae.cfg.hook_name == HOOK
    assert metadata["training_tokens"] == 4096
    assert metadata["held_out"] == measured
    assert metadata["mean_norm"] > 0
    note = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert note["held_out"] == measured
    assert [t["path"] for t in note["recipe"]["text"]] == ["general.jsonl", "medical.jsonl"]
    card = (tmp_path / "sae" / "README.md").read_text()
    assert "| general | general.jsonl | CC0-1.0 |" in card
    assert f"| explained variance | {measured['explained_variance']:.4f} |" in card
    assert str(tmp_path) not in card

    said.clear()
    again = train_from_recipe(
        recipe.model_copy(update={"sae": recipe.sae.model_copy(update={"seed": 1})}),
        tmp_path / "other",
        work=tmp_path / "work",
        say=said.append,
    )
    assert not any(line.startswith("harvest") for line in said), "arms with the same model share their harvest"
    assert again["explained_variance"] != measured["explained_variance"]
    assert again["ce_clean"] == measured["ce_clean"]


def test_bad_recipes(recipe: SaeRecipe, tmp_path: Path, complains: Callable[..., Any]) -> None:
    def run(**changes: Any) -> None:
        train_from_recipe(recipe.model_copy(update=changes), tmp_path / "sae", work=tmp_path / "work")

    with complains(ConfigError, "needs block 3", at="hook"):
        run(hook="blocks.3.hook_resid_pre")
    with complains(EmptySelection, "999,999 are wanted", at="tokens"):
        run(tokens=999_999)
    with complains(EmptySelection, at="held_out_tokens"):
        run(held_out_tokens=99_999)
    with complains(NotFound, at="text.0"):
        run(text=(TextSource(name="a", path="none.jsonl"),))
    with complains(NotFound, at="model"):
        run(model=ModelConfig(path="./none"))
    assert not (tmp_path / "sae").exists()
    with complains(ConfigError, at="recipe.yaml, dtype"):
        SaeRecipe.read({**recipe.model_dump(), "dtype": "int8"}, at="recipe.yaml")
