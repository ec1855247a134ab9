# ruff: noqa: T201
"""On a GPU: does every stage give the same results as on the CPU, and how fast is it?

    PYTHONPATH=src python benchmarks/gpu.py                      both parts; aims at six minutes on one H100
    PYTHONPATH=src python benchmarks/gpu.py --parts check        tiny shapes, device beside CPU
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --quick a trial of this file itself, without a GPU

The check trains each architecture for some steps, harvests, projects, steers, and runs a whole tiny study on both, in
float32 without TF32. The speeds are at real shapes, beside the plain autograd step and, where they import, sae-lens and
sparsify, and as a share of what the device's matrix products or memory bandwidth allow. Writes gpu.json and gpu.md into
the results folder; the last line of stdout is one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "scripts")]

from gpu_check import checks  # noqa: E402
from measure import adam_bytes, encoder_flop  # noqa: E402
from ours_sae import PlainAutograd  # noqa: E402
from running import parser_of, write_results  # noqa: E402
from synthetic import Planted, l1_start, topk_start  # noqa: E402

BESIDE = ("plain autograd", "sae-lens", "sparsify")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call after a warm-up call, with the device idle before and after."""
    call()
    times = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def limits(device: torch.device, quick: bool) -> dict[str, float]:
    """FLOP a second of large products by number format, and bytes a second of a copy."""
    n = 512 if quick else 8192
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        elapsed = seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, 5)
        rates[f"{dtype}".removeprefix("torch.")] = 2 * n**3 / elapsed
    source = torch.zeros(n * n, device=device)
    target = torch.empty_like(source)
    rates["bytes"] = 8 * n * n / seconds(lambda: target.copy_(source), device, 5)
    return rates


def our_step(
    name: str, start: dict[str, torch.Tensor], x: torch.Tensor, settings: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    """Tokens a second of our training step by the encoder's dtype, from the given weights and on their device."""
    from saeffect.sae.training.config import SaeTrainingConfig
    from saeffect.sae.training.step import TrainingStep, new_sae

    for encoder in ("float32", "bfloat16"):
        config = SaeTrainingConfig(
            architecture=name, d_sae=len(start["W_dec"]), batch_size=len(x), learning_rate=1e-6, encoder_dtype=encoder,
            dead_after=10**9, chunk=len(x), **settings,
        )  # fmt: skip
        sae = new_sae(config, x.shape[1]).to(x.device)
        with torch.no_grad():
            for key, tensor in start.items():
                getattr(sae, key).copy_(tensor)
        step = TrainingStep(sae, config, 10**7)
        yield f"saeffect {encoder}", len(x) / seconds(lambda step=step: step(1, x), x.device, 5)
        del step, sae


def limit_of_step(batch: int, d_in: int, d_sae: int, rates: dict[str, float]) -> float:
    """Tokens a second if only the encoder's product and Adam's pass over the weights took time."""
    return batch / (encoder_flop(batch, d_in, d_sae) / rates["bfloat16"] + adam_bytes(d_in, d_sae) / rates["bytes"])


def crosscoders(device: torch.device, rates: dict[str, float], quick: bool) -> Iterator[dict[str, Any]]:
    """Tokens a second of a crosscoder's step: inputs of two models."""
    d_in, batch, d_sae, k = (64, 64, 128, 4) if quick else (2 * 768, 4096, 24_576, 64)
    planted = Planted(d_in, d_sae)
    start = {key: tensor.to(device) for key, tensor in topk_start(planted).items()}
    record: dict[str, Any] = {"what": "step, crosscoder", "d_in": d_in, "d_sae": d_sae, "batch": batch}
    record["limit"] = limit_of_step(batch, d_in, d_sae, rates)
    yield record | dict(our_step("crosscoder", start, planted.activations(batch).to(device), {"k": k}))


def training(device: torch.device, rates: dict[str, float], quick: bool) -> Iterator[dict[str, Any]]:
    """Tokens a second of a training step, ours and plain autograd's, at each shape, and the share of the limit."""
    d_in, batch, k = (32, 64, 4) if quick else (768, 4096, 32)
    for d_sae in (128,) if quick else (24_576, 131_072):
        planted = Planted(d_in, d_sae)
        x = planted.activations(batch)
        for name, l0 in (("topk", None), ("standard", 58.0)):
            start = topk_start(planted) if l0 is None else l1_start(planted, x, l0)
            start = {key: tensor.to(device) for key, tensor in start.items()}
            on_device = x.to(device)
            record: dict[str, Any] = {"what": f"step, {name}", "d_in": d_in, "d_sae": d_sae, "batch": batch}
            record["limit"] = limit_of_step(batch, d_in, d_sae, rates)
            record |= our_step(name, start, on_device, {"k": k} if l0 is None else {"l1_coefficient": 5.0})
            with suppress(torch.OutOfMemoryError):
                plain = PlainAutograd(dict(start), k=k if l0 is None else None, lr=1e-6, l1=5.0)
                record["plain autograd"] = batch / seconds(lambda p=plain, x=on_device: p(x), device, 5)
                del plain
            record |= _peers(name, start, on_device, k, device)
            yield record


def _peers(
    name: str, start: dict[str, torch.Tensor], x: torch.Tensor, k: int, device: torch.device
) -> dict[str, float]:
    """Tokens a second of a step of other people's SAEs with Adam, of those that import."""
    speeds = {}
    for peer, make in (("sae-lens", _sae_lens), ("sparsify", _sparsify)):
        try:
            if (step := make(name, start, x, k, device)) is not None:
                speeds[peer] = len(x) / seconds(step, device, 5)
        except (ImportError, TypeError, ValueError, RuntimeError) as problem:
            print(f"{peer}, {name}: {type(problem).__name__}: {problem}", file=sys.stderr)
    return speeds


def _sparsify(
    name: str, start: dict[str, torch.Tensor], x: torch.Tensor, k: int, device: torch.device
) -> Callable[[], object] | None:
    """As its trainer does it, with Adam; on a GPU its forward pass is in bfloat16."""
    if name != "topk" or importlib.util.find_spec("sparsify") is None:
        return None
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=len(start["W_dec"]), k=k), device=device)
    with torch.no_grad():
        for parameter, key in ((coder.encoder.bias, "b_enc"), (coder.W_dec, "W_dec"), (coder.b_dec, "b_dec")):
            parameter.copy_(start[key])
        coder.encoder.weight.copy_(start["W_enc"].T)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-6)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        optimizer.zero_grad()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()

    return step


