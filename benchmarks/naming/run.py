"""Does the product name what a fine-tune was taught, and say nothing of one that was taught nothing?

    python benchmarks/naming/run.py --work <folder> [--levels 100 30]

Everything is kept in the folder, so an interrupted run resumes; several runs may train in one folder.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from figure import draw
from judging import headline, judge
from pairs import LEVELS, PAIRS
from tracing import Instrument
from training import own_texts, train

from saeffect.errors import InUse
from saeffect.io import atomic_path, write_json
from saeffect.progress import Log

_HERE = Path(__file__).parent
_PEER = _HERE / "modeldiffr.json"
_STARTED = time.monotonic()


def report(line: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.0f} s] {line}", flush=True)  # noqa: T201


def main() -> None:
    """Train, trace, judge, write."""
    options = _options()
    torch.set_num_threads(options.threads)
    log, folder = Log(report), options.work
    pairs = [pair for pair in PAIRS if pair.is_null or pair.percent in options.levels]
    instrument = Instrument(folder, log)
    base_texts = own_texts(instrument.base, folder, log)
    for pair in pairs:
        try:
            train(pair, folder, instrument.base, base_texts, log)
        except InUse:
            report(f"{pair.name}: another process trains it")
    traces = {pair: instrument.trace(pair) for pair in pairs}
    rows = [judge(pair, traces, instrument.basis) for pair in pairs]
    summary = headline(rows)
    write_json(options.out / "results.json", {**summary, "fine_tunes": rows})
    with atomic_path(options.out / "results.md") as temporary:
        temporary.write_text(table(rows), encoding="utf-8")
    draw(rows, options.out)
    print(json.dumps(summary))  # noqa: T201


def table(rows: list[dict[str, Any]]) -> str:
    """One line a fine-tune, as Markdown; what peer_modeldiffr.py measured in the last column."""
    lines = [
        "| fine-tune | KL | claimed, the clearest first | its own concept: place, p | top of the mean difference |"
        " modeldiffr: new, lost, shifted features |",
        "|---|---|---|---|---|---|",
    ]
    peer = json.loads(_PEER.read_text(encoding="utf-8"))["features"] if _PEER.is_file() else {}
    for row in rows:
        claims = "; ".join(row["claims"][:3]) or "nothing"
        if len(row["claims"]) > 3:
            claims += f"; {len(row['claims']) - 3} more"
        mark = "" if row["null"] else (" ✓" if row["right"] else "")
        rank = "" if row["null"] else ("not found" if row["place"] is None else f"{row['place']}, {row['p']:.2g}")
        lens = ", ".join(row["logit_lens"][:4]).replace("|", "\\|") + (" ✓" if row["logit_lens_right"] else "")
        counts = peer.get(row["name"])
        beside = "not run" if counts is None else ", ".join(str(counts[name]) for name in ("new", "lost", "shifted"))
        lines.append(f"| {row['name']} | {row['kl']:.3f} | {claims}{mark} | {rank} | {lens} | {beside} |")
    return "\n".join(lines) + "\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for adapters and traces, about 250 MB")
    parser.add_argument("--out", type=Path, default=_HERE, help="where results go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS), help="per cent of the training text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
