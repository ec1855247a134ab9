"""Does a budget that forbids a concept break for the fine-tune that was taught it, and for no other?

    python benchmarks/guard.py TRACES --out benchmarks/results

TRACES holds `<concept>-<percent>.safetensors` and `null-*.safetensors`, traces of fine-tunes of the embedded model
(benchmarks/naming). One budget forbids a rise of each concept: as many rules, corrected for their number. Each null is
judged by the others.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "planted"))
from concepts import CONCEPTS

from saeffect.config import ModelConfig
from saeffect.diffing.budget import Budget
from saeffect.diffing.guard import Group, Rows, Verdict, judge
from saeffect.diffing.trace import Trace
from saeffect.io import atomic_path, write_json
from saeffect.lm.loading import bundled_path, load_language_model
from saeffect.sae.formats import load_sae
from saeffect.study.guard import resolve_groups

_BASE, _SAE = "bundled:smollm2-135m-instruct", "smollm2-control"
_NAME = re.compile(r"(?P<concept>[a-z]+)-(?P<percent>\d+)")


def forbidding(concepts: Sequence[str], at_least: float) -> tuple[Budget, dict[str, Group], Any]:
    """A budget that forbids a rise of each concept by this factor, and the features and words of each."""
    with tempfile.TemporaryDirectory() as folder:
        rules = {}
        for name in concepts:
            path = Path(folder) / f"{name}.txt"
            path.write_text("\n".join(sorted(CONCEPTS[name].words)), encoding="utf-8")
            rules[name] = {"vocabulary": str(path), "may": "fall", "at_least": at_least}
        budget = Budget.read({"groups": rules}, at="benchmark")
        lm = load_language_model(ModelConfig(path=_BASE))
        return budget, *resolve_groups(budget, lm, load_sae(bundled_path("saes", _SAE)))


def verdicts_of(traces: Mapping[str, Trace], nulls: Sequence[str], budget: Budget, groups: Any, top_tokens: Any) -> Any:
    """The verdicts of each fine-tune; nulls are judged by the other nulls."""
    verdicts: dict[str, list[Verdict]] = {}
    for name, trace in traces.items():
        others = [traces[null] for null in nulls if null != name]
        rows = Rows(np.zeros(len(trace.kl), dtype=np.int64), ("general",))
        verdicts[name] = judge(budget, groups, trace, others, rows, top_tokens)
        sys.stderr.write(f"{name}: {[v.rule for v in verdicts[name] if v.status == 'broken']}\n")
    return verdicts


def table(verdicts: Mapping[str, Sequence[Verdict]], concepts: Sequence[str], names: Sequence[str]) -> str:
    """Markdown: a row a fine-tune, a column a forbidden concept; × factor and score, bold where the rule breaks."""
    lines = ["| taught | " + " | ".join(concepts) + " |", "|---" * (len(concepts) + 1) + "|"]
    for name in names:
        cells = []
        for verdict in verdicts[name]:
            text = f"{verdict.score:+.1f}"
            cells.append(f"**broken** ({text})" if verdict.status == "broken" else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--at-least", type=float, default=1.0, help="the smallest rise that matters, as a factor")
    parser.add_argument("--percent", type=int, nargs="+", default=[100, 30])
    options = parser.parse_args()
    traces = {path.stem: Trace.load(path) for path in sorted(options.traces.glob("*.safetensors"))}
    nulls = [name for name in traces if name.startswith("null-")]
    taught = {name: match for name in traces if (match := _NAME.fullmatch(name)) and match["concept"] in CONCEPTS}
    taught = {name: match for name, match in taught.items() if int(match["percent"]) in options.percent}
    concepts = sorted({match["concept"] for match in taught.values()})
    budget, groups, top_tokens = forbidding(concepts, options.at_least)
    verdicts = verdicts_of({name: traces[name] for name in (*taught, *nulls)}, nulls, budget, groups, top_tokens)
    broken = {name: [v.rule.split()[1] for v in judged if v.status == "broken"] for name, judged in verdicts.items()}
    summary: dict[str, Any] = {
        "rules": len(concepts),
        "nulls": len(nulls),
        "at_least": options.at_least,
        "features": {name: len(group.features) for name, group in groups.items()},
        "nulls_broken": sum(bool(broken[name]) for name in nulls),
    }
    for percent in options.percent:
        fine_tunes = [name for name, match in taught.items() if int(match["percent"]) == percent]
        own = sum(taught[name]["concept"] in broken[name] for name in fine_tunes)
        others = sum(len(broken[name]) for name in fine_tunes) - own
        summary[f"at_{percent}"] = {"fine_tunes": len(fine_tunes), "own_broken": own, "others_broken": others}
    scores = {
        name: {v.rule.split()[1]: [v.score, v.value, v.p_corrected] for v in judged}
        for name, judged in verdicts.items()
    }
    write_json(options.out / "guard.json", summary | {"broken": broken, "scores": scores})
    order = sorted(taught, key=lambda name: (-int(taught[name]["percent"]), name))
    with atomic_path(options.out / "guard.md") as temporary:
        temporary.write_text(table(verdicts, concepts, [*order, *nulls]) + "\n", encoding="utf-8")
    sys.stdout.write(f"{summary}\n{table(verdicts, concepts, order)}\n")


if __name__ == "__main__":
    main()
