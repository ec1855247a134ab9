"""Labels of a run's features by a language model, each scored by detection; kept apart from people's labels.

`labels/` of the run directory holds a table for each arm, the contexts that were drawn, and every answer.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.errors import ConfigError
from saeffect.features.labels import LONGEST_LABEL, detect, detection_question, label_question, read_choices, read_label
from saeffect.io import fingerprint, remove_leftovers, sole_writer
from saeffect.lm.endpoint import Endpoint, Question, chat_endpoint
from saeffect.progress import SILENT, Log
from saeffect.review.queue import fingerprint_tokens
from saeffect.study.both_models import features_fingerprint, refuse_changed
from saeffect.study.export import feature_list, group_of
from saeffect.study.label_contexts import LabelPlan, read_contexts
from saeffect.study.run_folder import RunFolder, read_manifest
from saeffect.study.study import Study

__all__ = ["Cost", "label", "label_file", "read_labels"]

VERSION = 1
_BYTES_PER_TOKEN = 3.5  # of English, with a margin
_LABEL_TOKENS, _LIST_TOKENS, _CHOICE_TOKENS = 60, 16, 4
_COLUMNS = {
    **{"feature": "int64", "seen": "str", "label": "str", "accuracy": "float64", "low": "float64", "high": "float64"},
    **dict.fromkeys(("n_active", "found", "n_silent", "left", "unanswered", "shown"), "int64"),
    **{"reason": "str", "model": "str"},
}


@dataclass(frozen=True)
class Cost:
    """The most that will be sent: `requests`, each repeated if the server fails; tokens are estimated from bytes.

    `kept` requests were answered before and are not sent; the labels are scored on `n_contexts`.
    """

    url: str
    model: str
    n_features: int
    n_contexts: int
    requests: int
    kept: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class _Task:
    """A feature, the question for its label, and the contexts that score it, shuffled."""

    feature: int
    seen: str
    shown: int
    question: Question
    texts: list[str]
    active: list[bool]
    plan: LabelPlan

    def detection(self, label: str) -> list[tuple[Question, int]]:
        """The questions that score a label, and the contexts in each; none for no label."""
        size, limit = self.plan.per_request, self.plan.thinking + _LIST_TOKENS
        parts = [self.texts[i : i + size] for i in range(0, len(self.texts), size)] if label else []
        return [
            (Question(detection_question(label, part), limit + _CHOICE_TOKENS * len(part)), len(part)) for part in parts
        ]


def label(
    folder: Path | str,
    *,
    arm: str | None = None,
    features: Sequence[int] | str = "domain",
    limit: int | None = 50,
    plan: LabelPlan | None = None,
    confirm: Callable[[Cost], bool],
    log: Log = SILENT,
) -> pd.DataFrame:
    """Label features of a run by the language model that the environment names (see `chat_endpoint`).

    Reads the study's text with the arm's model, computes the cost, asks `confirm`, and only then sends: the top tokens
    and strongest contexts of each feature, then its label with other contexts. Answers are kept, so the same call
    sends nothing again. If stopped at any moment, the finished labels are in the table.

    Args:
        arm: Whose features; the treatment's by default.
        features: Numbers, or a group as in `group_of`, of which the first `limit` are taken.

    Returns:
        One row a feature: feature, seen (`fingerprint_tokens` of its top tokens), label ("" for none), accuracy, low,
        high (balanced accuracy of detection with its 95 % interval), n_active, found, n_silent, left, unanswered (see
        `Detection`), shown (contexts that the label was made from), reason (why label or accuracy is missing), model.
        Empty if `confirm` said no.

    Raises:
        ConfigError: The environment names no endpoint, the plan is impossible, or a model or SAE is not the run's.
        NotFound: The run has no features yet.
        InUse: Another process labels this run.
        SaeffectError: As `Endpoint.ask`, `group_of`, `feature_list`, `read_contexts`.
    """
    run_folder, plan = Path(folder), plan or LabelPlan()
    for key, value in (("contexts", plan.contexts), ("per_request", plan.per_request), ("parallel", plan.parallel)):
        if value < 1:
            raise ConfigError(f"{key} must be at least 1. Got {value} instead.", at=key)
    run = RunFolder(run_folder, Study.open(run_folder / "study.yaml"))
    name = arm or run.study.treatment
    run.study.arm(name)
    table = feature_list(run, name, group_of(run, name, features)[:limit] if isinstance(features, str) else features)
    answers = run_folder / "labels" / "answers"
    endpoint = chat_endpoint(answers, log=log)
    with sole_writer(run_folder / "labels"):
        remove_leftovers(answers)
        contexts = _contexts(run, name, table["feature"].tolist(), plan, log)
        tasks = [
            _task(int(feature), list(tokens), contexts[contexts["feature"] == feature], plan)
            for feature, tokens in zip(table["feature"], table["top_tokens"], strict=True)
        ]
        if not confirm(_cost(tasks, endpoint)):
            return pd.DataFrame(columns=list(_COLUMNS)).astype(_COLUMNS)
        labels = _ask(run, name, tasks, endpoint, log)
    if endpoint.requests:
        counts = f"the server counted {endpoint.tokens_in:,} tokens in and {endpoint.tokens_out:,} out"
        log(f"  {endpoint.requests:,} requests were sent; {counts}")
    return labels


def label_file(folder: Path, arm: str) -> Path:
    """The table of an arm's labels."""
    return folder / "labels" / f"{arm}.parquet"


