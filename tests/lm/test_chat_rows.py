"""Conversations as rows: where they begin, which tokens count, and that masks reach activations and losses."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from chat_templates import FAMILIES, chat_tokenizer
from saeffect.config import TextSource
from saeffect.config_chat import ChatKeys
from saeffect.errors import BadFile, ConfigError, EmptySelection
from saeffect.io import read_json
from saeffect.lm.activations import NormLimit, StreamedActivations, TokenRows, kept_positions
from saeffect.lm.chat import has_part, messages_of
from saeffect.lm.chat_rows import Row, counted, cut_rows, lm_for_chats
from saeffect.lm.corpora import is_held_out, read_corpus
from saeffect.lm.finetune import FinetuneConfig, finetune, perplexity
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import load_language_model
from saeffect.lm.lora import next_token_loss
from tiny_study import make_model

CHAT = ChatKeys(format="chat")
TALKS = [
    json.dumps([{"role": "user", "content": f"What is a dose{'.' * n}"}, {"role": "assistant", "content": "A fever"}])
    for n in range(6)
]


def _lm(family: str = "llama3") -> LanguageModel:
    return lm_for_chats(LanguageModel(None, chat_tokenizer(family), family), CHAT)


def _rows(lm: LanguageModel, width: int, **keys: Any) -> list[Row]:
    return list(cut_rows(lm, TALKS, width, ChatKeys(format="chat", **keys)))


@pytest.mark.parametrize("family", ["llama3", "chatml"])
def test_rows_begin_where_a_conversation_does(family: str) -> None:
    lm = _lm(family)
    first = [lm.encode_chat(json.loads(talk)) for talk in TALKS]
    rows = _rows(lm, len(first[0].ids) + 20)
    assert len(rows) == 3 and all(row.ids.dtype == np.int32 for row in rows)
    begun = lm.encode_chat(json.loads(TALKS[1]), begins=False).ids
    separator = lm.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert rows[0].ids.tolist() == [*first[0].ids, separator, *begun[:19]]
    assert rows[1].ids.tolist()[: len(first[2].ids)] == first[2].ids
    assert (rows[0].ids == lm.bos_id).sum() == (family == "llama3")
    assert rows[0].parts is not None and rows[0].parts[: len(first[0].ids)].tolist() == first[0].parts.tolist()


def test_a_system_message_for_those_without_one() -> None:
    lm = _lm("chatml")
    row = _rows(lm, 24, system="Be brief.")[0]
    assert lm.tokenizer.decode(row.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_too_few_conversations_and_no_such_token() -> None:
    with pytest.raises(EmptySelection, match="fewer than one context"):
        _rows(_lm(), 1000)
    with pytest.raises(EmptySelection, match="is of system"):
        counted(_rows(_lm("chatml"), 24), ("system",))


def test_masks_follow_rows() -> None:
    found = _rows(_lm(), 40)
    rows = TokenRows.from_rows(found, [0] * len(found), ("general",), ("assistant", "user"))
    assert rows.counts is not None
    both = np.stack([has_part(row.parts, ("assistant", "user")) for row in found if row.parts is not None])
    assert np.array_equal(rows.counts, both) and both.any() and not both.all()
    part = rows.part(np.array([1]), 30)
    assert part.counts is not None and np.array_equal(part.counts, both[1:2, :30])
    assert rows.head(1).identity() != TokenRows(rows.ids[:1], rows.sources[:1], rows.names).identity()
    assert TokenRows.from_rows(found, [0] * len(found), ("general",)).counts is None
    x = torch.ones(2, 40, 4)
    kept = kept_positions(x, NormLimit(1.0, 5.0), rows.counts_of(0, 2))
    assert np.array_equal(kept.numpy()[:, 1:], both[:2, 1:]) and not kept[:, 0].any()


def test_streams_are_of_all_tokens(tiny_llama: LanguageModel) -> None:
    ids = np.ones((4, 16), dtype=np.int32)
    rows = TokenRows(ids, np.zeros(4, dtype=np.int64), ("a",), ids > 1)
    with pytest.raises(ConfigError, match="activations: shards"):
        StreamedActivations.open(tiny_llama, "blocks.0.hook_resid_pre", rows)


def test_the_loss_on_some_tokens_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 11, generator=generator, dtype=torch.float32, requires_grad=True)
    ids = torch.randint(11, (2, 9), generator=generator)
    counts = torch.rand(2, 9, generator=generator) > 0.5
    labels = ids.masked_fill(~counts, -100)[:, 1:]
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    (gradient,) = torch.autograd.grad(wanted, logits)
    loss = next_token_loss(logits, ids, counts)
    (mine,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    torch.testing.assert_close(mine, gradient)
    nothing = next_token_loss(logits, ids, torch.zeros_like(counts))
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_perplexity_of_some_tokens(tiny_llama: LanguageModel) -> None:
    ids = np.random.default_rng(0).integers(1, 200, (3, 12)).astype(np.int32)
    counts = np.zeros_like(ids, dtype=bool)
    counts[:, 5:7] = True
    logits = tiny_llama.model(input_ids=torch.from_numpy(ids.astype(np.int64))).logits.float()
    own = torch.nn.functional.cross_entropy(
        logits[:, 4:6].flatten(0, 1), torch.from_numpy(ids[:, 5:7].astype(np.int64)).flatten()
    )
    assert perplexity(tiny_llama.model, ids, counts=counts, batch_size=2) == pytest.approx(own.exp().item(), rel=1e-5)
    everything = np.ones_like(counts)
    assert perplexity(tiny_llama.model, ids, counts=everything) == pytest.approx(perplexity(tiny_llama.model, ids))


def _written(folder: Path, name: str, talk: Any) -> TextSource:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"messages": [talk]}), path)
    elif path.suffix == ".csv":
        path.write_text(f'id,messages\n1,"{json.dumps(talk).replace(chr(34), chr(34) * 2)}"\n', encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("user: a\n", encoding="utf-8")
    else:
        path.write_text(json.dumps({"id": 1, "messages": talk}) + "\n", encoding="utf-8")
    return TextSource(name="talks", path=str(path), field="messages")


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_conversations_from_files(tmp_path: Path, name: str) -> None:
    talk = [{"role": "user", "content": 'Is it "é"?'}, {"role": "assistant", "content": "Yes,\nit is."}]
    (found,) = read_corpus(_written(tmp_path, name, talk), chat=True)
    assert messages_of(found) == talk


@pytest.mark.parametrize(
    ("name", "talk", "chat", "said"),
    [
        ("t.txt", "", True, "plain text, and no messages"),
        ("t.jsonl", "Hello", True, "holds text, not a list of messages"),
        ("t.jsonl", [{"role": "user", "content": "a"}], False, "set format: chat"),
        ("t.jsonl", [1], False, "leave out such rows"),
    ],
)
def test_files_without_what_is_wanted(tmp_path: Path, name: str, talk: Any, chat: bool, said: str) -> None:
    with pytest.raises(BadFile) as caught:
        list(read_corpus(_written(tmp_path, name, talk), chat=chat))
    assert said in str(caught.value) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_fine_tuning_on_what_the_assistant_writes(tmp_path: Path, loss: str) -> None:
    make_model(tmp_path / "base", 0)
    (tmp_path / "t.jsonl").write_text("\n".join(f'{{"messages": {talk}}}' for talk in TALKS * 20), encoding="utf-8")
    (tmp_path / "c.jinja").write_text(FAMILIES["chatml"], encoding="utf-8")
    keys = {"model": str(tmp_path / "base"), "text": str(tmp_path / "t.jsonl"), "format": "chat", "loss": loss}
    sizes = {"steps": 2, "batch_size": 2, "context_size": 96, "evaluation_rows": 2, "held_out": 0.4, "rank": 2}
    config = FinetuneConfig.read(keys | sizes | {"chat_template": str(tmp_path / "c.jinja")}, at="recipe")
    result = finetune(config, tmp_path / "out")
    note = read_json(tmp_path / "out" / "training.json")
    assert note["recipe"]["chat_template"] == "c.jinja" and note["recipe"]["loss"] == loss
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("only what the assistant writes" in card) == (loss == "assistant")
    lm = lm_for_chats(load_language_model(config.model), config)
    held_out = [talk for talk in read_corpus(config.text, chat=True) if is_held_out(talk, 0.4)]
    order = np.random.default_rng(0).permutation(len(held_out))
    rows = list(islice(cut_rows(lm, (held_out[i] for i in order), 96, config), 2))
    ids = np.stack([row.ids for row in rows])
    assert result.perplexity["training"][0] == pytest.approx(
        perplexity(lm.model, ids, counts=counted(rows, (loss,))), rel=1e-4
    )
