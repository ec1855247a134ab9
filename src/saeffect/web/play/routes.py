"""Routes of the playground: its page, kept results, the stream of a request (a line of JSON an event), and exports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Body, Request, Response
from fastapi import Query as Parameter
from fastapi.responses import HTMLResponse, StreamingResponse

from saeffect.config_chat import prompt_text
from saeffect.errors import ConfigError, NotFound, SaeffectError, unknown_name
from saeffect.study.export import FORMATS, export_features, group_of
from saeffect.study.stages.dose_search import chosen_dose
from saeffect.web.features.catalogue import catalogue
from saeffect.web.features.index import FeatureIndex
from saeffect.web.features.query import Query
from saeffect.web.pages import page
from saeffect.web.play.ask import MAX_FEATURES, MAX_TOKENS, Ask, Result, Text, forget, keep, kept_list, read_kept
from saeffect.web.play.engine import Engine
from saeffect.web.play.worker import Event, Job, Worker, error_fields
from saeffect.web.review.state import hidden_verdicts
from saeffect.web.site import Site

__all__ = ["router"]

router = APIRouter()
_MAX_RECENT = 64  # finished results that can still be kept
_MAX_COMPARED = 4
_CREATION_LOCK = threading.Lock()
_MAX_SUGGESTED, _N_TOKENS, _MAX_WORDS = 12, 6, 100  # features of a search, their tokens, letters of its words
_TYPES = {".json": "application/json", ".csv": "text/csv; charset=utf-8"}
_MAX_EXPORTED = 5_000
_STEPS = 5  # classes .a1 to .a5 of a tint


@dataclass
class _Playground:
    """Shared by the routes: the engine, its worker, and recent results that may be kept."""

    engine: Engine
    worker: Worker = field(default_factory=Worker)
    recent: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)
    warming: Job | None = None

    def warm(self) -> None:
        """Load the models unless they are loaded or loading."""
        if self.engine.state["state"] in ("cold", "failed") and (
            self.warming is None or self.warming.finished.is_set()
        ):
            with contextlib.suppress(SaeffectError):
                self.warming = self.worker.submit("", self.engine.warm(), lambda event: None)

    def remember(self, event: Event) -> None:
        if event["type"] == "done" and "result" in event:
            self.recent[event["job"]] = event["result"]
            while len(self.recent) > _MAX_RECENT:
                self.recent.popitem(last=False)


def _playground(request: Request) -> _Playground:
    state = request.app.state
    with _CREATION_LOCK:
        if not hasattr(state, "playground"):
            site: Site = state.site
            state.playground = _Playground(Engine(lambda: site.run))
            site.on_close(state.playground.worker.close)
    playground: _Playground = state.playground
    return playground


@router.get("/play")
def _play_page(request: Request) -> HTMLResponse:
    """The page; its address may hold a request."""
    site: Site = request.app.state.site
    problem: dict[str, str] | None = None
    arms: tuple[str, ...] = ()
    ask = Ask(prompt=_PROMPT)
    if site.has("study.yaml"):
        arms = site.arms
    if arms:
        defaults = _defaults(site)
        try:
            ask = Ask.from_query(request.query_params.multi_items(), defaults)
            if ask.features:
                _feature_summaries(request, ask.arm, ask.features)
        except SaeffectError as error:
            problem = error_fields(error)
            ask = Ask.read(defaults, at="the study")
        if not site.study.has_saes:
            problem = {"what": "This study has no SAEs: both models answer, without features.", "at": "", "fix": ""}
        _playground(request).warm()
    return page(
        request,
        "play.html.j2",
        title="Playground",
        ask=ask,
        asked="prompt" in request.query_params,
        arms=arms,
        roles={name: site.study.arm(name).role for name in arms},
        chosen=_feature_summaries(request, ask.arm, ask.features) if ask.features else [],
        wrong=problem,
        unit=_unit(site) if arms else "",
        limits={"features": MAX_FEATURES, "tokens": MAX_TOKENS},
        kept=[(name, _result_title(result)) for name, result in kept_list(site)],
        formats=list(FORMATS.values()),
    )


@router.get("/play/kept")
def _kept_page(request: Request) -> HTMLResponse:
    """Kept results side by side: `?id=…&id=…`."""
    site: Site = request.app.state.site
    names = list(dict.fromkeys(request.query_params.getlist("id")))[:_MAX_COMPARED]
    if not names:
        raise NotFound("no kept result is named.", fix="choose results on the playground's page.")
    results = [(name, read_kept(site, name)) for name in names]
    return page(
        request,
        "play_kept.html.j2",
        title="Kept results" if len(results) > 1 else "A kept result",
        results=[(name, result, _result_title(result)) for name, result in results],
        shown=_tinted_pieces,
    )


@router.get("/api/play/state")
def _state(request: Request) -> Mapping[str, Any]:
    """Whether the models are loaded, and why not."""
    return _playground(request).engine.state


@router.post("/api/play/warm")
def _warm(request: Request) -> Mapping[str, Any]:
    """Try again to load the models."""
    playground = _playground(request)
    playground.warm()
    return playground.engine.state


@router.get("/api/play/features")
def _features(request: Request, arm: str, q: str = "") -> list[dict[str, Any]]:
    """Features of an arm that match words or a number; without words the best to steer, else domain features."""
    index, words = _index(request), q.strip()[:_MAX_WORDS]
    suggested = (Query(arm=arm, tested="passed", sort="effect"), Query(arm=arm, domain="yes"), Query(arm=arm))
    results = (index.find(query) for query in ((Query(arm=arm, q=words),) if words else suggested))
    matches: list[int] = next((result.positions[:_MAX_SUGGESTED].tolist() for result in results if result.total), [])
    return _feature_summaries(request, arm, [int(index.numbers[position]) for position in matches])


@router.post("/api/play/run")
async def _run(request: Request, fields: dict[str, Any] = Body()) -> StreamingResponse:  # noqa: B008
    """Run a request: one line of JSON per event. Closing the connection stops it."""
    playground = _playground(request)
    client = str(fields.pop("client", ""))[:64] or (request.client.host if request.client else "")
    ask = Ask.read(fields, at="the request")
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def put(event: Event) -> None:
        playground.remember(event)
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = playground.worker.submit(client, playground.engine.answer(ask), put)

    async def lines() -> AsyncIterator[bytes]:
        try:
            yield _json_line({"type": "job", "job": job.id, "query": ask.query()})
            while True:
                event = await events.get()
                yield _json_line(event)
                if event["type"] in ("done", "stopped", "error"):
                    return
        finally:
            job.stop()

    return StreamingResponse(lines(), media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})


@router.post("/api/play/stop")
def _stop(request: Request, fields: dict[str, str] = Body()) -> Mapping[str, Any]:  # noqa: B008
    """Stop a request by its id, waiting or running."""
    job = _playground(request).worker.find(fields.get("job", ""))
    if job is not None:
        job.stop()
    return {"stopped": job is not None}


@router.post("/api/play/keep")
def _keep_result(request: Request, fields: dict[str, str] = Body()) -> Mapping[str, str]:  # noqa: B008
    """Keep a finished result under an address of its own."""
    result = _playground(request).recent.get(fields.get("job", ""))
    if result is None:
        raise NotFound("that result is no longer here.", fix="run it again, then keep it: the texts will be the same.")
    name = keep(request.app.state.site, result)
    return {"id": name, "url": f"/play/kept?id={name}", "title": _result_title(read_kept(request.app.state.site, name))}


@router.post("/api/play/forget")
def _forget_result(request: Request, fields: dict[str, str] = Body()) -> Mapping[str, bool]:  # noqa: B008
    """Delete a kept result."""
    forget(request.app.state.site, fields.get("id", ""))
    return {"deleted": True}


@router.get("/api/export")
def _export(
    request: Request,
    arm: str,
    format: str,
    feature: list[int] = Parameter(default=[]),  # noqa: B008
    group: str = "",
    dose: float | None = None,
) -> Response:
    """A file of features of an arm: `?arm=…&feature=…&feature=…&format=safetensors&dose=…`, or `group=domain`."""
    run = request.app.state.site.run
    run.study.arm(arm)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS, at="format")
    if bool(feature) == bool(group):
        raise ConfigError("give features or a group.", at="feature", fix="for example feature=12, or group=domain.")
    chosen = feature or group_of(run, arm, group)
    if len(chosen) > _MAX_EXPORTED:
        raise ConfigError(
            f"{len(chosen):,} features are too many for one file.", at="group", fix="use saeffect export."
        )
    file_format = FORMATS[format]
    label = group.replace(":", "-") or "-".join(map(str, chosen[:4])) + ("-and-more" if len(chosen) > 4 else "")
    with tempfile.TemporaryDirectory(prefix="saeffect-") as folder:
        file = Path(folder) / f"file{file_format.suffix}"
        export_features(run, arm, chosen, file, kind=format, dose=dose if file_format.has_dose else None)
        data = file.read_bytes()
    # Headers are ASCII; names of arms need not be.
    name = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in f"{arm}-{label}")
    return Response(
        data,
        media_type=_TYPES.get(file_format.suffix, "application/octet-stream"),
        headers={"Content-Disposition": f'attachment; filename="{name}{file_format.suffix}"'},
    )


def _index(request: Request) -> FeatureIndex:
    """The index of features, without verdicts where they are hidden."""
    return catalogue(request.app.state.site, blind=hidden_verdicts(request) is not None).index


def _feature_summaries(request: Request, arm: str, features: Sequence[int]) -> list[dict[str, Any]]:
    """Number, label and first top tokens of features; errors as `FeatureIndex.position`."""
    index = _index(request)
    positions = [(feature, index.position(arm, feature)) for feature in features]
    return [
        {"feature": feature, "label": index.verdicts.labels[position], "tokens": index.top_tokens(position)[:_N_TOKENS]}
        for feature, position in positions
    ]


_PROMPT = "What topic is on your mind?"


def _defaults(site: Site) -> dict[str, Any]:
    """The settings of the study's own steering."""
    steering = site.study.config.steering
    defaults: dict[str, Any] = {"prompt": _PROMPT, "arm": site.study.treatment}
    if steering is None:
        return defaults
    if steering.unit == "residual_norm":
        dose = None
        with contextlib.suppress(SaeffectError):
            dose = chosen_dose(site.run)[0]
        defaults |= {"operator": steering.operator, "dose": dose or steering.doses[0]}
    return defaults | {
        "prompt": prompt_text(steering.prompts[0]),
        "temperature": steering.temperature,
        "top_p": steering.top_p,
        "frequency_penalty": steering.frequency_penalty,
        "max_new_tokens": min(MAX_TOKENS, max(40, steering.max_new_tokens)),
        "seed": site.study.config.seed,
    }


