from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from saeffect.errors import BadFile, NotFound, SaeffectError
from saeffect.steering.outcomes import MeanPooledEncoder, load_text_vectors, similarity

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "doctor", "treats", "a", "patient", "goal", "##s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT in the hub's layout."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    BertModel(config).save_pretrained(path)
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    return path


@torch.inference_mode()
def test_mean_of_the_last_hidden_states(folder):
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)("the doctor treats", return_tensors="pt")
    expected = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0].mean(0)
    assert tokens["input_ids"].shape[1] == 5  # [CLS] and [SEP] count, as in the paper's mean
    np.testing.assert_allclose(MeanPooledEncoder(str(folder)).mean_vector("the doctor treats"), expected, rtol=1e-5)


def test_a_text_is_most_similar_to_itself(folder):
    vectors = load_text_vectors(str(folder))
    assert similarity("a patient", "a patient", vectors) == pytest.approx(1)
    assert similarity("a patient", "the goal", vectors) < 1


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_has_no_vector(folder, text):
    assert MeanPooledEncoder(str(folder)).mean_vector(text) is None


def test_long_texts_are_cut(folder):
    encoder = MeanPooledEncoder(str(folder))
    long, longer = "the doctor " * 20, "the doctor " * 20 + "goal"
    np.testing.assert_array_equal(encoder.mean_vector(long), encoder.mean_vector(longer))


def test_word_vectors_by_name_still_work():
    vector = load_text_vectors("glove-wiki-gigaword-100").mean_vector("a doctor")
    assert vector is not None
    assert vector.shape == (100,)


def test_pickled_weights_are_never_read(folder, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": torch.ones(12, 16)}, pickled / "pytorch_model.bin")
    with pytest.raises(BadFile, match="pickles are never loaded"):
        load_text_vectors(str(pickled))


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadFile, match="no text encoder"):
        load_text_vectors(str(tmp_path))
    with pytest.raises(SaeffectError, match=r"glove-wiki-gigaword-100.*Nor can a text encoder"):
        load_text_vectors("no-such-encoder")
    with pytest.raises(NotFound):
        load_text_vectors(str(tmp_path / "none.txt"))
