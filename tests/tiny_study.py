"""A whole study small enough for seconds: two random Llamas that share a tokenizer, random SAEs, a page of text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from pytest import MonkeyPatch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saeffect.diffing import trace, written
from saeffect.sae.base import SaeConfig
from saeffect.sae.formats import save_sae
from saeffect.sae.topk import TopKSae
from saeffect.sae.training.config import SaeTrainingConfig

HOOK = "blocks.1.hook_resid_pre"
BEFORE_STEERING = ("gate", "features", "coherence", "select", "match", "changes", "put-back")
WORDS = (
    "cancer tumor disease doctor nurse patient clinic fever cough blood heart kidney drug dose vaccine virus "
    "river bridge market music garden window letter winter summer market teacher engine ocean forest paper story"
).split()
TWO_ARMS = {
    role: {"role": role, "model": f"./{model}", "sae": f"./saes/{role}"}
    for role, model in (("control", "base"), ("treatment", "tuned"))
}
"""`arms` of a study without a placebo."""
HOSTILE = ["<script>alert(1)</script>", "\u202eevil", "a\nb"]


def write_little() -> None:
    """In this process, models write 4 tokens after an opening in place of 40: that takes most of a tiny study."""
    trace.NEW_TOKENS = written.NEW_TOKENS = 4


def sentences(n: int) -> list[str]:
    generator = torch.Generator().manual_seed(7)
    picks = torch.randint(len(WORDS), (n, 12), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) + "." for row in picks]


def make_tokenizer(folder: Path, extra: list[str] | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(200) + (extra or []) + HOSTILE * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, seed: int, *, hidden: int = 32, layers: int = 3, extra: list[str] | None = None) -> None:
    fast = make_tokenizer(folder, extra)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_sae(folder: Path, seed: int, *, d_in: int = 32, d_sae: int = 96, **metadata: Any) -> None:
    sae = TopKSae(
        SaeConfig(
            "topk",
            d_in,
            d_sae,
            k=6,
            metadata={"hook_name": HOOK, "seed": seed, "training_tokens": 1} | metadata,
        )
    )
    sae.initialise(torch.zeros(1, d_in), SaeTrainingConfig(d_sae=d_sae, k=6, seed=seed))
    save_sae(sae, folder)


def make_study(folder: Path, **changes: Any) -> Path:
    """Write models, SAEs, text, vocabulary and `study.yaml`; `changes` replace top-level keys."""
    make_model(folder / "base", 0)
    make_model(folder / "tuned", 1)
    for index, arm in enumerate(("control", "treatment", "placebo")):
        make_sae(folder / "saes" / arm, index)
    rows = [json.dumps({"text": text}) for text in sentences(400)]
    (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "other.jsonl").write_text("\n".join(rows[::-1]), encoding="utf-8")
    (folder / "words.txt").write_text("\n".join(WORDS[:16]), encoding="utf-8")
    config: dict[str, Any] = {
        "name": "tiny",
        "arms": {
            "control": {"role": "control", "model": "./base", "sae": "./saes/control"},
            "treatment": {"role": "treatment", "model": "./tuned", "sae": "./saes/treatment"},
            "placebo": {"role": "placebo", "model": "./base", "sae": "./saes/placebo"},
        },
        "text": {
            "sources": [
                {"name": "domain", "path": "./text.jsonl"},
                {"name": "general", "path": "./other.jsonl"},
            ],
            "tokens": 1024,
            "context_size": 32,
        },
        "gate": {"tokens": 256, "on_failure": "warn"},
        "selection": {"vocabulary": "./words.txt", "min_matches": 1},
        "steering": {
            "prompts": ["The river", "My doctor said"],
            "search_prompts": ["My heart"],
            "doses": [0.5, 1.0],
            "search_features": 2,
            "max_features": 5,
            "samples": 2,
            "max_new_tokens": 12,
            "top_p": 1.0,
            "baseline_features": 2,
            "outcomes": ["similarity", "off_list"],
        },
        "comparison": {"n_boot": 100, "n_permutations": 200},
    }
    config |= changes
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@contextlib.contextmanager
def only_figures(*names: str) -> Iterator[None]:
    """Each other figure of a report has a reason in the place of a drawing: drawing takes most of a tiny study."""
    from dataclasses import replace

    from saeffect.errors import Undefined
    from saeffect.report import figures

    def undrawn(*_: Any) -> None:
        raise Undefined("not drawn in this test.")

    kinds = [kind if kind.name in names else replace(kind, draw=undrawn) for kind in figures.FIGURES]
    with MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", kinds)
        yield