def _sae_lens(
    name: str, start: dict[str, torch.Tensor], x: torch.Tensor, k: int, device: torch.device
) -> Callable[[], object] | None:
    """Its training SAE in float32."""
    try:
        from sae_lens import (
            StandardTrainingSAE,
            StandardTrainingSAEConfig,
            TopKTrainingSAE,
            TopKTrainingSAEConfig,
        )
        from sae_lens.saes.sae import TrainStepInput
    except ImportError:
        return None
    shape = {"d_in": x.shape[1], "d_sae": start["W_dec"].shape[0], "dtype": "float32", "device": str(device)}
    sae: Any
    if name == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=k))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=5.0))
    with torch.no_grad():
        for key, tensor in start.items():
            getattr(sae, key).copy_(tensor)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-6)

    def step() -> None:
        out = sae.training_forward_pass(TrainStepInput(x, {"l1": 5.0}, None, n_training_steps=1, is_logging_step=False))
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return step


def model_speeds(device: torch.device, rates: dict[str, float], quick: bool) -> Iterator[dict[str, Any]]:
    """Tokens a second of harvesting and of steering with a Llama of random weights; features a second of naming."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from saeffect.features.projection import project
    from saeffect.lm.hooks import capture
    from saeffect.lm.loading import load_language_model
    from saeffect.steering import Intervention, NoiseCell, Sampling, generate
    from saeffect.steering.operators import AddVectors
    from tiny_study import make_tokenizer

    d_model, n_layers, rows = (64, 4, 2) if quick else (2048, 16, 32)
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        make_tokenizer(folder)
        config = LlamaConfig(
            vocab_size=600 if quick else 128_256, hidden_size=d_model, intermediate_size=4 * d_model,
            num_hidden_layers=n_layers, num_attention_heads=d_model // 64, num_key_value_heads=max(1, d_model // 256),
            max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        from saeffect.config import ModelConfig

        lm = load_language_model(ModelConfig(path=str(folder), device=str(device), dtype="bfloat16"))
    ids, hook = torch.randint(1, 500, (rows, 64 if quick else 1024)), f"blocks.{n_layers // 2}.hook_resid_pre"
    half = sum(p.numel() for p in lm.model.model.layers[: n_layers // 2].parameters())
    rate = ids.numel() / seconds(lambda: capture(lm, hook, ids), device, 3)
    yield {"what": f"harvest, {half / 1e6:,.0f} M weights below the hook", "saeffect bfloat16": rate,
           "limit": rates["bfloat16"] / (2 * half)}  # fmt: skip
    sampling = Sampling(max_new_tokens=4 if quick else 50, temperature=1.0, top_p=0.3, frequency_penalty=1.0)
    n = 4 if quick else 256
    cells = [NoiseCell(0, "river", i) for i in range(n)]
    steering = Intervention(AddVectors(torch.randn(n, d_model)))

    def steer() -> None:
        generate(lm, hook, [5, 6, 7, 8], cells, sampling, intervention=steering, batch_size=n)

    read = 2.0 * sum(p.numel() for p in lm.model.parameters())  # bytes of weights, for each token of all rows
    yield {"what": f"steered texts, {n} at once", "limit": n * rates["bytes"] / read,
           "saeffect bfloat16": n * sampling.max_new_tokens / seconds(steer, device, 2)}  # fmt: skip
    d_vocab, d_sae = (600, 128) if quick else (50_257, 24_576)
    W_U, W_dec = torch.randn(768, d_vocab, device=device), torch.randn(d_sae, 768, device=device)
    elapsed = seconds(lambda: project(W_dec, W_U, 10), device, 2)
    yield {"what": f"top tokens among {d_vocab:,}, features a second", "saeffect": d_sae / elapsed,
           "limit": rates["bfloat16"] / (2 * 768 * d_vocab)}  # fmt: skip


def tables(results: dict[str, Any], path: Path) -> None:
    """The results as Markdown."""
    lines = [f"{results['device']}, torch {results['torch']}."]
    if "check" in results:
        lines += ["", "| part | largest difference from the CPU | |", "|---|---|---|"]
        for row in results["check"]:
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            lines.append(f"| {row['part']} | {error} | {'ok' if row['ok'] else row['problem'] or 'differs'} |")
    if "speed" in results:
        lines += ["", "| | saeffect | of the limit | beside |", "|---|---|---|---|"]
        for row in results["speed"]:
            ours = max(value for key, value in row.items() if key.startswith("saeffect"))
            beside = ", ".join(f"{key} {row[key]:,.0f}" for key in BESIDE if key in row)
            name = row["what"] + (f", {row['d_sae']:,} features" if "d_sae" in row else "")
            lines.append(f"| {name} | {ours:,.0f} | {ours / row['limit']:.0%} | {beside} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Check and measure, print as it goes, write."""
    parser = parser_of(__doc__, "tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=("check", "speed"), default=("check", "speed"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "")
    options: argparse.Namespace = parser.parse_args()
    if not options.device:
        problem = "there is no GPU here (torch.cuda.is_available() is false); --device cpu --quick tries the file."
        print(f"gpu.py: {problem}", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "started": time.strftime("%Y-%m-%d")}
    if "check" in options.parts:
        results["check"] = []
        for row in checks(device):
            results["check"].append(row)
            print(json.dumps(row), flush=True)
    if "speed" in options.parts:
        rates = limits(device, options.quick)
        results |= {"rates": rates, "speed": []}
        for make in (training, crosscoders, model_speeds):
            for row in make(device, rates, options.quick):
                results["speed"].append(row)
                print(json.dumps(row), flush=True)
    write_results(results, "gpu", options, tables)
    summary: dict[str, Any] = {"device": name}
    if "check" in results:
        summary["failed"] = [row["part"] for row in results["check"] if not row["ok"]]
    for row in results.get("speed", ()):
        ours = max(value for key, value in row.items() if key.startswith("saeffect"))
        summary[row["what"] + (f" {row['d_sae']}" if "d_sae" in row else "")] = round(ours / row["limit"], 3)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
