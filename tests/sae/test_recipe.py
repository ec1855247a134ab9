"""From text and a model to SAEs with their cards, on a tiny model; and every mistake, before anything is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saeffect.config import ModelConfig, TextSource
from saeffect.errors import BadFile, ConfigError, EmptySelection, IncompatibleSae, NotFound, UnknownName
from saeffect.lm.corpora import is_held_out
from saeffect.lm.language_model import LanguageModel
from saeffect.progress import Log
from saeffect.sae.formats import load_sae, read_sparsity
from saeffect.sae.training import recipe as recipe_module
from saeffect.sae.training.config import SaeRecipe, SaeTrainingConfig, recipe_keys
from saeffect.sae.training.log import read_metrics
from saeffect.sae.training.recipe import harvest_from_recipe, text_rows, train_from_recipe
from tiny_study import make_sae

HOOK = "blocks.1.hook_resid_pre"
ROOT = Path(__file__).parents[2]


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
        evaluation_rows=2,
        evaluation_tokens=64,
        sae=SaeTrainingConfig(d_sae=64, k=4, epochs=2, batch_size=128, evaluate_every=10, metrics_every=5),
    )


@pytest.fixture(scope="module")
def trained(recipe: SaeRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    """(the folder that holds the SAE and the harvest, the measurements, what was said)"""
    folder = tmp_path_factory.mktemp("trained")
    said: list[str] = []
    measured = train_from_recipe(recipe, folder / "sae", work=folder / "work", log=Log(said.append))
    return folder, measured, said


def changed(recipe: SaeRecipe, **changes: Any) -> SaeRecipe:
    """Validated again; "sae" may name the keys that change."""
    values = recipe.model_dump(exclude_unset=True)
    if "sae" in changes:
        changes["sae"] = values["sae"] | changes["sae"]
    return SaeRecipe.read(values | changes, at="recipe.yaml")


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


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


def test_streamed_held_out_rows_stop_when_enough(
    recipe: SaeRecipe, tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def endless(source: TextSource, chat: bool = False) -> Any:
        for i in range(10**9):
            taken.append(i)
            yield f"The {source.path[-14:-6]} number {i} of the town."

    monkeypatch.setattr(recipe_module, "read_corpus", endless)
    streamed = recipe.model_copy(update={"activations": "streamed"})
    rows = text_rows(streamed, tiny_llama, held_out=True)
    assert rows.ids.shape == (16, 16)
    assert len(taken) < 400


def test_the_order_of_documents_has_its_own_seed(recipe: SaeRecipe, tiny_llama: LanguageModel) -> None:
    def digest(**changes: Any) -> str:
        return text_rows(recipe.model_copy(update=changes), tiny_llama, held_out=False).identity()

    assert digest() == digest(sae=SaeTrainingConfig(seed=5))
    assert digest() != digest(text_seed=1)


def test_everything(recipe: SaeRecipe, trained: tuple[Path, Any, list[str]]) -> None:
    folder, measured, said = trained
    out = folder / "sae"
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "cfg.json", "metrics.jsonl", "sae_weights.safetensors", "training.json", "finished.json"),
        *("sparsity.safetensors", "training.svg", "training.png"),
    }
    metadata = load_sae(out).cfg.metadata
    assert metadata["hook_name"] == HOOK
    assert metadata["training_tokens"] == 4096
    assert metadata["unique_tokens"] == 2048
    assert metadata["held_out"] == measured
    assert metadata["mean_norm"] > 0
    note = json.loads((out / "training.json").read_text())
    assert note["held_out"] == measured
    assert [t["path"] for t in note["recipe"]["text"]] == ["general.jsonl", "medical.jsonl"]
    card = (out / "README.md").read_text()
    assert "| general | general.jsonl | CC0-1.0 |" in card
    assert f"| explained variance | {measured['explained_variance']:.4f} |" in card
    dead = int((read_sparsity(out) < -9.9).sum())
    assert f"| {dead} of 64 |" in card
    assert "](training.png)" in card
    assert str(folder) not in card + json.dumps(note["recipe"]["text"])
    assert card.startswith(f"# TopK SAE for {Path(recipe.model.path).name} at {HOOK}\n")
    assert str(Path(recipe.model.path).parent) not in card + json.dumps(note)
    assert "Every row begins with a BOS token." in card or not metadata["prepend_bos"]
    assert said[-1].startswith("explained variance")


def test_held_out_text_is_measured_on_the_way(recipe: SaeRecipe, trained: tuple[Path, Any, list[str]]) -> None:
    rows = [row for row in read_metrics(trained[0] / "sae") if row["kind"] == "evaluation"]
    assert [row["step"] for row in rows] == [9, 19, 29]
    names = {"explained_variance", "l2_ratio", "l0", "dead", "mean_log10_density", "ce_loss_score"}
    assert all(names <= set(row) and all(math.isfinite(row[name]) for name in names) for row in rows)
    assert len({row["explained_variance"] for row in rows}) == 3
    assert 0 <= rows[-1]["dead"] <= 64


def test_finished_recipe_is_not_repeated(
    recipe: SaeRecipe, trained: tuple[Path, Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, measured, _ = trained
    before = {p: p.stat().st_mtime_ns for p in (folder / "sae").iterdir()}
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "spliced_losses", None)
        assert train_from_recipe(recipe, folder / "sae", work=folder / "work", log=Log(said.append)) == measured
    assert {p: p.stat().st_mtime_ns for p in (folder / "sae").iterdir()} == before
    # A kill between weights and card: the card is made up for.
    (folder / "sae" / "training.json").unlink()
    assert train_from_recipe(recipe, folder / "sae", work=folder / "work", log=Log(said.append)) == measured


def test_card_is_restored_but_edits_stay(
    recipe: SaeRecipe, trained: tuple[Path, Any, list[str]], tmp_path: Path
) -> None:
    folder, measured, _ = trained
    out = Path(shutil.copytree(folder / "sae", tmp_path / "sae"))
    said: list[str] = []

    def again(**changes: Any) -> str:
        said.clear()
        train_from_recipe(recipe.model_copy(update=changes), out, work=folder / "work", log=Log(said.append))
        assert "finished before; nothing to do" in said
        return (out / "README.md").read_text()

    whole = (out / "README.md").read_text()
    (out / "README.md").write_text("")
    assert again() == whole
    (out / "training.json").write_text("[3]")
    assert again() == whole
    (out / "cfg.json").write_text("torn")
    assert again() == whole
    assert load_sae(out).cfg.metadata["held_out"] == measured
    assert again(ce_rows=3) != whole, "it is ours, so it is written anew"
    (out / "README.md").write_text("With notes of my own.")
    assert again(ce_rows=2) == "With notes of my own."
    assert any("README.md is not as it was written here, so it stays" in line for line in said)


def test_other_recipes_folder_is_refused_early(
    recipe: SaeRecipe, trained: tuple[Path, Any, list[str]], tmp_path: Path, complains: Callable[..., Any]
) -> None:
    folder, _, _ = trained
    before = {path: path.read_bytes() for path in (folder / "sae").iterdir()}
    for change in ({"text_seed": 1}, {"sae": recipe.sae.model_copy(update={"k": 3})}, {"dtype": "float32"}):
        other = recipe.model_copy(update=change)
        with complains(ConfigError, "another recipe", at=str(folder / "sae")):
            train_from_recipe(other, folder / "sae", work=tmp_path / "work")
    (tmp_path / "README.md").write_text("mine")
    with complains(ConfigError, "holds README.md", at=str(tmp_path)):
        never = recipe.model_copy(update={"model": ModelConfig(path="never/loaded")})
        train_from_recipe(never, tmp_path, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert {path: path.read_bytes() for path in (folder / "sae").iterdir()} == before


def test_several_side_by_side(recipe: SaeRecipe, trained: tuple[Path, Any, list[str]], tmp_path: Path) -> None:
    work = trained[0] / "work"
    several = changed(recipe, saes={"seed-0": {"seed": 0}, "wide": {"d_sae": 96, "seed": 1}})
    assert {c.data_seed for c in several.trainings().values()} == {0}
    said: list[str] = []
    measured = train_from_recipe(several, tmp_path, work=work, log=Log(said.append))
    assert not any(line.startswith("harvest") for line in said), "SAEs of the same model share their harvest"
    assert {p.name for p in tmp_path.iterdir()} == {"seed-0", "wide"}
    assert load_sae(tmp_path / "wide").cfg.d_sae == 96
    assert measured["seed-0"] == trained[1], "side by side it is what it is alone"
    assert measured["wide"] != measured["seed-0"]
    assert "96 features" in (tmp_path / "wide" / "README.md").read_text()


@pytest.mark.parametrize(
    ("architecture", "more", "words"),
    [
        ("standard", {"l1_coefficient": 2.0, "resample_every": 20, "dead_window": 10}, "L1 coefficient 2 "),
        ("batchtopk", {"k": 4}, "k = 4 on average"),
        ("jumprelu", {}, "L0 coefficient 1 "),
        ("gated", {}, "L1 coefficient 5 "),
        ("matryoshka", {"k": 4}, "nested widths 8, 16, 32, 64"),
    ],
)
def test_every_architecture_has_its_card(
    architecture: str,
    more: dict[str, Any],
    words: str,
    recipe: SaeRecipe,
    trained: tuple[Path, Any, list[str]],
    tmp_path: Path,
) -> None:
    sae = {"architecture": architecture, "d_sae": 64, "epochs": 1, "batch_size": 128} | more
    one = SaeRecipe.read({**recipe.model_dump(exclude_unset=True), "sae": sae}, at="recipe.yaml")
    measured = train_from_recipe(one, tmp_path / "sae", work=trained[0] / "work")
    card = (tmp_path / "sae" / "README.md").read_text()
    assert words in card
    assert f"at {HOOK}" in card.splitlines()[0]
    assert f"| l0 | {measured['l0']:.1f} |" in card
    assert ("as JumpReLU with the threshold" in card) == (architecture in ("batchtopk", "matryoshka"))


def test_streaming_writes_only_held_out_shards(recipe: SaeRecipe, tmp_path: Path) -> None:
    sae = {"steps": 40, "metrics_every": 10, "evaluate_every": 20}
    streamed = changed(recipe, activations="streamed", pool_rows=32, tokens=None, sae=sae)
    measured = train_from_recipe(streamed, tmp_path / "sae", work=tmp_path / "work")
    assert [p.name.split("-")[0] for p in (tmp_path / "work").iterdir()] == ["held"]
    rows = read_metrics(tmp_path / "sae")
    assert rows[-1]["tokens"] == 40 * 128, "more than the text has: it is read again"
    assert measured["explained_variance"] > rows[0].get("explained_variance", 0)
    metadata = load_sae(tmp_path / "sae").cfg.metadata
    assert metadata["training_tokens"] == 40 * 128
    assert metadata["unique_tokens"] is None
    assert "40 steps of 128 tokens (5,120 in all)" in (tmp_path / "sae" / "README.md").read_text()


def test_init_from_keeps_feature_indices(
    recipe: SaeRecipe, trained: tuple[Path, Any, list[str]], tmp_path: Path
) -> None:
    first = trained[0] / "sae"
    warm = changed(recipe, sae={"init_from": str(first), "epochs": 1, "learning_rate": 1e-5})
    train_from_recipe(warm, tmp_path / "sae", work=trained[0] / "work")
    old, new = load_sae(first).W_dec, load_sae(tmp_path / "sae").W_dec
    assert torch.nn.functional.cosine_similarity(old, new).min() > 0.99
    assert str(first) not in (tmp_path / "sae" / "training.json").read_text()


def test_harvesting_alone(recipe: SaeRecipe, trained: tuple[Path, Any, list[str]], tmp_path: Path) -> None:
    folders = harvest_from_recipe(recipe, work=tmp_path)
    assert [f.name for f in folders] == sorted((p.name for p in (trained[0] / "work").iterdir()), reverse=True)
    for folder in folders:
        there = trained[0] / "work" / folder.name
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in there.iterdir()}


def test_streamed_activations_are_not_harvested(recipe: SaeRecipe, tmp_path: Path, complains: Any) -> None:
    with complains(ConfigError, "nothing to harvest", at="activations"):
        harvest_from_recipe(changed(recipe, activations="streamed"), work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


BAD_VALUES: dict[str, tuple[dict[str, Any], type, str, str]] = {
    "k above d_sae": ({"sae": {"k": 65}}, ConfigError, "k=65 is more than d_sae=64", "recipe.yaml, sae"),
    "negative penalty": (
        {"sae": {"architecture": "standard", "k": 32, "l1_coefficient": -1.0}},
        ConfigError,
        "greater than or equal to 0",
        "sae.l1_coefficient",
    ),
    "hook of no kind": (
        {"hook": "blocks.1.hook_resid_prr"},
        UnknownName,
        "valid: attn.hook_z, hook_attn_out, hook_mlp_out, hook_resid_mid, hook_resid_post, hook_resid_pre",
        "hook",
    ),
    "no hook at all": ({"hook": "resid"}, ConfigError, "expected blocks.<layer>.<kind>", "recipe.yaml, hook"),
    "unknown key": ({"sae": {"d_see": 8}}, UnknownName, "did you mean 'd_sae'", "recipe.yaml, sae.d_see"),
    "dtype": ({"dtype": "int8"}, UnknownName, "int8", "recipe.yaml, dtype"),
    "a name that is a path": ({"saes": {"../a": {}}}, ConfigError, "'../a'", "recipe.yaml, saes"),
    "no names": ({"saes": {}}, ConfigError, "no SAE is named", "recipe.yaml, saes"),
    "unknown change": ({"saes": {"a": {"sed": 1}}}, UnknownName, "did you mean 'seed'", "recipe.yaml, saes.a"),
    "a change out of range": ({"saes": {"a": {"k": 0}}}, ConfigError, "Got 0", "recipe.yaml, saes.a"),
    "other batches": (
        {"saes": {"a": {}, "b": {"batch_size": 64}}},
        ConfigError,
        "share batch_size; got 128 and 64",
        "saes.b.batch_size",
    ),
    "no length": ({"activations": "streamed", "tokens": None}, ConfigError, "give tokens, or sae.steps", "recipe.yaml"),
    "no room at all": ({"max_disk_gb": 0}, ConfigError, "greater than 0", "max_disk_gb"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(case: str, recipe: SaeRecipe, complains: Callable[..., Any]) -> None:
    changes, kind, message, at = BAD_VALUES[case]
    with complains(kind, message, at=at):
        changed(recipe, **changes)


def _short(folder: Path) -> dict[str, Any]:
    (folder / "short.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    return {"text": [{"name": "a", "path": str(folder / "short.jsonl")}]}


def _from(folder: Path, **sizes: int) -> dict[str, Any]:
    make_sae(folder / "other", 0, **sizes)
    return {"sae": {"init_from": str(folder / "other")}}


def _broken(folder: Path) -> dict[str, Any]:
    changes = _from(folder, d_sae=64)
    path = folder / "other" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return changes


# Whether the model's weights may be loaded before it is found.
BAD_SURROUNDINGS: dict[str, tuple[Callable[[Path], dict[str, Any]], type, str, str, bool]] = {
    "rows longer than the model": (lambda f: {"context_size": 129}, ConfigError, "takes 128", "context_size", False),
    "block beyond the model": (lambda f: {"hook": "blocks.3.hook_resid_pre"}, ConfigError, "(0 to 2)", "hook", False),
    "no such text": (lambda f: {"text": [{"name": "a", "path": "no.jsonl"}]}, NotFound, "no.jsonl", "text.0", False),
    "no such model": (lambda f: {"model": "./none"}, NotFound, "none", "model", False),
    "init_from nothing": (lambda f: {"sae": {"init_from": "./no"}}, NotFound, "no folder", "sae.init_from", False),
    "init_from of another d_sae": (lambda f: _from(f, d_sae=96), IncompatibleSae, "d_sae=96", "sae.init_from", False),
    "init_from of another d_in": (
        lambda f: _from(f, d_in=48, d_sae=64),
        IncompatibleSae,
        "d_in=48",
        "sae.init_from",
        False,
    ),
    "init_from truncated": (_broken, BadFile, "sae_weights", "sae.init_from", True),
    "text shorter than a context": (_short, EmptySelection, "fewer than one context of 16", "text.0", True),
    "too little text": (lambda f: {"tokens": 999_999}, EmptySelection, "999,999 are wanted", "tokens", True),
    "too little held out": (lambda f: {"held_out_tokens": 99_999}, EmptySelection, "99,999", "held_out_tokens", True),
    "less than a batch": (lambda f: {"tokens": 100}, EmptySelection, "at most 90", "sae.batch_size", True),
    "above the cap": (lambda f: {"max_disk_gb": 1e-4}, ConfigError, "the cap is 100,000 bytes", "max_disk_gb", True),
}


@pytest.mark.parametrize("case", BAD_SURROUNDINGS)
def test_misfits_are_refused_before_writing(
    case: str,
    recipe: SaeRecipe,
    tmp_path: Path,
    complains: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, kind, message, at, may_load = BAD_SURROUNDINGS[case]
    bad = changed(recipe, **change(tmp_path))
    if not may_load:
        monkeypatch.setattr(recipe_module, "load_language_model", None)
    monkeypatch.setattr(recipe_module, "harvest", None)
    before = tree(tmp_path)
    with complains(kind, message, at=at):
        train_from_recipe(bad, tmp_path / "sae", work=tmp_path / "work")
    assert tree(tmp_path) == before


def test_folders_that_cannot_be_written(recipe: SaeRecipe, tmp_path: Path, complains: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("")
    with complains(BadFile, "is a file", at="--out"):
        train_from_recipe(recipe, tmp_path / "file" / "sae", work=tmp_path / "work")
    with complains(BadFile, "is a file", at="--work"):
        train_from_recipe(recipe, tmp_path / "sae", work=tmp_path / "file" / "work")
    assert tree(tmp_path) == {tmp_path / "file"}


def test_a_logger_that_is_not_there(
    recipe: SaeRecipe, tmp_path: Path, complains: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with complains(NotFound, 'pip install "saeffect[wandb]"', at="logger"):
        train_from_recipe(recipe, tmp_path / "sae", work=tmp_path / "work", logger="wandb")
    with complains(UnknownName, "valid: none, tensorboard, wandb", at="logger"):
        train_from_recipe(recipe, tmp_path / "sae", work=tmp_path / "work", logger="wand")  # type: ignore[arg-type]
    assert tree(tmp_path) == set()


def test_the_page_of_keys_is_true() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == recipe_keys(), "write it anew: saeffect train-sae --keys > docs/recipe.md"
    fields = {**SaeRecipe.model_fields, **SaeTrainingConfig.model_fields}
    assert all(field.description for field in fields.values())
    assert all(f"| `{name}` |" in page for name in fields)
    assert "Only for standard, gated, crosscoder_l1." in next(
        line for line in page.splitlines() if "`l1_coefficient`" in line
    )


def test_the_recipes_that_come_with_the_code_are_valid() -> None:
    import yaml

    for path in (ROOT / "recipes").glob("*sae*.yaml"):
        SaeRecipe.read(yaml.safe_load(path.read_text(encoding="utf-8")), at=path.name)