def _unit(site: Site) -> str:
    with contextlib.suppress(SaeffectError):  # missing SAE: reported when the models load
        return f"mean norms of the residual at {site.study.hook(site.arms[0])}" if site.study.has_saes else ""
    return ""


def _result_title(result: Result) -> str:
    """A result in a line: features, operator and dose, placebo, seed, prompt."""
    ask = result.ask
    parts = ["unsteered"]
    if ask.features:
        operation = "ablated" if ask.operator == "ablate" else f"{ask.operator} {ask.dose:g}"
        parts = [f"{ask.arm} {', '.join(map(str, ask.features))}", operation]
    parts += [f"{ask.placebo} placebo"] if ask.placebo else []
    parts += [f"seed {ask.seed}", *(["chat"] if ask.chat else [])]
    prompt = ask.prompt if len(ask.prompt) <= 60 else ask.prompt[:59] + "…"
    return f"{', '.join(parts)}: {prompt}"


def _tinted_pieces(row: Text, result: Result) -> list[tuple[str, str, str]]:
    """A text's pieces for the page: piece, CSS class ("" for none), and activations as a tooltip.

    The tint is the largest activation as a share of its feature's maximum. Leading line feeds are made visible.
    """
    pieces, has_words = [], False
    for piece, acts in row.tokens:
        has_words = has_words or bool(piece.strip())
        share = max((a / s for a, s in zip(acts, result.scale, strict=False)), default=0.0)
        tooltip = ", ".join(f"{f}: {a:.3g}" for f, a in zip(result.ask.features, acts, strict=False) if a > 0)
        if not has_words and "\n" in piece:
            pieces.append((piece.replace("\n", "↵"), "feed", ""))
        else:
            pieces.append((piece, f"a{min(_STEPS, 1 + int(share * _STEPS))}" if share > 0 else "", tooltip))
    return pieces


def _json_line(event: Event) -> bytes:
    return (json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
