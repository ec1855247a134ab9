"""Features put back to the other model's activations: exact ends, a toy model by hand, and what may choose what."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from fake_cuda import fake_cuda
from saeffect.diffing.put_back import (
    BothRead,
    FeatureSet,
    outcomes,
    read,
    scaled_acts,
    sets_of_changed,
    sets_of_group,
)
from saeffect.diffing.put_back_shares import COLUMNS, put_back_table
from saeffect.errors import ConfigError, EmptySelection
from saeffect.lm.activations import NormLimit, TokenRows
from saeffect.lm.architectures import blocks
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig
from saeffect.sae.standard import StandardSae
from saeffect.sae.topk import TopKSae

HOOK = "blocks.1.hook_resid_pre"
NO_LIMIT = NormLimit(1.0, 1e9)


def _rows(n: int = 12, context: int = 9, vocab: int = 320) -> TokenRows:
    ids = torch.randint(vocab, (n, context), generator=torch.Generator().manual_seed(3)).numpy().astype(np.int32)
    return TokenRows(ids, np.arange(n, dtype=np.int64) % 2, ("general", "domain"))


def _tuned(lm: LanguageModel) -> LanguageModel:
    """The model with another first block: some fine-tune."""
    model = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(1)
    for parameter in blocks(model)[0].parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return replace(lm, model=model, name="tuned")


def _complete(d_in: int = 32) -> StandardSae:
    """Features that leave nothing over: x = relu(x) - relu(-x)."""
    sae = StandardSae(SaeConfig("standard", d_in, 2 * d_in, apply_b_dec_to_input=False))
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    sae.W_enc.data, sae.W_dec.data = both.T.contiguous(), both
    return sae


def _random_sae(d_in: int = 32, d_sae: int = 96, **keys: Any) -> TopKSae:
    sae = TopKSae(SaeConfig("topk", d_in, d_sae, k=6, **keys))
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(d_sae, d_in, generator=generator)
    sae.W_dec.data = rows / rows.norm(dim=1, keepdim=True)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_dec.data = 0.1 * torch.randn(d_in, generator=generator)
    return sae


@pytest.fixture
def pair(tiny_llama: LanguageModel) -> tuple[LanguageModel, LanguageModel, BothRead]:
    tuned, rows = _tuned(tiny_llama), _rows()
    both = BothRead.of(rows, read(tiny_llama, HOOK, rows), read(tuned, HOOK, rows), NO_LIMIT)
    return tiny_llama, tuned, both


def _table(lm: LanguageModel, sae: Any, both: BothRead, sets: list[FeatureSet], edited: Any = "tuned") -> pd.DataFrame:
    return put_back_table(pd.concat(list(outcomes(lm, sae, HOOK, both, sets, edited=edited))), both.rows, sets)


@pytest.mark.parametrize("edited", ["tuned", "base"])
def test_all_features_of_an_sae_without_error_are_the_whole_activation(
    pair: tuple[LanguageModel, LanguageModel, BothRead], edited: Any
) -> None:
    base, tuned, both = pair
    lm = tuned if edited == "tuned" else base
    table = _table(lm, _complete(), both, [FeatureSet("changed", 64)], edited)
    mine = table[table["features"] == "changed"]
    assert len(mine) == 4  # two sources, two measures
    assert mine["effect"].to_numpy() == pytest.approx(mine["whole"].to_numpy(), abs=1e-5)
    assert mine.loc[mine["measure"] == "kl", ["share", "low", "high"]].to_numpy() == pytest.approx(1.0, abs=1e-4)
    assert set(mine["edited"]) == {edited}


@pytest.mark.parametrize("keys", [{}, {"normalize_activations": "layer_norm"}, {"centre_input": True}], ids=str)
def test_features_and_what_is_left_over_are_the_activation(keys: Any) -> None:
    sae = _random_sae(**keys)
    x, other = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(4))
    x, other = 3 * x + 0.5, other - 0.2
    with torch.inference_mode():
        directions = sae.directions(torch.arange(96))
        by_features = [scaled_acts(sae, one) @ directions for one in (x, other)]
        # The left-over by another way: what the SAE does not rebuild, and what it rebuilds without any feature.
        left = []
        for one in (x, other):
            bias = sae.b_dec * sae.output_scale(one)
            mean = one.mean(dim=-1, keepdim=True) if keys else 0.0
            left.append(one - sae(one) + bias + mean)
    assert torch.allclose(x - (by_features[0] - by_features[1]) - (left[0] - left[1]), other, atol=1e-4)


def test_the_same_on_a_gpu(
    pair: tuple[LanguageModel, LanguageModel, BothRead], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, tuned, both), sae = pair, _random_sae().requires_grad_(requires_grad=False)
    sets = sets_of_changed(both, sae, sizes=(4,))
    with fake_cuda(monkeypatch):
        there = replace(tuned, model=copy.deepcopy(tuned.model).to("cuda"))
        found = _table(there, sae, both, sets)
    pd.testing.assert_frame_equal(found, _table(tuned, sae, both, sets), rtol=1e-3, atol=1e-5)


def test_no_features_do_nothing(pair: tuple[LanguageModel, LanguageModel, BothRead]) -> None:
    _, tuned, both = pair
    nothing = FeatureSet("empty", 0, members=np.zeros((12, 0), dtype=np.int64))
    table = _table(tuned, _random_sae(), both, [nothing])
    mine = table[table["features"] == "empty"]
    assert (mine["effect"] == 0).all()
    of_kl = mine[mine["measure"] == "kl"]
    assert of_kl[["share", "low", "high"]].to_numpy().tolist() == [[0.0] * 3] * 2
    assert set(of_kl["p"]) == {1.0}


class _Block(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class _ToyModel(nn.Module):
    """Logits are the embedding of the token: one block that does nothing, three tokens, three dimensions."""

    def __init__(self, embedding: list[list[float]]) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([_Block()])
        self.embed = nn.Embedding(3, 3, _weight=torch.tensor(embedding, dtype=torch.float32))
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = torch.eye(3)
        self.config = SimpleNamespace(model_type="toy", num_hidden_layers=1, max_position_embeddings=99)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.model.layers[0](self.embed(input_ids))))


def _toy(*embedding: list[float]) -> LanguageModel:
    tokenizer = SimpleNamespace(bos_token_id=None, add_bos_token=False)
    return LanguageModel(_ToyModel(list(embedding)).requires_grad_(False), tokenizer, "toy", prepend_bos=False)


def test_a_linear_model_by_hand() -> None:
    """Token 0 becomes (a, b, 0) where it was (0, 0, 0); features 0 and 1 are the first two dimensions."""
    a, b = 1.0, -0.5
    base, tuned = _toy([0, 0, 0], [0, 0, 0], [0, 0, 0]), _toy([a, b, 0], [0, 0, 0], [0, 0, 0])
    hook = "blocks.0.hook_resid_pre"
    # Position 0 never counts. Then: token 0 predicts 0; token 0 predicts 1; token 1 predicts 2.
    ids = np.array([[1, 0, 0, 1, 2], [1, 0, 0, 1, 2], [1, 0, 1, 1, 2]] * 4, dtype=np.int32)
    rows = TokenRows(ids, np.zeros(12, dtype=np.int64), ("domain",))
    both = BothRead.of(rows, read(base, hook, rows), read(tuned, hook, rows), NO_LIMIT)
    members = np.array([[0], [0], [5]] * 4)  # every third row puts back what did not change
    sets = [FeatureSet("first", 1, members=members), FeatureSet("all", 6)]
    found = pd.concat(list(outcomes(tuned, _complete(3), hook, both, sets, edited="tuned")))

    def log_p(*logits: float) -> np.ndarray:
        return np.array(logits) - np.log(np.exp(logits).sum())

    before, after, part = log_p(a, b, 0), log_p(0, 0, 0), log_p(0, b, 0)  # feature b of -x is put back alone: no
    uniform = np.log(3)
    by_hand = {
        "none": [-(before[0] + before[1]), -(before[0] + before[1]), -before[1] + uniform],
        "whole": [2 * uniform, 2 * uniform, 2 * uniform],
        "first": [-(part[0] + part[1]), -(part[0] + part[1]), -before[1] + uniform],
    }
    by_hand["all"] = by_hand["whole"]
    divergence = {name: float((np.exp(after) * (after - p)).sum()) for name, p in (("none", before), ("first", part))}
    for name, values in by_hand.items():
        mine = found[found["features"] == name].sort_values("row")
        # Four predictions a row: the first, of position 0, is uniform, as are the rest not counted above.
        rest = 2 * uniform
        assert mine["loss"].to_numpy() == pytest.approx((np.array(values * 4) + rest) / 4, rel=1e-5), name
    kl = found.set_index(["features", "row"])["kl"]
    assert kl["none", 0] == pytest.approx(2 * divergence["none"] / 4, rel=1e-4)
    assert kl["first", 0] == pytest.approx(2 * divergence["first"] / 4, rel=1e-4)
    assert kl["first", 2] == pytest.approx(kl["none", 2])
    assert kl["whole", 0] == pytest.approx(0, abs=1e-6)
    table = put_back_table(found, rows, sets).set_index(["measure", "features"])
    loss = {name: np.sum(values) for name, values in by_hand.items()}
    expected = (loss["first"] - loss["none"]) / (loss["whole"] - loss["none"])
    assert table.loc[("loss", "first"), "share"] == pytest.approx(expected, rel=1e-4)
    assert table.loc[("loss", "whole"), "effect"] == pytest.approx((loss["whole"] - loss["none"]) / 12, rel=1e-4)
    counts = np.array([2, 2, 1])
    gone = (counts * divergence["none"] - [*(counts[:2] * divergence["first"]), divergence["none"]]).sum()
    assert table.loc[("kl", "first"), "share"] == pytest.approx(gone / (5 * divergence["none"]), rel=1e-4)


def test_sets_are_chosen_on_other_rows(pair: tuple[LanguageModel, LanguageModel, BothRead]) -> None:
    _, _, both = pair
    sae = _random_sae()

    def own(text: BothRead) -> np.ndarray:
        return next(one.members for one in sets_of_changed(text, sae, sizes=(10,)) if one.kind == "own")

    before = own(both)
    halves = np.array([(row // 2 + row) % 2 for row in range(12)])  # every other row of each source, in turn
    assert len({tuple(row) for row in before[halves == 0]}) == len({tuple(row) for row in before[halves == 1]}) == 1
    assert set(before[0]) != set(before[1]) or set(before[0]) != set(before[3])
    changed = both.tuned.clone()
    changed[halves == 0] += torch.randn(32, generator=torch.Generator().manual_seed(8))
    after = own(replace(both, tuned=changed))
    assert np.array_equal(after[halves == 0], before[halves == 0])
    assert not np.array_equal(after[halves == 1], before[halves == 1])


def test_the_most_changed_come_first(pair: tuple[LanguageModel, LanguageModel, BothRead]) -> None:
    _, _, both = pair
    sae = _complete()
    tuned = both.base.clone()
    tuned[..., 4] += 9.0
    tuned[..., 7] -= 5.0
    sets = sets_of_changed(replace(both, tuned=tuned), sae, sizes=(1, 2, 500))
    assert [(one.n, one.kind) for one in sets] == [(1, "own"), (1, "matched"), (2, "own"), (2, "matched"), (64, "own")]
    assert set(sets[0].members.ravel()) == {4}
    assert sets[-1].members is None
    order = [63, *range(63)]
    given = sets_of_changed(both, sae, sizes=(2,), order=order)
    assert given[0].members.tolist() == [[63, 0]] * 12


def test_matched_features_are_others_like_them_drawn_anew() -> None:
    generator = torch.Generator().manual_seed(6)
    rows = _rows(40)
    # Features 0 to 31 fire ever more often, each on its own dimension of a complete SAE.
    x = torch.rand(40, 9, 32, generator=generator) - torch.linspace(1.0, 0.02, 32)
    both = BothRead(rows, x, x, torch.ones(40, 9, dtype=torch.bool))
    own, matched = sets_of_group(both, _complete(), "rare", [2, 3, 4])
    assert (own.n, own.kind, matched.n, matched.kind) == (3, "own", 3, "matched")
    assert own.members.tolist() == [[2, 3, 4]] * 40
    assert all(len(set(row)) == 3 and not set(row) & {2, 3, 4} for row in matched.members)
    # Features 48 to 63 fire as rarely as 0 to 15; the density of the others is far away.
    assert ((matched.members < 16) | (matched.members >= 48)).all()
    assert len({tuple(row) for row in matched.members}) > 5
    again = sets_of_group(both, _complete(), "rare", [2, 3, 4])[1]
    assert np.array_equal(matched.members, again.members)
    many = sets_of_group(both, _complete(), "many", range(60))[1]
    assert many.members is None and "fewer than 60" in many.reason


def test_a_set_without_a_match_keeps_its_row(pair: tuple[LanguageModel, LanguageModel, BothRead]) -> None:
    _, tuned, both = pair
    sets = sets_of_group(both, _random_sae(), "most", range(90))
    table = _table(tuned, _random_sae(), both, sets)
    mine = table[table["features"] == "most"].set_index(["measure", "source", "kind"])
    assert np.isfinite(mine.loc[("kl", "domain", "own"), "share"])
    assert np.isnan(mine.loc[("kl", "domain", "matched"), "share"])
    assert "fewer than 90" in mine.loc[("kl", "domain", "matched"), "reason"]
    assert ("kl", "domain", "difference") not in mine.index


def test_the_table(pair: tuple[LanguageModel, LanguageModel, BothRead]) -> None:
    base, tuned, both = pair
    sae = _random_sae()
    sets = sets_of_changed(both, sae, sizes=(1, 5))
    pieces = list(outcomes(tuned, sae, HOOK, both, sets, edited="tuned"))
    pieces += list(outcomes(base, sae, HOOK, both, sets[2:], edited="base"))
    table = put_back_table(pd.concat(pieces), both.rows, sets)
    assert tuple(table.columns) == COLUMNS
    # whole, model, two sizes with match and difference, all: for each source, model and measure (model: of loss only).
    tuned_rows, base_rows = ((table["edited"] == edited).sum() for edited in ("tuned", "base"))
    assert (tuned_rows, base_rows) == (2 * (9 + 8), 2 * (6 + 5))
    one = table[(table["edited"] == "tuned") & (table["source"] == "domain") & (table["measure"] == "kl")]
    by = one.set_index(["features", one["n_features"].fillna(-1).astype(int), "kind"])
    own, matched, difference = (by.loc[("changed", 5, kind)] for kind in ("own", "matched", "difference"))
    assert difference["share"] == pytest.approx(own["share"] - matched["share"])
    assert own["share"] == pytest.approx(own["effect"] / own["whole"])
    assert (own["n_rows"], own["n_tokens"]) == (6, 48)
    models = table[(table["features"] == "model") & (table["source"] == "domain")].set_index("edited")["effect"]
    assert models["base"] == pytest.approx(-models["tuned"])


def test_models_that_are_alike_have_no_share(tiny_llama: LanguageModel) -> None:
    rows = _rows()
    x = read(tiny_llama, HOOK, rows)
    both = BothRead.of(rows, x, x, NO_LIMIT)
    sae = _random_sae()
    table = _table(tiny_llama, sae, both, sets_of_changed(both, sae, sizes=(5,)))
    assert table["share"].isna().all()
    assert set(table["reason"]) == {"the whole activation changes nothing: both models have the same here"}
    assert (table["effect"] == 0).all()


def test_a_loss_that_hardly_differs_has_no_share_but_predictions_do() -> None:
    found = []
    rng = np.random.default_rng(0)
    for row in range(10):
        step = rng.normal(0, 0.1)
        for name, n, loss, kl in (("none", 0, 1.0, 0.2), ("whole", -1, 1.0 + step, 0.0), ("some", 3, 1.0, 0.1)):
            found.append(("tuned", row, name, n, "own", loss, kl + 0.01 * step * (name == "none")))
    columns = ["edited", "row", "features", "n_features", "kind", "loss", "kl"]
    rows = TokenRows(np.zeros((10, 5), dtype=np.int32), np.zeros(10, dtype=np.int64), ("domain",))
    sets = [FeatureSet("some", 3, members=np.zeros((10, 3), dtype=np.int64))]
    table = put_back_table(pd.DataFrame(found, columns=columns), rows, sets).set_index(["measure", "features"])
    assert np.isnan(table.loc[("loss", "some"), "share"])
    assert "nats a token [" in table.loc[("loss", "some"), "reason"]
    assert table.loc[("kl", "some"), "share"] == pytest.approx(0.5, abs=0.01)


def test_half_precision_is_put_back_in_float32(tiny_llama: LanguageModel) -> None:
    half = replace(tiny_llama, model=copy.deepcopy(tiny_llama.model).bfloat16())
    tuned, rows = _tuned(half), _rows()
    both = BothRead.of(rows, read(half, HOOK, rows), read(tuned, HOOK, rows), NO_LIMIT)
    assert both.base.dtype == torch.bfloat16
    table = _table(tuned, _complete(), both, [FeatureSet("changed", 64)])
    # Subtracted in float32, the sum is the other model's value again before it is rounded.
    mine = table[table["features"] == "changed"]
    assert mine["effect"].to_numpy() == pytest.approx(mine["whole"].to_numpy(), abs=2e-4)
    assert (mine["whole"].abs() > 1e-3).all()


def test_rows_that_are_done_are_left_out(pair: tuple[LanguageModel, LanguageModel, BothRead], monkeypatch: Any) -> None:
    _, tuned, both = pair
    monkeypatch.setattr("saeffect.diffing.put_back._LOGITS", 320 * 9 * 5)
    sets = sets_of_changed(both, _random_sae(), sizes=(5,))
    pieces = list(outcomes(tuned, _random_sae(), HOOK, both, sets, edited="tuned"))
    assert [sorted(set(piece["row"])) for piece in pieces] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    rest = list(outcomes(tuned, _random_sae(), HOOK, both, sets, edited="tuned", done=range(10)))
    pd.testing.assert_frame_equal(rest[0], pieces[2])


def test_outliers_and_first_tokens_are_not_edited(pair: tuple[LanguageModel, LanguageModel, BothRead]) -> None:
    _, tuned, both = pair
    nothing = replace(both, mask=torch.zeros_like(both.mask))
    table = _table(tuned, _complete(), nothing, [FeatureSet("changed", 64)])
    assert (table[table["features"].isin(["whole", "changed"])]["effect"] == 0).all()
    assert not both.mask[:, 0].any() and both.mask[:, 1:].all()
    longest = both.base.norm(dim=-1)[:, 1:].max()
    limited = BothRead.of(both.rows, both.base, both.tuned, NormLimit(1.0, float(longest) - 1e-4))
    assert (~limited.mask[:, 1:]).sum() >= 1


def test_the_model_is_as_before_after_an_error(pair: tuple[LanguageModel, LanguageModel, BothRead]) -> None:
    _, tuned, both = pair
    before = tuned.model(input_ids=torch.tensor([[1, 2, 3]])).logits
    sae = _random_sae()
    breaks = blocks(tuned.model)[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(outcomes(tuned, sae, HOOK, both, [FeatureSet("changed", 96)], edited="tuned"))
    breaks.remove()
    assert all("forward" not in vars(module) for module in tuned.model.modules())
    assert torch.equal(tuned.model(input_ids=torch.tensor([[1, 2, 3]])).logits, before)


def test_wrong_input(pair: tuple[LanguageModel, LanguageModel, BothRead], tiny_llama: LanguageModel) -> None:
    _, _, both = pair
    with pytest.raises(ConfigError, match="32 and 16 wide"):
        BothRead.of(both.rows, both.base, both.tuned[..., :16], NO_LIMIT)
    one = BothRead(both.rows.head(1), both.base[:1], both.tuned[:1], both.mask[:1])
    with pytest.raises(EmptySelection, match="one row of text"):
        sets_of_changed(one, _random_sae())
    assert sets_of_changed(one, _random_sae(), order=range(96), sizes=(3,))
    for order in ([1, 2], [0] * 96):
        with pytest.raises(ConfigError, match="each of the 96 features once"):
            sets_of_changed(both, _random_sae(), order=order)
    with pytest.raises(ConfigError, match="at least one"):
        sets_of_changed(both, _random_sae(), sizes=(0, 2))
    for features in ([], [96]):
        with pytest.raises(ConfigError, match="the group 'x'"):
            sets_of_group(both, _random_sae(), "x", features)
    with pytest.raises(ConfigError):
        read(tiny_llama, "blocks.7.hook_resid_pre", both.rows)
