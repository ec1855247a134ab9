"""How long the feature browser takes: pages and keystrokes over a run with two arms of 24,576 features.

`python benchmarks/web.py` makes a synthetic run (tables as the pipeline writes them, no model), serves it in a process
of its own and asks as readers do: one alone, then 50 at once, each typing a word (a key every 200 ms), looking, opening
a page, looking. Aims: 95 % of pages within 100 ms and of keystrokes within 50 ms. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

AIMS = {"page": 100.0, "keystroke": 50.0}
PER_ARM = 24_576
ARMS = ("control", "treatment")
TOP_K, EXAMPLES, WINDOW, VOCABULARY = 10, 6, 33, 50_000
KEY, LOOK = 0.2, 3.0


def make_run(folder: Path, per_arm: int, seed: int = 0) -> list[str]:
    """Write the run directory; returns its vocabulary."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    weights = np.linspace(3, 0.3, len(letters))
    lengths = generator.integers(2, 10, VOCABULARY)
    letter_rows = generator.choice(letters, size=(VOCABULARY, 10), p=weights / weights.sum())
    words = ["".join(row[:n]) for row, n in zip(letter_rows, lengths, strict=True)]
    words = [(" " if i % 2 else "") + word for i, word in enumerate(words)]
    for arm in ARMS:
        arm_folder = folder / "arms" / arm
        arm_folder.mkdir(parents=True)
        for name, table in _arm_tables(generator, words, per_arm).items():
            pq.write_table(table, arm_folder / f"{name}.parquet", compression="zstd")
    (folder / "comparison").mkdir()
    for name, frame in _comparison(generator, per_arm).items():
        frame.to_parquet(folder / "comparison" / f"{name}.parquet", index=False)
    arms = {arm: {"role": arm, "model": f"./{arm}", "sae": f"./sae-{arm}"} for arm in ARMS}
    steering = {"prompts": [f"Prompt {i}" for i in range(6)]}
    text = {"sources": [{"name": name, "path": f"./{name}.txt"} for name in ("general", "domain")]}
    study = {
        "name": "synthetic",
        "arms": arms,
        "text": text,
        "selection": {"vocabulary": "medical"},
        "steering": steering,
    }
    (folder / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    stages = {f"features {arm}": {"fingerprint": arm, "outputs": {}, "seconds": 1, "versions": {}} for arm in ARMS}
    manifest = {
        "study": "synthetic",
        "stages": stages,
        "arms": {arm: {"model": arm} for arm in ARMS},
        "text_sha256": "",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return words


def _lists(generator: np.random.Generator, strings: list[str], n: int, width: int) -> pa.Array:
    indices = generator.zipf(1.3, n * width) % len(strings)
    flat = pa.array(strings).take(pa.array(indices))
    return pa.ListArray.from_arrays(pa.array(np.arange(0, n * width + 1, width), pa.int32()), flat)


def _numbers(values: np.ndarray, width: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, values.size + 1, width), pa.int32()), pa.array(values))


