"""What a study will take: tokens, operations, memory, disk and time of each stage, before anything is computed.

Needs no weights, neither of models nor of SAEs that the study trains itself: sizes come from configurations, speeds
from `saeffect.study.rates`. Each stage's work is modelled here as numbers of tokens, its work on tables as seconds
that were measured on the bundled study.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from saeffect.config import ModelConfig, PutBackConfig
from saeffect.config_steering import SteeringConfig
from saeffect.diffing.nulls import null_files
from saeffect.diffing.trace import NEW_TOKENS, OPENINGS, SAMPLES, text_sampling
from saeffect.errors import ConfigError
from saeffect.io import read_json
from saeffect.lm.hooks import parse_hook
from saeffect.lm.loading import bundled_path, locate_model, model_shape
from saeffect.lm.residuals import Residuals, machine_memory
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SaeConfig
from saeffect.steering.sampling import Sampling
from saeffect.study.check import check_context
from saeffect.study.finished import html_of
from saeffect.study.nulls import nulls_folder
from saeffect.study.rates import PROMPT, DiskRates, ModelRates, StageCost, encode_seconds, product_rate, table_speed
from saeffect.study.study import SHARE_OF_A_MODEL, Study
from saeffect.study.training import arm_folder, arm_recipe

__all__ = ["Plan", "plan_study"]

# Seconds of work on tables, for `_MEASURED_FEATURES` features and `_MEASURED_TOKENS` tokens (`rates.table_speed`).
_START, _FEATURES, _EXAMPLES, _SMALL, _SELECT, _MATCH = 18.0, 2.0, 2.0, 0.3, 0.5, 1.5
_VOCABULARY = 2.5  # of 49,152 tokens, decoded once for each model
_NAMING, _ONE_NULL, _PUT_BACK, _SCORES, _COMPARE, _REPORT = 8.0, 0.3, 6.0, 1.0, 10.0, 32.0
_MEASURED_FEATURES, _MEASURED_TOKENS = 4_608, 49_152
_DOMAIN = 0.06  # share of features that are of the domain, as in the bundled study
_TRACE_SOFTMAXES = 1.5  # the trace keeps every block's output, and probabilities of both models
_CROSSED_TOKENS = 32_768
_RUN_BYTES, _ARM_BYTES, _FEATURE_BYTES = 20_000_000, 1_000_000, 1_500  # page and figures, an arm, a feature
_PASSES = 3  # a training step costs as much as so many encodings and decodings


@dataclass(frozen=True, eq=False)
class Plan:
    """Prediction of what a study takes.

    Attributes:
        table: A row a stage, in order: stage; tokens (read or written by models); flop; memory (peak of one process)
            and disk (added), in bytes; seconds.
        lines: What was measured, and what is assumed.
        gpus: Processes that share the stages that can be shared.
    """

    table: pd.DataFrame
    lines: tuple[str, ...]
    gpus: int

    @property
    def total(self) -> pd.Series:
        """Sums over the stages; of memory the largest."""
        return self.table.drop(columns="stage").sum().mask(lambda x: x.index == "memory", self.table["memory"].max())

    def _repr_html_(self) -> str:
        return html_of(self.lines, self.table.set_index("stage"))


def plan_study(study: Study, *, gpus: int = 1, out: Path | None = None, log: Log = SILENT) -> Plan:
    """Predict what `run_study` takes, and before it `train_sae` for missing SAEs.

    Takes half a minute, most of it measuring. Times hold for a machine like this one, within a factor of two if
    nothing else runs; the text is taken to have as many tokens as the study asks for.

    Args:
        gpus: Processes, each with a device of its own.
        out: Run directory, whose disk is measured.

    Raises:
        ConfigError: Fewer than one device, or rows of text that are longer than a model's positions.
        SaeffectError: A model or SAE that is neither there nor can be trained; see `Study.open_arm`.
    """
    if gpus < 1:
        raise ConfigError(f"a study needs at least one device. Got {gpus}.", at="--gpus", fix="for example --gpus 8.")
    check_context(study)
    planner = _Planner(study, gpus, out or Path("runs") / study.config.name, log)
    return Plan(pd.DataFrame([stage.row() for stage in planner.stages()]), tuple(planner.lines()), gpus)


class _Planner:
    def __init__(self, study: Study, gpus: int, out: Path, log: Log) -> None:
        self._study, self._config, self._gpus = study, study.config, gpus
        self._shapes: dict[object, ModelRates] = {}
        self._log = log
        existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
        self._free = shutil.disk_usage(existing).free
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        log("measuring this machine")
        self._disk, self._speed = DiskRates(existing), table_speed()
        self._arms = study.ordered_arms()
        self._control, self._treatment = study.pair
        self._models = {name: self._rates(name) for name in self._arms}
        self._saes = {name: self._sae(name) for name in self._arms} if study.has_saes else {}
        self._loaded: list[tuple[ModelConfig, int]] = []
        self._most_bytes = Residuals().most_bytes
        self._kept: dict[tuple[object, str], int] = {}  # bytes of kept activations, the oldest first
        self._traced: dict[tuple[object, str], int] = {}  # tokens that the trace has read
        self._n_nulls = len(null_files(folder)) if (folder := nulls_folder(study)) else 0

    def _rates(self, arm: str) -> ModelRates:
        config, at = self._config.arms[arm].model, self._study.at("arms", arm, "model")
        source = locate_model(config, log=self._log, at=at)
        key = (model_shape(source) or str(source), config.dtype, config.device, config.quantize)
        if key not in self._shapes:
            self._log(f"measuring {config.path}, without its weights")
            self._shapes[key] = ModelRates(config, self._config.text.context_size, at=at)
        return self._shapes[key]

    def _sae(self, arm: str) -> SaeConfig:
        if not self._is_trained_first(arm):
            return self._study.sae_config(arm)
        recipe = arm_recipe(self._study, arm)
        return SaeConfig(recipe.sae.architecture, self._models[arm].d_model, recipe.sae.d_sae, k=recipe.sae.k)

    def _is_trained_first(self, arm: str) -> bool:
        folder = arm_folder(self._study, arm)
        return folder is not None and not folder.exists() and self._config.training is not None

    def _hook(self, arm: str) -> tuple[str, int]:
        """An arm's hook, and how many blocks run before it."""
        hook = self._config.arms[arm].hook if self._is_trained_first(arm) else self._study.hook(arm)
        point = parse_hook(str(hook), self._models[arm].n_layers)
        return str(hook), point.layer + (point.kind != "hook_resid_pre")

    @cached_property
    def _encode(self) -> float:
        """Seconds a token of the largest SAE, on the control model's device."""
        largest = max(self._saes.values(), key=lambda sae: sae.d_sae)
        return encode_seconds(largest.d_in, largest.d_sae, largest.k or 1, self._models[self._control].device)

    @cached_property
    def _product(self) -> float:
        return product_rate(self._models[self._control].d_model)

    def _table(self, seconds: float) -> float:
        return seconds * self._speed

    def _wide(self, seconds: float, arm: str) -> float:
        """Seconds on tables of features."""
        return self._table(seconds * self._saes[arm].d_sae / _MEASURED_FEATURES)

    def lines(self) -> Iterator[str]:
        yield from (m.description() for m in self._shapes.values())
        if self._gpus > 1 and any(m.device.type == "cpu" for m in self._shapes.values()):
            yield f"measured on this CPU, for {self._gpus} such machines; to plan for GPUs, run this where they are"
        if self._load > (os.cpu_count() or 1) / 2:
            yield f"other programs keep this machine busy (load {self._load:.1f}): times are too long"
        yield f"disk: {self._disk.write / 1e6:,.0f} MB/s written, {self._free / 1e9:,.0f} GB free"
        if self._config.steering is not None and self._config.steering.max_features is None:
            yield f"assumed: {_DOMAIN:.0%} of the features are of the domain, and all of them are steered"

    def stages(self) -> Iterator[StageCost]:
        """In the order of `run_study`."""
        yield from (self._train(arm) for arm in self._arms if self._saes and self._is_trained_first(arm))
        yield self._start()
        if not self._saes:
            report = self._fixed("report", _REPORT / 3, disk=_RUN_BYTES / 4)
            yield from (self._trace(), self._changes(), *self._push(), report)
            return
        for arm in self._arms:
            yield self._gate(arm)
        yield self._trace()
        for arm in self._arms:
            yield self._features(arm)
        for arm in self._config.arms:
            yield self._fixed(f"coherence {arm}", _SMALL)
        yield self._fixed("select", _SELECT * len(self._arms))
        for arm in self._arms:
            if self._config.arms[arm].more_saes:
                yield self._features(arm, more=len(self._config.arms[arm].more_saes))
        if self._config.arms[self._control].sae != self._config.arms[self._treatment].sae:
            yield self._match()
        yield self._changes()
        if self._config.put_back is not None:
            yield self._put_back(self._config.put_back)
        yield from self._push()
        if self._config.steering is not None:
            yield self._dose_search(self._config.steering)
            for arm in self._arms:
                yield self._steer(f"steer {arm}", arm, self._config.steering)
        if self._config.comparison.crossed:
            yield self._cross()
        yield self._fixed("compare", _COMPARE * self._config.comparison.n_boot / 2_000)
        yield self._fixed("report", _REPORT, disk=_RUN_BYTES)

    def _fixed(self, name: str, seconds: float, disk: float = 0.0) -> StageCost:
        return StageCost(name, seconds=self._table(seconds), disk=disk)

    def _open(self, stage: StageCost, *arms: str) -> None:
        """Load models that are not in memory, as `Study.open_model` keeps them."""
        for arm in arms:
            config, size = self._config.arms[arm].model, self._models[arm].n_bytes
            if all(config != loaded for loaded, _ in self._loaded):
                if len(self._loaded) > 1 or sum(n for _, n in self._loaded) > SHARE_OF_A_MODEL * machine_memory():
                    self._loaded.clear()
                self._loaded.append((config, size))
                # Read, hashed, and with an adapter merged and compared.
                stage.seconds += size / self._disk.read * (3 if config.adapter else 2) + self._table(1.0)
        saes = sum(8 * sae.d_in * sae.d_sae for name, sae in self._saes.items() if name in arms)
        stage.memory = max(stage.memory, saes + sum(n for _, n in self._loaded))

    def _train(self, arm: str) -> StageCost:
        recipe, m, sae = arm_recipe(self._study, arm), self._models[arm], self._saes[arm]
        stage, config = StageCost(f"train-sae {arm}"), recipe.sae
        self._open(stage, arm)
        tokens = recipe.tokens_a_pass or (config.steps or 0) * config.batch_size
        steps = config.steps or tokens * config.epochs // config.batch_size
        stage.read(m, tokens + recipe.held_out_tokens, self._hook(arm)[1])
        if recipe.activations == "shards":
            stage.disk = (tokens + recipe.held_out_tokens) * sae.d_in * m.dtype.itemsize
            stage.seconds += stage.disk / self._disk.write
        stage.encode(steps * config.batch_size, sae, self._encode, _PASSES * 2)
        stage.seconds /= self._gpus
        stage.memory += 4 * 8 * sae.d_in * sae.d_sae  # weights, gradients and both moments
        # The SAE, and the checkpoints: weights and both moments in float32, one more while the newest is written.
        parameter_bytes = getattr(torch, recipe.dtype).itemsize + 3 * 4 * (config.keep_checkpoints + 1)
        stage.disk += parameter_bytes * 2 * sae.d_in * sae.d_sae
        return stage

    def _start(self) -> StageCost:
        stage = self._fixed("start", _START)
        self._open(stage, *reversed(self._arms) if self._saes else [self._control])
        return stage

    def _read_text(self, stage: StageCost, arm: str) -> None:
        """Read the study's text up to an arm's hook, unless its activations are kept."""
        hook, n_blocks = self._hook(arm)
        key, m = (self._config.arms[arm].model, hook), self._models[arm]
        size = self._config.text.tokens * m.d_model * m.dtype.itemsize
        if key not in self._kept:
            self._open(stage, arm)
            stage.read(m, self._config.text.tokens - self._traced.get(key, 0), n_blocks)
            stage.seconds += self._table(_VOCABULARY * m.d_vocab / _MEASURED_TOKENS)
            if size <= self._most_bytes:  # see `Residuals`
                while sum(self._kept.values()) + size > self._most_bytes:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = size
        stage.memory = max(stage.memory, 8 * self._saes[arm].d_in * self._saes[arm].d_sae) + sum(self._kept.values())

    def _gate(self, arm: str) -> StageCost:
        stage, m, sae = StageCost(f"gate {arm}"), self._models[arm], self._saes[arm]
        self._open(stage, arm)
        tokens, after = min(self._config.gate.tokens, self._config.text.tokens), m.n_layers - self._hook(arm)[1]
        stage.read(m, tokens * 1.5, m.n_layers, logits=1)  # clean, and part of it with or without BOS
        stage.read(m, tokens * 2, after, logits=1)
        stage.encode(tokens, sae, self._encode, 5)
        return stage

    def _features(self, arm: str, more: int = 0) -> StageCost:
        """An arm's features, or those of `more` further SAEs."""
        stage, m, sae = StageCost(f"{'seeds' if more else 'features'} {arm}"), self._models[arm], self._saes[arm]
        self._read_text(stage, arm)
        n = more or 1
        products = 2 * m.d_model * m.d_vocab * sae.d_sae * n
        stage.flop += products
        stage.seconds += products / self._product + self._wide(_FEATURES, arm) * n * m.d_vocab / _MEASURED_TOKENS
        stage.encode(self._config.text.tokens, sae, self._encode, n)
        stage.seconds += 0 if more else self._wide(_EXAMPLES, arm) * self._config.text.tokens / 19_200
        stage.disk = n * (_FEATURE_BYTES * sae.d_sae + _ARM_BYTES)
        return stage

    def _match(self) -> StageCost:
        stage, tokens = StageCost("match"), self._config.text.tokens
        pairs = len(self._arms) - 1 + sum(len(arm.more_saes) for arm in self._config.arms.values())
        for arm in self._arms:
            self._read_text(stage, arm)
            n = 1 + len(self._config.arms[arm].more_saes) + (arm == self._treatment)
            stage.encode(tokens, self._saes[arm], self._encode, n)
        sae = self._saes[self._control]
        products = 2 * sae.d_in * sae.d_sae**2 * 2 * pairs
        stage.flop += products
        stage.seconds += products / self._product + self._wide(_MATCH * pairs, self._control)
        return stage

    def _trace(self) -> StageCost:
        stage, m = StageCost("trace"), self._models[self._control]
        config, text = self._config.changes, self._config.text
        self._open(stage, self._control, self._treatment)
        tokens = min(config.rows, text.tokens // text.context_size) * min(config.tokens_per_row, text.context_size)
        texts, writers = len(OPENINGS) * SAMPLES, 2 if nulls_folder(self._study) is None else 1  # nulls keep base texts
        stage.read(m, 2 * tokens, m.n_layers, logits=_TRACE_SOFTMAXES)
        for _ in range(writers):
            stage.write(m, texts, NEW_TOKENS, text_sampling())
        if self._saes:
            stage.read(m, writers * texts * NEW_TOKENS, self._hook(self._control)[1])
            stage.encode(2 * tokens + writers * texts * NEW_TOKENS, self._saes[self._control], self._encode)
        stage.disk = 4 * (8 * (self._saes[self._control].d_sae if self._saes else 0) + 2 * m.d_vocab)
        fits = text.tokens * m.d_model * m.dtype.itemsize <= self._most_bytes
        if fits and config.tokens_per_row >= text.context_size:  # kept for the stages after
            hook = self._hook(self._control)[0]
            self._traced = {(self._config.arms[arm].model, hook): tokens for arm in (self._control, self._treatment)}
        return stage

    def _changes(self) -> StageCost:
        seconds = _ONE_NULL * self._n_nulls * self._models[self._control].d_vocab / _MEASURED_TOKENS
        stage = self._fixed("changes", seconds, disk=2 * _ARM_BYTES)
        stage.seconds += self._wide(_NAMING, self._control) if self._saes else 0.0
        return stage

    def _push(self) -> Iterator[StageCost]:
        config, stage, m = self._config.push, StageCost("push"), self._models[self._control]
        if config is not None:
            self._open(stage, self._control)
            rows = (1 + min(config.nulls, self._n_nulls)) * len(config.doses) * config.samples
            for _ in OPENINGS:
                stage.write(m, rows, NEW_TOKENS, text_sampling())
            yield stage

    def _put_back(self, config: PutBackConfig) -> StageCost:
        m, text = self._models[self._control], self._config.text
        stage, n_blocks = StageCost("put back"), self._hook(self._control)[1]
        self._open(stage, self._control, self._treatment)
        bundled = text.bundled and read_json(bundled_path("texts", text.bundled) / "sources.json")["names"]
        width = min(config.tokens_per_row, text.context_size)
        tokens = (config.rows * len(bundled or text.sources) + len(OPENINGS)) * width
        sets = 2 * (len(config.sizes) + config.groups + len(config.sizes_reversed) + 2) + 6
        stage.write(m, len(OPENINGS), width, Sampling(top_p=1.0))
        stage.read(m, 2 * tokens, n_blocks)
        stage.read(m, sets * tokens, m.n_layers - n_blocks, logits=1)
        stage.encode(tokens, self._saes[self._control], self._encode, sets + 8)
        stage.seconds += self._wide(_PUT_BACK, self._control)
        return stage

    def _trials(
        self, stage: StageCost, arm: str, m: ModelRates, config: SteeringConfig, features: int, *, search: bool = False
    ) -> None:
        """Texts of steered features, what is measured of them, and direct effects."""
        prompts = len(config.search_prompts if search else config.prompts)
        samples, doses = (1, len(config.doses)) if search else (config.samples, 1)
        conditions = 1 + (min(1, len(config.placebos)) if search else len(config.placebos))
        n_texts = samples * conditions * doses
        at_once = max(1, (config.batch_size - samples) // n_texts)
        sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p)
        n_own = math.ceil(math.ceil(features / at_once) / self._gpus) * at_once  # of the process that has most
        for n_left in range(min(features, n_own), 0, -at_once):
            rows = samples + min(n_left, at_once) * n_texts
            together = max(1, config.batch_size // rows) if config.positions == "all" else 1
            for n in [together] * (prompts // together) + [prompts % together] * (prompts % together > 0):
                stage.write(m, n * rows, config.max_new_tokens, sampling, alike=self._hook(arm)[1])
            stage.read(m, prompts * rows * (PROMPT + config.max_new_tokens), m.n_layers, logits=1)
        effects = prompts * features * conditions * doses
        stage.read(m, effects * PROMPT, m.n_layers)
        stage.seconds += effects * (m.logits + 2 * m.softmax) + self._table(_SCORES)

    def _n_tested(self, arm: str, limit: int | None) -> int:
        n_domain = max(1, round(_DOMAIN * self._saes[arm].d_sae))
        return n_domain if limit is None else min(limit, n_domain)

    def _dose_search(self, config: SteeringConfig) -> StageCost:
        stage = StageCost("dose search")
        for arm in self._arms if len(config.doses) > 1 else ():
            self._open(stage, arm)
            n = self._n_tested(arm, config.search_features)
            self._trials(stage, arm, self._models[arm], config, n, search=True)
        return stage

    def _steer(self, name: str, arm: str, config: SteeringConfig, model: str | None = None) -> StageCost:
        stage, m = StageCost(name), self._models[model or arm]
        self._open(stage, model or arm)
        n = self._n_tested(arm, config.max_features)
        self._trials(stage, arm, m, config, n)
        if model is None and config.baselines:
            texts = min(n, config.baseline_features) * len(config.prompts) * config.samples * len(config.baselines)
            alone = config.model_copy(update={"placebos": (), "prompts": config.prompts[:1], "samples": 1})
            self._trials(stage, arm, m, alone, texts)
        stage.disk = _ARM_BYTES / 5 + 300 * n * len(config.prompts) * config.samples * (2 + len(config.placebos))
        return stage

    def _cross(self) -> StageCost:
        stage, crossed = StageCost("cross"), set(self._config.comparison.crossed)
        pair = (self._control, self._treatment)
        for sae, model in (pair, pair[::-1]):
            self._open(stage, model)
            m, tokens = self._models[model], min(_CROSSED_TOKENS, self._config.text.tokens)
            stage.read(m, tokens, self._hook(sae)[1])
            stage.encode(tokens, self._saes[sae], self._encode)
            if self._config.steering is not None and crossed & {"steering", "direct_effect"}:
                part = self._steer("cross", sae, self._config.steering, model)
                stage.tokens, stage.flop = stage.tokens + part.tokens, stage.flop + part.flop
                stage.seconds += part.seconds
        return stage