def read_labels(folder: Path, arm: str) -> pd.DataFrame:
    """The labels of an arm as `label` returns them; empty where there are none or the table cannot be read."""
    try:
        return pd.read_parquet(label_file(folder, arm), columns=list(_COLUMNS)).astype(_COLUMNS)
    except Exception:  # pyarrow raises many kinds
        return pd.DataFrame(columns=list(_COLUMNS)).astype(_COLUMNS)


def _contexts(run: RunFolder, arm: str, features: list[int], plan: LabelPlan, log: Log) -> pd.DataFrame:
    """`read_contexts`, cached under a hash of its inputs."""
    manifest = read_manifest(run.folder)
    inputs = [VERSION, features_fingerprint(manifest, run.folder, arm), features, plan.contexts, plan.rows, plan.seed]
    file = run.path("labels", f"contexts-{arm}-{fingerprint(inputs)[:16]}.parquet")
    if not file.is_file():
        refuse_changed(run.study, arm, manifest)
        run.write_table(file, read_contexts(run, arm, features, plan, log))
    return run.read_table(file)


def _task(feature: int, top_tokens: list[str], contexts: pd.DataFrame, plan: LabelPlan) -> _Task:
    shown, tests = contexts[contexts["kind"] == "shown"], contexts[contexts["kind"] != "shown"]
    tests = tests.iloc[np.random.default_rng([plan.seed, feature]).permutation(len(tests))]
    question = label_question(top_tokens, list(zip(shown["tokens"], shown["activations"], strict=True)))
    return _Task(
        feature,
        fingerprint_tokens(top_tokens),
        len(shown),
        Question(question, plan.thinking + _LABEL_TOKENS),
        ["".join(tokens) for tokens in tests["tokens"]],
        (tests["kind"] == "active").tolist(),
        plan,
    )


def _cost(tasks: Sequence[_Task], endpoint: Endpoint) -> Cost:
    """An upper bound: a label that is not known yet is taken to have the maximum length."""
    unanswered, n_answered = list[Question](), 0
    for task in tasks:
        answer = endpoint.kept(task.question)
        text = "x" * LONGEST_LABEL if answer is None else read_label(answer)
        questions = [task.question, *(question for question, _ in task.detection(text))]
        new = [question for question in questions if endpoint.kept(question) is None]
        unanswered, n_answered = unanswered + new, n_answered + len(questions) - len(new)
    size = sum(len(question.text.encode("utf-8", "replace")) for question in unanswered)
    n_contexts, tokens_out = sum(len(task.texts) for task in tasks), sum(question.max_tokens for question in unanswered)
    tokens_in = math.ceil(size / _BYTES_PER_TOKEN)
    where = endpoint.url, endpoint.model
    return Cost(*where, len(tasks), n_contexts, len(unanswered), n_answered, tokens_in, tokens_out)


def _ask(run: RunFolder, arm: str, tasks: Sequence[_Task], endpoint: Endpoint, log: Log) -> pd.DataFrame:
    """Ask, and write the table: also the finished rows if an error stops the asking."""
    file, rows = label_file(run.folder, arm), list[dict[str, Any]]()
    existing = run.read_table(file) if file.is_file() else read_labels(run.folder, arm)
    try:
        for row in _in_threads(lambda task: _label_feature(task, endpoint), tasks, endpoint):
            rows.append(row)
            log.progress(f"labels, {arm}", len(rows), len(tasks), "features")
    finally:
        labels = pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS).sort_values("feature", ignore_index=True)
        if rows:
            parts = [part for part in (existing[~existing["feature"].isin(labels["feature"])], labels) if len(part)]
            run.write_table(file, pd.concat(parts).sort_values("feature", ignore_index=True))
    return labels


def _label_feature(task: _Task, endpoint: Endpoint) -> dict[str, Any]:
    """A feature's row of the table."""
    text = read_label(endpoint.ask(task.question))
    choices: list[bool | None] = []
    for question, n in task.detection(text):
        choices += read_choices(endpoint.ask(question), n) or [None] * n
    score = detect(choices, task.active[: len(choices)])
    accuracy = {"accuracy": score.accuracy.value, "low": score.accuracy.low, "high": score.accuracy.high}
    reason = score.accuracy.reason if text else "the language model gave no label"
    counts = {name: getattr(score, name) for name in ("n_active", "found", "n_silent", "left", "unanswered")}
    facts = {"feature": task.feature, "seen": task.seen, "shown": task.shown, "label": text, "model": endpoint.model}
    return facts | accuracy | counts | {"reason": reason}


def _in_threads(work: Callable[[_Task], Any], tasks: Sequence[_Task], endpoint: Endpoint) -> Iterator[Any]:
    """Results in order of completion. Threads are daemons, so Ctrl-C ends the program without waiting for a server."""
    todo, done = queue.SimpleQueue[_Task](), queue.SimpleQueue[Any]()
    for task in tasks:
        todo.put(task)

    def run() -> None:
        try:
            while True:
                done.put(work(todo.get_nowait()))
        except queue.Empty:
            return
        except BaseException as error:  # raised by the thread that waits
            done.put(error)

    try:
        for _ in range(min(tasks[0].plan.parallel, len(tasks))):
            threading.Thread(target=run, daemon=True).start()
        for _ in tasks:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        endpoint.stop()
