"""Where fine-tuning changed a model: layers, positions, words and texts, against null fine-tunes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saeffect.diffing import where as module
from saeffect.diffing.null_ranks import NO_NULLS
from saeffect.diffing.trace import EARLY, OPENINGS, Trace, Tracer
from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.lm.activations import NormLimit, TokenRows
from saeffect.lm.architectures import unembedding
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig
from saeffect.sae.standard import StandardSae
from synthetic_trace import made

HOOK = "blocks.1.hook_resid_post"


def tuned_like(lm: LanguageModel, size: float, seed: int) -> LanguageModel:
    """The model with noise on every matrix."""
    model = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data += size * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return replace(lm, model=model, name=f"tuned-{seed}", identity=f"tuned-{seed}")


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = np.random.default_rng(0).integers(1, 320, (12, 16)).astype(np.int32)
    ids[:, 0] = 0
    return TokenRows(ids, np.zeros(12, dtype=np.int64), ("general",))


@pytest.fixture(scope="module")
def tracer(tiny_llama: LanguageModel, rows: TokenRows) -> Iterator[Tracer]:
    sae = StandardSae(SaeConfig("standard", 32, 24, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    sae.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saeffect.diffing.trace.NEW_TOKENS", 3)
        yield Tracer(tiny_llama, sae, HOOK, rows, NormLimit(1.0, 1e6))


@pytest.fixture(scope="module")
def trace(tracer: Tracer) -> Trace:
    return tracer.trace(tuned_like(tracer.base, 0.3, 1), "tuned")


def test_early_halves_and_norm_are_means_over_rows(tracer, trace):
    tuned = tuned_like(tracer.base, 0.3, 1)
    ids = torch.from_numpy(tracer.rows.ids.astype(np.int64))
    x = capture(tracer.base, HOOK, ids)
    difference = (capture(tuned, HOOK, ids) - x)[:, 1 : 1 + EARLY]
    expected = torch.stack([difference[::2].mean(dim=0), difference[1::2].mean(dim=0)])
    np.testing.assert_allclose(trace.early, expected, atol=1e-4)
    np.testing.assert_allclose(trace.numbers["norm"], x[:, 1:].norm(dim=-1).mean(), rtol=1e-5)


def test_what_is_kept_of_the_base_model_serves_every_trace(tracer, trace):
    keeping, tuned = replace(tracer, keep=True), tuned_like(tracer.base, 0.3, 1)
    for _ in range(2):
        np.testing.assert_array_equal(keeping.trace(tuned, "tuned").kl, trace.kl)


def test_base_texts_are_taken_from_the_nulls(tracer, trace):
    """On another machine the base model may write other texts than those that every null was compared with."""
    other = replace(trace, base_texts=trace.base_texts + 1, written=trace.written + 1)
    beside = replace(tracer).beside([other]).trace(tuned_like(tracer.base, 0.3, 1), "tuned")
    np.testing.assert_array_equal(beside.base_texts, other.base_texts)
    np.testing.assert_array_equal(beside.written, trace.written + np.float32([[1], [0], [1], [0]]))
    assert tracer.beside([]) is tracer


def test_divergence_after_an_opening(tracer, trace):
    opening = OPENINGS.index("Here is")
    ids = torch.tensor([tracer.base.encode_prompt("Here is")])
    base, tuned = (m.model(ids).logits[0, -1].log_softmax(0) for m in (tracer.base, tuned_like(tracer.base, 0.3, 1)))
    expected = torch.nn.functional.kl_div(base, tuned, log_target=True, reduction="sum")
    np.testing.assert_allclose(trace.openings[opening], expected, rtol=1e-3)
    assert trace.openings.shape == (len(OPENINGS),)


def test_a_trace_survives_its_file(trace, tmp_path):
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    np.testing.assert_allclose(again.early, trace.early, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(again.openings, trace.openings)
    assert again.numbers == trace.numbers


TOKENS = np.array(["a", "b", "c", "d"], dtype=object)
PLAIN = np.array([True, True, True, False])


def layers_of(*values: float) -> Trace:
    return made(layers=np.array(values, dtype=np.float32))


def test_layers_by_hand():
    nulls = [layers_of(0.05, 0.3), layers_of(0.04, 0.1), layers_of(0.02, 0.1)]
    table = module.change_by_layer(made(), nulls)
    np.testing.assert_allclose(table["p"], [1 / 4, 2 / 4])
    np.testing.assert_allclose(table["q"], [2 / 4, 2 / 4])
    np.testing.assert_allclose(table[["null_low", "null_median", "null_high"]], [[0.02, 0.04, 0.05], [0.1, 0.1, 0.3]])
    np.testing.assert_allclose(table["ratio"], [2.5, 2.0])
    assert table["reason"].str.startswith("with 3 nulls no p is below 1/4").all()


def test_the_mean_difference_by_hand():
    trace = made(halves=np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    nulls = [made(halves=np.array([h, h], dtype=np.float32)) for h in ([2.0, 0.0], [0.0, 1.0])]
    table = module.activation_difference(trace, nulls, top_tokens=lambda v: [str(v.round(3).tolist())])
    row = table.set_index("position").loc["all"]
    assert row["size"] == pytest.approx(math.sqrt(0.5) / 10)  # the mean (0.5, 0.5) over a norm of 10
    assert row["reliability"] == pytest.approx(0.0, abs=1e-12)  # halves at a right angle
    assert row["likeness"] == pytest.approx(3 / math.sqrt(10))  # with the nulls' mean (1, 0.5)
    assert row["p_size"] == 1.0
    assert row["p_reliability"] == 1.0
    assert row["top_tokens"] == ["[0.5, 0.5]"]
    assert row["beyond_nulls"] == ["[-0.1, 0.2]"]  # less 0.6 of (1, 0.5)
    first = table.set_index("position").loc["1"]
    assert (first["size"], first["reliability"]) == (pytest.approx(0.5), pytest.approx(1.0))


def test_each_source_of_alternating_text_has_its_mean_difference():
    trace = made(halves=np.array([[3.0, 0.0], [0.0, 4.0]], dtype=np.float32))
    nulls = [made(halves=np.array([h, [9.0, 9.0]], dtype=np.float32)) for h in ([1.0, 0.0], [0.0, 2.0])]
    table = module.activation_difference(
        trace, nulls, ("general", "domain"), top_tokens=lambda v: [str(v.round(3).tolist())]
    )
    row = table.set_index("text").loc["general"]
    assert (row["position"], row["size"], row["null_size"]) == ("all", pytest.approx(0.3), pytest.approx(0.15))
    assert row["p_size"] == pytest.approx(1 / 3)
    assert row["top_tokens"] == ["[3.0, 0.0]"]
    assert math.isnan(row["reliability"])
    assert table["text"].tolist()[0] == ""


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([0, 1, 0, 1], ("general", "domain")),
        ([1, 0], ("domain", "general")),
        ([0, 1, 1, 0], ()),
        ([0, 0], ()),
        ([0], ()),
    ],
)
def test_halves_of_one_source_are_known(sources: list[int], expected: tuple[str, ...]) -> None:
    ids = np.zeros((len(sources), 2), dtype=np.int32)
    assert module._source_of_halves(TokenRows(ids, np.array(sources), ("general", "domain"))) == expected


def test_words_read_and_expected_by_hand():
    ids = np.array([[0, 1, 1, 1, 2], [0, 1, 1, 2, 2]])  # b five times, c three times
    kl = np.array([[np.nan, 1.0, 2.0, 3.0, 9.0], [np.nan, 4.0, 5.0, 9.0, 9.0]], dtype=np.float32)
    expected = np.array([[0.5, 0.5, 0.0, 0.0], [0.25, 0.71, 0.04, 0.0]], dtype=np.float32)
    trace = made(kl=kl, expected=expected, numbers={"kl": 6.0, "n_tokens": 100.0, "norm": 1.0})
    table = module.change_by_word(trace, [], ids, TOKENS, PLAIN)
    read = table[table["role"] == "read"]
    assert list(read["token"]) == ["b"]
    assert read[["n", "change", "focus"]].iloc[0].tolist() == pytest.approx([5, 3.0, 0.5])
    expects = table[table["role"] == "expected"].set_index("token")
    assert set(expects.index) == {"a", "b", "c"}  # d is not plain, and never expected
    assert expects.loc["c", "change"] == pytest.approx(math.log(4.5 / 0.5))  # half a token added to 4 and to 0
    assert expects.loc["a", "change"] == pytest.approx(math.log(25.5 / 50.5))
    assert table[["p", "q", "p_search", "null_median"]].isna().all().all()
    assert (table["reason"] == NO_NULLS).all()


def test_finds_a_word_changed_beyond_nulls():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (40, 20))

    def kl(extra: float) -> np.ndarray:
        found = rng.exponential(0.1, ids.shape) + extra * (ids == 7)
        found[:, 0] = np.nan
        return found.astype(np.float32)

    tokens, plain = np.array([f"w{i}" for i in range(40)], dtype=object), np.ones(40, dtype=bool)
    share = np.full((2, 40), 1 / 40, dtype=np.float32)
    nulls = [made(kl=kl(0.0), expected=share) for _ in range(20)]
    table = module.change_by_word(made(kl=kl(2.0), expected=share), nulls, ids, tokens, plain)
    assert table.loc[table["p_search"] <= 0.05, "token"].tolist() == ["w7"]
    assert table.loc[0, "p_focus"] == pytest.approx(1 / 21)
    places = module.change_in_text(
        made(kl=kl(9.0)), nulls, ids.astype(np.int32), lambda some: " ".join(f"w{i}" for i in some)
    )
    assert (places["token"] == "w7").all()
    assert (places["p_search"] == 1 / 21).all()
    row = places.iloc[0]
    assert row["before"].split()[-1] == f"w{ids[row['row'], row['position'] - 1]}"
    near = places[places["row"] == row["row"]]
    assert (near["position"].diff().abs().dropna() > 12).all()


def test_tables_of_a_real_trace(tracer, trace, rows):
    nulls = [tracer.trace(tuned_like(tracer.base, 0.1, seed), f"null-{seed}") for seed in (5, 6)]
    tables = module.where_changed(trace, nulls, rows, tuned_like(tracer.base, 0.3, 1), tracer.hook)
    overall = tables["change_overall"].set_index("quantity")
    assert overall.loc["divergence on text", "change"] == pytest.approx(float(np.nanmean(trace.kl)), rel=1e-4)
    assert (overall.loc[["divergence on text", "residual stream"], "p"] == 1 / 3).all()
    assert len(tables["openings"]) == 96
    assert tables["openings"]["change"].is_monotonic_decreasing
    assert {"written_words", "change_in_text"} <= tables.keys()
    difference = tables["activation_difference"]
    vector = trace.halves.mean(axis=0)
    W_U = unembedding(tuned_like(tracer.base, 0.3, 1)).numpy()
    scores = vector @ W_U / np.linalg.norm(W_U, axis=0)
    scores[~tracer.base.plain_tokens().numpy()] = -np.inf
    assert difference["top_tokens"].iloc[0][0] == tracer.base.token_strings()[int(scores.argmax())]
    for name, table in tables.items():
        assert isinstance(table, pd.DataFrame), name
        assert "reason" in table.columns, name


def test_a_model_against_itself_changed_nothing(tracer, rows):
    same = tracer.trace(replace(tracer.base, name="same"), "same")
    tables = module.where_changed(same, [], rows, tracer.base, tracer.hook)
    assert (tables["change_overall"]["change"].abs() < 1e-6).all()
    assert (tables["activation_difference"]["reason"] == "nothing changed here").all()
    assert tables["activation_difference"]["reliability"].isna().all()


def test_traces_that_cannot_be_compared_are_refused(trace, tiny_llama, rows):
    with pytest.raises(ShapeMismatch, match="the traces read rows"):
        module.where_changed(trace, [], rows.head(3), tiny_llama, HOOK)


def test_head_without_matrix_lacks_top_tokens_only(trace, rows, tiny_llama, monkeypatch):
    def refuse(_):
        raise ConfigError("the final norm is odd.")

    monkeypatch.setattr(module, "unembedding", refuse)
    table = module.where_changed(trace, [], rows, tiny_llama, HOOK)["activation_difference"]
    assert table["reason"].str.contains("the final norm is odd").all()
    assert table["size"].notna().all()
    assert (table["top_tokens"].map(len) == 0).all()


def test_top_tokens_of_heads_use_residual_directions(tracer, rows, tiny_tokenizer):
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=320, hidden_size=24, head_dim=12, max_position_embeddings=64, **small)
    lm = LanguageModel(LlamaForCausalLM(config).eval(), tiny_tokenizer, "heads", "heads")
    hook, tuned = "blocks.1.attn.hook_z", tuned_like(lm, 0.3, 1)
    trace = Tracer(lm, None, hook, rows, NormLimit(1.0, 1e6)).trace(tuned, "tuned")
    found = module.where_changed(trace, [], rows, tuned, hook)["activation_difference"]["top_tokens"].iloc[0]
    W_U, output = unembedding(tuned).numpy(), tuned.model.model.layers[1].self_attn.o_proj.weight.detach().numpy()
    scores = (output @ trace.halves.mean(axis=0)) @ W_U / np.linalg.norm(W_U, axis=0)
    scores[~lm.plain_tokens().numpy()] = -np.inf
    assert found[0] == lm.token_strings()[int(scores.argmax())]
