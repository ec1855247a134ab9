"""Labels by the embedded model itself, behind a real OpenAI-compatible server that this test starts."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fastapi import Body, FastAPI

from app_server import serving
from saeffect.lm.language_model import LanguageModel
from saeffect.study.label import Cost, label
from saeffect.study.label_contexts import LabelPlan

pytestmark = pytest.mark.real
NAME = "smollm2-135m-instruct"


def chat_app(lm: LanguageModel) -> FastAPI:
    """The model with its own chat template, answering by its likeliest tokens."""
    app, turn = FastAPI(), threading.Lock()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": NAME, "object": "model"}]}

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any] = Body()) -> dict[str, Any]:
        ids = lm.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with turn, torch.inference_mode():
            out = lm.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                pad_token_id=lm.tokenizer.eos_token_id,
            )[0, ids.shape[1] :]
        text = lm.tokenizer.decode(out, skip_special_tokens=True)
        stop = "length" if len(out) == body["max_tokens"] else "stop"
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": len(out), "total_tokens": ids.shape[1] + len(out)}
        message = {"role": "assistant", "content": text}
        return {
            "object": "chat.completion",
            "model": NAME,
            "choices": [{"index": 0, "message": message, "finish_reason": stop}],
            "usage": usage,
        }

    return app


def test_the_embedded_model_labels_its_own_feature(
    real_model: LanguageModel, real_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(real_run, tmp_path / "run")
    monkeypatch.setenv("SAEFFECT_LABEL_MODEL", NAME)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    costs: list[Cost] = []
    options: dict[str, Any] = {"limit": 1, "plan": LabelPlan(contexts=4, per_request=4)}
    with serving(chat_app(real_model)) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        found = label(tmp_path / "run", confirm=lambda cost: costs.append(cost) or True, **options)
    assert 1 <= costs[0].requests <= 3  # fewer where a feature is rare
    assert len(found) == 1 and (found["label"] != "").all()
    # A small model: most of what it says is chance, and the score has to show that rather than fail.
    assert ((found["reason"] != "") | found["accuracy"].between(0, 1)).all()
    again = label(tmp_path / "run", confirm=lambda cost: costs.append(cost) or True, **options)  # without a server
    pd.testing.assert_frame_equal(again, found)
    assert costs[1].requests == 0
