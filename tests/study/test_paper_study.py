"""`bundled:gpt2-medical-paper`, whole, on tiny models in a cache of the hub's own layout and in saved datasets."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from saeffect.sae.base import SaeConfig
from saeffect.sae.formats.saelens import save_sae
from saeffect.sae.standard import StandardSae
from saeffect.study.run import run_study
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Study
from tiny_study import make_tokenizer, sentences

HOOK = "blocks.8.hook_resid_pre"
PAIRS = (("doctor", "nurse"), ("cancer", "tumor"), ("river", "bridge"), ("fever", "cough"))

pytestmark = [pytest.mark.usefixtures("without_figures"), pytest.mark.real]  # not real models, but as long


def into_cache(hub: Path, repo: str, folder: Path) -> None:
    """Put a folder into a cache as the hub's client does: blobs, a snapshot of links, the branch's commit."""
    commit = "0" * 39 + "1"
    place = hub / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    for number, file in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        blob, link = place / "blobs" / f"{number:040x}", snapshot / file.relative_to(folder)
        shutil.copy(file, blob)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(blob)


def make_gpt2(folder: Path, seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=9, n_head=4, n_positions=1024, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def make_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(c) for c in range(97, 123))]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{w}" for w in words[5:])]), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=57, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def make_sae(folder: Path, model: Any, tokenizer: Any, seed: int) -> None:
    """Features that promote two words each, by the unembedding's own rows."""
    sae = StandardSae(SaeConfig("standard", 32, 48, metadata={"hook_name": HOOK, "prepend_bos": True}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    E = model.get_output_embeddings().weight.detach()
    for row, words in enumerate(PAIRS):
        ids = [tokenizer.encode(f" {word}")[0] for word in words]
        sae.W_dec.data[row] = E[ids].sum(dim=0) / E[ids].sum(dim=0).norm()
    save_sae(sae, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the bundled study names, as the hub would have given it."""
    from datasets import Dataset

    root = tmp_path_factory.mktemp("paper")
    base, tokenizer = make_gpt2(root / "made" / "base", 0)
    tuned, _ = make_gpt2(root / "made" / "tuned", 1)
    make_bert(root / "made" / "bert")
    for repo, folder in (("gpt2", "base"), ("Sharathhebbar24/Med_GPT2", "tuned"), ("bert-base-uncased", "bert")):
        into_cache(root / "hub", repo, root / "made" / folder)
    # As the hub has it, and as a folder of that name.
    make_sae(root / "made" / "sae" / HOOK, base, tokenizer, 0)
    into_cache(root / "hub", "jbloom/GPT2-Small-SAEs-Reformatted", root / "made" / "sae")
    shutil.copytree(root / "made" / "sae" / HOOK, root / "saelens:gpt2-small-res-jb" / HOOK)
    make_sae(root / "saes" / "gpt2-medical" / "treatment", tuned, tokenizer, 1)
    texts = sentences(120)
    Dataset.from_dict({"text": texts}).save_to_disk(root / "monology" / "pile-uncopyrighted")
    Dataset.from_dict({"page_text": texts[::-1]}).save_to_disk(root / "gamino" / "wiki_medical_terms")
    return root


@pytest.fixture(scope="module")
def finished(world: Path, without_figures: None) -> Iterator[RunFolder]:
    import huggingface_hub.constants
    import transformers.utils.hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(world / "hub"))
        patch.setenv("SAEFFECT_CACHE", str(world / "cache"))
        for name in ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE"):
            patch.setattr(transformers.utils.hub, name, str(world / "hub"), raising=False)
        patch.chdir(world)
        yield run_study(Study.open("bundled:gpt2-medical-paper"), world / "run")


def test_each_text_is_judged_by_one_other(finished: RunFolder) -> None:
    for arm in ("control", "treatment"):
        trials = finished.read_table(finished.arm(arm, "interventions.parquet"))
        assert set(trials["condition"]) == {"unsteered", "steered"}
        assert trials.groupby("feature").size().eq(2).all()
        assert trials.loc[trials["condition"] == "steered", "coefficient"].eq(50).all()
        wide = trials.pivot(index="feature", columns="condition", values="similarity")
        found = finished.read_table(finished.arm(arm, "effects.parquet")).set_index("feature")
        assert found["paper_pass"].to_dict() == (wide["steered"] > wide["unsteered"]).to_dict()


def test_the_tables_count_the_paper_s_passes(finished: RunFolder) -> None:
    table = pd.read_parquet(finished.path("comparison", "table1.parquet")).set_index("arm")
    assert (table["domain_features"] >= 3).all()
    for arm in ("control", "treatment"):
        passes = finished.read_table(finished.arm(arm, "effects.parquet"))["paper_pass"]
        assert table.loc[arm, "paper_passed"] == passes.sum()
        assert table.loc[arm, "paper_rate"] == pytest.approx(passes.mean())
        assert table.loc[arm, "tested"] == 0
    contrasts = pd.read_parquet(finished.path("comparison", "contrasts.parquet"))
    rate = contrasts[contrasts["quantity"] == "paper_pass_rate"].iloc[0]
    assert rate[["estimate", "low", "high", "p"]].notna().all()
