"""Words and texts that a fine-tuned model writes, and steering with its mean activation difference."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from saeffect.diffing.trace import OPENINGS, SAMPLES
from saeffect.diffing.written import (
    difference_steering,
    difference_vector,
    openings,
    steered_words,
    words_of,
    written_words,
)
from saeffect.errors import EmptySelection, Undefined
from saeffect.lm.hooks import edited
from saeffect.steering.generate import continue_prompts
from saeffect.steering.sampling import NoiseCell, Sampling
from synthetic_trace import made

HOOK = "blocks.1.hook_resid_post"
WORDS = (" the", " fever", " house", " sea", " tree", ".")


def decode(ids) -> str:
    return "".join(WORDS[i] for i in ids)


def texts(rng: np.random.Generator, fever: int) -> np.ndarray:
    """Ninety-six texts of six words; so many of them speak of fever."""
    found = rng.integers(2, 5, (96, 6))
    found[:, 5] = 5
    found[rng.choice(96, fever, replace=False), 2] = 1
    return found.astype(np.int32)


@pytest.mark.parametrize(
    ("opening", "text", "expected"),
    [
        ("The", "rapy of it.", ["therapy", "of", "it"]),
        ("The", " cat's cut sho", ["cat's", "cut"]),
        ("Is", "", []),
        ("A", " 12 x2 état", ["x"]),
        ("First,", "\nno. Yes!", ["no", "yes"]),
    ],
)
def test_whole_words(opening, text, expected):
    assert words_of(opening, text) == expected


def test_a_word_that_comes_up_more_often_is_found_and_shown():
    rng = np.random.default_rng(0)
    nulls = [made(texts=texts(rng, int(rng.poisson(3)))) for _ in range(20)]
    trace = made(texts=texts(rng, 40), base_texts=texts(rng, 3))
    table = written_words(trace, nulls, decode)
    assert table.loc[table["p_search"] <= 0.05, "word"].tolist() == ["fever"]
    row = table.iloc[0]
    mean = np.mean([(null.texts == 1).any(axis=1).sum() for null in nulls])
    assert row[["texts", "count"]].tolist() == [40, 40]
    assert (row["rate"], row["base_rate"]) == (pytest.approx(40 / 96), pytest.approx(3 / 96))
    assert row["null_rate"] == pytest.approx(mean / 96)
    assert row["change"] == pytest.approx(math.log(40.5 / (mean + 0.5)))
    assert "fever" in row["example"]
    assert row["p"] <= row["q"]


def test_without_nulls_words_are_counted_against_the_base_model():
    rng = np.random.default_rng(0)
    table = written_words(made(texts=texts(rng, 40), base_texts=texts(rng, 0)), [], decode)
    row = table.set_index("word").loc["fever"]
    assert row["change"] == pytest.approx(math.log(40.5 / 0.5))  # never written before: half a text added
    assert table[["p", "q", "p_search", "null_rate"]].isna().all().all()


def test_openings_go_by_how_much_the_first_word_changed():
    change = np.linspace(0, 1, len(OPENINGS)).astype(np.float32)
    rng = np.random.default_rng(0)
    nulls = [made(name=f"null-{k}", openings=change * 0.1 * k, texts=texts(rng, 0)) for k in (3, 1, 2)]
    trace = made(openings=change, texts=texts(rng, 9), base_texts=texts(rng, 9))
    table = openings(trace, nulls, decode)
    assert table["opening"].iloc[0] == OPENINGS[-1]
    assert table["sample"].tolist() == list(range(SAMPLES)) * len(OPENINGS)
    assert set(table["null"]) == {"null-2"}
    last = 4 * (len(OPENINGS) - 1)
    assert table.loc[0, ["base_text", "tuned_text", "null_text"]].tolist() == [
        decode(t[last]) for t in (trace.base_texts, trace.texts, nulls[2].texts)
    ]
    assert table["p"].iloc[0] == 1 / 4
    assert openings(trace, [], decode)["p"].isna().all()


def test_the_vector_is_as_long_as_the_dose_says():
    vector = difference_vector(made(halves=np.array([[3.0, 4.0], [3.0, 4.0]], dtype=np.float32)), 0.5)
    np.testing.assert_allclose(vector, [3.0, 4.0])  # half of the mean norm, 10, along (0.6, 0.8)
    with pytest.raises(Undefined, match="is zero"):
        difference_vector(made(halves=np.zeros((2, 2), dtype=np.float32)), 1.0)


def test_steering_adds_the_difference_at_every_position(tiny_llama, monkeypatch):
    monkeypatch.setattr("saeffect.diffing.written.OPENINGS", ("Here is",))
    monkeypatch.setattr("saeffect.diffing.trace.NEW_TOKENS", 1)
    rng = np.random.default_rng(0)
    halves = rng.standard_normal((2, 2, 32)).astype(np.float32)
    trace, null = (made(name=name, halves=half) for name, half in zip(("tuned", "null-1"), halves, strict=True))
    [table] = difference_steering(tiny_llama, HOOK, trace, [null], doses=[0.0001, 1e4])
    assert table["fine_tune"].tolist() == [""] * SAMPLES + ["tuned"] * 2 * SAMPLES + ["null-1"] * 2 * SAMPLES
    assert table["is_null"].tolist() == [False] * 3 * SAMPLES + [True] * 2 * SAMPLES
    assert table["text"].tolist()[:SAMPLES] == [tiny_llama.decode(ids) for ids in trace.base_texts[:SAMPLES]]
    assert table["size"].iloc[-1] == pytest.approx(np.linalg.norm(null.halves.mean(axis=0)) / 10)  # the mean norm
    ids = tiny_llama.encode_prompt("Here is")

    def push(x):
        x = x.clone()
        x[:, tiny_llama.n_bos(ids) :] += difference_vector(trace, 1e4)
        return x

    cells = [NoiseCell(0, "Here is", sample) for sample in range(SAMPLES)]
    sampling = Sampling(max_new_tokens=1, temperature=0.8, top_p=1.0, frequency_penalty=0.0)
    with edited(tiny_llama, HOOK, push):
        expected = continue_prompts(tiny_llama, [ids] * SAMPLES, cells, sampling)
    strong = table[(table["dose"] == 1e4) & ~table["is_null"]]
    assert strong["text"].tolist() == [tiny_llama.decode(new) for new in expected]
    weak = table[table["dose"] == 0.0001].groupby("fine_tune")["text"].agg(list)
    assert weak["tuned"] == weak["null-1"] != strong["text"].tolist()
    assert not list(difference_steering(tiny_llama, HOOK, trace, [null], done=["Here is"]))
    with pytest.raises(EmptySelection, match="no dose"):
        next(difference_steering(tiny_llama, HOOK, trace, [], doses=[]))


def pushed_texts(rng: np.random.Generator, fever: dict[float, int], n_nulls: int) -> pd.DataFrame:
    """Texts of a fine-tune's push, so many with fever at each dose, and those of nulls, with two."""
    stems = np.repeat(OPENINGS, SAMPLES)
    frames = [pd.DataFrame({"fine_tune": "", "is_null": False, "dose": 0.0, "ids": list(texts(rng, 1))})]
    for k in range(1 + n_nulls):
        for dose, n in fever.items():
            frame = {"fine_tune": f"f{k}", "is_null": k > 0, "dose": dose, "ids": list(texts(rng, 2 if k else n))}
            frames.append(pd.DataFrame(frame))
    return pd.concat([f.assign(opening=stems, text=f.pop("ids").map(decode)) for f in frames], ignore_index=True)