def _arm_tables(generator: np.random.Generator, words: list[str], n: int) -> dict[str, pa.Table]:
    numbers, chosen = np.arange(n), np.sort(generator.choice(n, min(200, n), replace=False))
    features = {
        "feature": numbers,
        "top_tokens": _lists(generator, words, n, TOP_K),
        "top_weights": _numbers(-np.sort(-generator.random((n, TOP_K)), axis=1).ravel(), TOP_K),
        "decoder_norm": np.ones(n),
        "density": 10 ** generator.uniform(-5, -1, n),
        "mean_activation": generator.gamma(2, 10, n),
        "max_activation": generator.gamma(9, 10, n),
    }
    acts = generator.gamma(2, 10, n * EXAMPLES * WINDOW) * (generator.random(n * EXAMPLES * WINDOW) < 0.1)
    examples = {
        "feature": np.repeat(numbers, EXAMPLES),
        "rank": np.tile(np.arange(EXAMPLES), n),
        "activation": generator.random(n * EXAMPLES),
        "position": np.full(n * EXAMPLES, 24),
        "tokens": _lists(generator, words, n * EXAMPLES, WINDOW),
        "activations": _numbers(acts, WINDOW),
        "source": ["general"] * (n * EXAMPLES),
    }
    zero = np.zeros(n, dtype=np.int64)
    votes = {"n_yes": zero, "n_no": zero, "n_unsure": zero, "label": [""] * n}
    domain = generator.random(n) < 0.06
    effect = {"feature": chosen, "effect": generator.normal(0, 0.1, len(chosen)), "passed": chosen % 3 == 0}
    effect |= {"effect_low": effect["effect"] - 0.05, "effect_high": effect["effect"] + 0.05}
    n_texts = len(chosen) * 18
    texts = {
        "feature": np.repeat(chosen, 18),
        "prompt": np.tile(np.repeat(np.arange(6), 3), len(chosen)),
        "sample": np.zeros(n_texts, dtype=np.int64),
        "condition": ["unsteered", "steered", "matched"] * (n_texts // 3),
        "dose": [0.0, 0.4, 0.4] * (n_texts // 3),
        "text": [" a text of some twenty words that says little and goes on" * 2] * n_texts,
        "similarity": generator.random(n_texts),
    }
    coherence = {
        "feature": numbers,
        "coherence": generator.normal(0.2, 0.15, n),
        "n_known": zero + 9,
        "reason": [""] * n,
    }
    effect |= {"q": generator.random(len(chosen)), "declared": np.ones(len(chosen), dtype=bool)}
    selection = {"feature": numbers, "matches": zero + domain, "is_domain": domain} | votes
    tables = {"features": features, "examples": examples, "coherence": coherence, "selection": selection}
    tables |= {"effects": effect, "interventions": texts}
    return {name: pa.table(table) for name, table in tables.items()}


def _comparison(generator: np.random.Generator, n: int) -> dict[str, pd.DataFrame]:
    bases = ("read", "written", "expected", "combined")
    change = pd.DataFrame({"feature": np.tile(np.arange(n), 4), "basis": np.repeat(bases, n)})
    for name in ("base", "tuned", "change", "z"):
        change[name] = generator.normal(size=4 * n)
    change = change.assign(reason="", p=generator.random(4 * n), q=generator.random(4 * n), n_nulls=12, smallest_p=1e-5)
    measures = ("decoder cosine", "activation correlation")
    tables = {"changes": change}
    for side in ("control", "treatment"):
        fates = pd.DataFrame({"measure": np.repeat(measures, n), "feature": np.tile(np.arange(n), 2)})
        fates["match"], fates["similarity"] = generator.integers(0, n, 2 * n), generator.random(2 * n)
        fates["fate"] = generator.choice(["kept", "moved", "gone", "unclear", ""], 2 * n)
        tables[f"fates_{side}"] = fates.assign(p=0.5, q=0.5, kept_at=0.6, mutual=True, reason="")
    return tables


class Reader:
    """One reader: types words and opens pages; records response times in milliseconds."""

    def __init__(self, client: Any, words: list[str], seed: int, per_arm: int) -> None:
        self._client, self._words, self._per_arm = client, words, per_arm
        self._random = np.random.default_rng(seed)
        self.times: dict[str, list[float]] = {"page": [], "keystroke": []}

    async def ask(self, kind: str, path: str) -> None:
        started = time.perf_counter()
        response = await self._client.get(path)
        assert response.status_code == 200, (path, response.status_code)
        self.times[kind].append(1000 * (time.perf_counter() - started))

    async def read(self, until: float, look: float) -> None:
        """Read until a time, thinking `look` seconds on average between a list and a page."""
        await asyncio.sleep(look * self._random.random())
        while time.perf_counter() < until:
            word = self._words[self._random.integers(len(self._words))].strip()[:6]
            for end in range(1, len(word) + 1):
                await self.ask("keystroke", f"/api/features/rows?q={word[:end]}")
                await asyncio.sleep(KEY if look else 0)
            await asyncio.sleep(look * 2 * self._random.random())
            arm, number = self._random.choice(ARMS), self._random.integers(self._per_arm)
            page = (
                "/features?arm=control&domain=yes"
                if self._random.random() < 0.2
                else f"/features/{arm}/{number}?q={word[:3]}"
            )
            await self.ask("page", page)
            await asyncio.sleep(look * 2 * self._random.random())


async def measure(
    address: str, words: list[str], readers: int, seconds: float, look: float, per_arm: int
) -> dict[str, Any]:
    """Response times of `readers` readers over `seconds`: number, median and 95th percentile by kind."""
    import httpx

    limits = httpx.Limits(max_connections=readers, max_keepalive_connections=readers)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        all_readers = [Reader(client, words, seed, per_arm) for seed in range(readers)]
        started = time.perf_counter()
        await asyncio.gather(*(reader.read(started + seconds, look) for reader in all_readers))
        elapsed = time.perf_counter() - started
    results: dict[str, Any] = {
        "readers": readers,
        "per_second": round(sum(len(t) for p in all_readers for t in p.times.values()) / elapsed, 1),
    }
    for kind in AIMS:
        times = np.array([t for reader in all_readers for t in reader.times[kind]])
        results[kind] = {
            "n": len(times),
            "median": round(float(np.median(times)), 1),
            "p95": round(float(np.quantile(times, 0.95)), 1),
        }
    return results


def serve(run: Path, port: int) -> subprocess.Popen[bytes]:
    """The app over the run in a process of its own, once it answers."""
    command = [sys.executable, "-m", "saeffect", "serve", str(run), "--port", str(port), "--no-open"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=PER_ARM, help="features of an arm")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each part")
    parser.add_argument("--port", type=int, default=8399)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        run.mkdir()
        words = make_run(run, options.features)
        server = serve(run, options.port)
        try:
            address = f"http://127.0.0.1:{options.port}"
            first = _wait(address)
            parts = []
            for readers, look in ((1, 0.0), (50, LOOK)):
                before = psutil.Process(server.pid).cpu_times().user
                part = asyncio.run(measure(address, words, readers, options.seconds, look, options.features))
                cpu_seconds = psutil.Process(server.pid).cpu_times().user - before
                part["server_cpu_ms"] = round(1000 * cpu_seconds / sum(part[kind]["n"] for kind in AIMS), 1)
                parts.append(part)
                for kind, aim in AIMS.items():
                    times = f"median {part[kind]['median']} ms, p95 {part[kind]['p95']} ms (aim {aim:.0f})"
                    print(f"{readers:3d} readers, {kind}: {times}")  # noqa: T201
        finally:
            server.terminate()
            server.wait()
    print(json.dumps({"features": options.features, "first_list_seconds": first, "parts": parts}))  # noqa: T201


def _wait(address: str) -> float:
    """Seconds from the first answer of the server to the first list and page: what reading the tables takes."""
    import httpx

    with httpx.Client(base_url=address, timeout=120) as client:
        for _ in range(600):
            try:
                client.get("/static/app.css")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        started = time.perf_counter()
        for path in ("/features", "/features/control/1", "/features/treatment/1"):
            response = client.get(path)
            assert response.status_code == 200, (path, response.text[:2000])
        return round(time.perf_counter() - started, 2)


if __name__ == "__main__":
    main()