def test_words_of_steered_texts_are_tested_against_the_nulls_pushes():
    table = steered_words(pushed_texts(np.random.default_rng(1), {0.5: 30}, 20))
    assert table.loc[table["p_search"] <= 0.05, "word"].tolist() == ["fever"]
    assert table.iloc[0][["dose", "texts", "p_search"]].tolist() == [0.5, 30, 1 / 21]
    assert table["base_rate"].iloc[0] == pytest.approx(1 / 96)  # without a push


def test_words_of_all_doses_are_one_search():
    texts = pushed_texts(np.random.default_rng(1), {0.5: 30, 1.0: 2}, 20)
    texts.loc[(texts["fine_tune"] == "f1") & (texts["dose"] == 1), "text"] = " fever."  # one null's, at the other dose
    table = steered_words(texts)
    assert table[["dose", "word"]].iloc[0].tolist() == [0.5, "fever"]
    assert sorted(table["dose"].unique()) == [0.5, 1.0]
    assert table["p_search"].iloc[0] == pytest.approx(2 / 21)
    assert steered_words(texts[texts["dose"] < 1])["p_search"].iloc[0] == pytest.approx(1 / 21)


def test_pushed_words_without_nulls_or_push():
    texts = pushed_texts(np.random.default_rng(1), {0.5: 30}, 0)
    table = steered_words(texts)
    assert table[["p", "q", "p_search"]].isna().all().all()
    assert table["word"].iloc[0] == "fever"
    assert set(table["reason"]) == {"no null fine-tunes to compare with"}
    with pytest.raises(EmptySelection, match="with and without a push"):
        steered_words(texts[texts["dose"] == 0])
