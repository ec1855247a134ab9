"""A study: its configuration, resolved paths, and its arms, opened one at a time."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pandas as pd

from saeffect.config import ArmConfig, ModelConfig, SteeringConfig, StudyConfig
from saeffect.config_chat import prompt_text
from saeffect.config_file import read_config_file
from saeffect.errors import BadFile, ConfigError, IncompatibleSae, NotFound, placed, unknown_name
from saeffect.io import fingerprint, hash_folder
from saeffect.lm.activations import TokenRows
from saeffect.lm.architectures import hook_width
from saeffect.lm.chat import ChatFormat
from saeffect.lm.chat_rows import chat_prepends
from saeffect.lm.corpora import source_identity
from saeffect.lm.hooks import hook_of_module, parse_hook, require_module_output
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import (
    BUNDLED,
    bundled_path,
    load_language_model,
    model_identity,
    resolve_device,
    resolve_dtype,
)
from saeffect.lm.residuals import Residuals, machine_memory
from saeffect.lm.tokens import resolve_prepend_bos
from saeffect.paths import BUNDLED_FOLDER, resolve_paths, user_path
from saeffect.progress import SILENT, Log
from saeffect.sae.base import ARCHITECTURES, SaeConfig
from saeffect.sae.formats import load_sae, read_sae_config, sae_identity
from saeffect.sae.hub import is_sae_name, locate_sae
from saeffect.steering import check_names
from saeffect.study.results import Picture, run_figures, run_tables
from saeffect.study.texts import Arm, first_texts, study_rows
from saeffect.study.tokens import StudyTokens, TokenizerDifference, study_tokens

__all__ = ["Arm", "Study", "bundled_studies", "require_width"]

_BUNDLED_STUDIES = BUNDLED_FOLDER / "studies"
_MANIFEST = "manifest.json"  # what makes a folder a run directory


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A study file, read and validated. Paths in `config` are absolute, see `saeffect.paths.resolve_paths`."""

    config: StudyConfig
    source: Path

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a study file, the one in a run directory, or a bundled study (`bundled:smollm2-medical`).

        Paths are relative to the file's folder; in a bundled study, to the current folder.

        Raises:
            NotFound: No such file, or a path in it that exists only relative to the current folder.
            UnknownName: No such bundled study, or an unknown key in the file.
            BadFile: Not YAML, or not a mapping.
            ConfigError: A value is out of range, a repeated key, or an impossible path.
        """
        bundled, names = str(path).startswith(BUNDLED), [BUNDLED + name for name in bundled_studies()]
        if bundled and path not in names:
            raise unknown_name("bundled study", path, names)
        source = _BUNDLED_STUDIES / f"{str(path).removeprefix(BUNDLED)}.yaml" if bundled else user_path(path)
        if (source / _MANIFEST).is_file():
            source /= "study.yaml"
        # Paths in a bundled study are the user's; nothing is written into the package.
        folder = Path() if bundled else None
        raw = read_config_file(source, "study", relative_to=folder, fix=f"bundled studies: {', '.join(names)}.")
        if not isinstance(raw, dict):
            raise BadFile("a study file is a mapping of keys to values.", at=str(source))
        return cls._validate(raw, source)

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]:
        """The tables of the run from whose directory the study was opened, as `run_tables`; NotFound for others."""
        return run_tables(self._run)

    @property
    def figures(self) -> Mapping[str, Picture]:
        """The figures of the run from whose directory the study was opened, as `run_figures`; NotFound for others."""
        return run_figures(self._run)

    @property
    def _run(self) -> Path:
        if not (self.source.parent / _MANIFEST).is_file():
            fix = "run it, and open its run directory: Study.open('runs/<name>')."
            raise NotFound("a study has tables and figures when it has run.", at=str(self.source), fix=fix)
        return self.source.parent

    @classmethod
    def of(cls, config: StudyConfig | Mapping[str, Any], *, name: str = "study.yaml") -> Self:
        """A study from Python values, with the keys of a study file. Paths are relative to the current folder.

        `name` replaces the file name in messages. Errors as `open`.
        """
        values = config.model_dump(mode="json") if isinstance(config, StudyConfig) else dict(config)
        return cls._validate(resolve_paths(values, Path(), at=name), Path(name))

    @classmethod
    def _validate(cls, raw: Any, source: Path) -> Self:
        config = StudyConfig.read(raw, at=str(source))
        if config.steering is not None:
            with placed(f"{source}, steering"):
                check_names(config.steering)
        return cls(config, source)

    @functools.cached_property
    def arms(self) -> Mapping[str, Arm]:
        """The arms by name, opened on first use; only the last opened model stays in memory, or two small ones."""
        return _Arms(self)

    @functools.cached_property
    def residuals(self) -> Residuals:
        """Activations on the study's text, shared by arms of the same model."""
        return Residuals()

    @functools.cached_property
    def tokens(self) -> StudyTokens:
        """The tokenizer that all models of the study use: the control's."""
        models = {name: arm.model for name, arm in self.config.arms.items()}
        control, steering = self.control, self.config.steering
        prompts = (*steering.prompts, *steering.search_prompts) if steering is not None else ()
        return study_tokens(
            models,
            control,
            lambda: [*map(prompt_text, prompts), *first_texts(self.config.text)],
            lambda arm: self.at("arms", arm, "model"),
        )

    @functools.cached_property
    def reader(self) -> LanguageModel:
        """The study's tokenizer as a model without weights."""
        return LanguageModel(None, self.tokens.tokenizer, "control", prepend_bos=self.prepend_bos, chat=self.chat)

    @property
    def steering(self) -> SteeringConfig:
        """The section `steering`; for studies that have one."""
        assert self.config.steering is not None
        return self.config.steering

    @property
    def differences(self) -> Mapping[str, TokenizerDifference]:
        """By arm, how a model's own tokenizer differs from the control's."""
        return {} if self._one_tokenizer else self.tokens.differences

    @property
    def _one_tokenizer(self) -> bool:
        return len({(arm.model.path, arm.model.revision) for arm in self.config.arms.values()}) == 1

    @property
    def reference(self) -> str:
        """The argument for `open`: its path, or bundled:<name>."""
        return BUNDLED + self.source.stem if self.source.parent == _BUNDLED_STUDIES else str(self.source)

    def at(self, *keys: str) -> str:
        """A place in the study file, for error messages."""
        return f"{self.source.name}, {'.'.join(keys)}"

    def open_arm(self, name: str, log: Log = SILENT) -> Arm:
        """Load one arm's model and SAE; UnknownName for an unknown arm, SaeffectError if they do not load or fit."""
        arm, at = self.arm(name), self.at("arms", name, "sae")
        sae = load_sae(self.sae_folder(name), at=at)
        hook = self.hook(name)
        lm = self.open_model(name, log)
        parse_hook(hook, lm.n_layers, at=self.at("arms", name, "hook"))
        require_width(sae.cfg, hook_width(lm, hook), hook, lm.name, at=at)
        if sae.cfg.module_path is not None:
            require_module_output(lm, sae.cfg.module_path, at=at)
        return Arm(name, arm.role, lm, sae, hook)

    @property
    def has_saes(self) -> bool:
        """Whether the arms have SAEs: all of them do, or none."""
        return all(arm.sae is not None for arm in self.config.arms.values())

    @functools.cached_property
    def one_sae(self) -> bool:
        """Whether control and treatment have the same SAE, so that features correspond and need no matching."""
        return self.has_saes and len(set(map(self.sae_folder, self.pair))) == 1

    def sae_folder(self, name: str) -> Path:
        """Folder of an arm's SAE; errors as `resolve_sae`, ConfigError for a study without SAEs."""
        sae, at = self.arm(name).sae, self.at("arms", name, "sae")
        if sae is None:
            raise ConfigError("this study has no SAEs.", at=at, fix="give every arm one, such as sae: saes/base.")
        return self.resolve_sae(name, sae, at)

    def resolve_sae(self, name: str, sae: str, at: str) -> Path:
        """Folder of an SAE as named in the study file, fetched if it is on the hub (errors as `locate_sae`).

        NotFound, or UnknownName for an unknown bundled SAE.
        """
        if sae.startswith(BUNDLED):
            return bundled_path("saes", sae.removeprefix(BUNDLED), at=at)
        if is_sae_name(sae):
            return locate_sae(sae, at=at)
        if user_path(sae, at=at).is_file():
            read_sae_config(sae, at=at)  # which says what kind of file it is
        if not Path(sae).is_dir():
            train = f"train it: saeffect train-sae {shlex.quote(self.reference)} --arm {name}"
            fix = "paths are relative to the study file." if self.config.training is None else train
            as_written = os.path.relpath(sae, self.source.absolute().parent)
            if Path(as_written).is_dir():
                fix = f"paths are relative to the study file; the current folder does have {as_written!r}."
            raise NotFound(f"there is no SAE folder {sae!r}.", at=at, fix=fix)
        return Path(sae)

    def sae_config(self, name: str) -> SaeConfig:
        """An arm's cfg.json."""
        return read_sae_config(self.sae_folder(name), at=self.at("arms", name, "sae"))

    def hook(self, name: str) -> str:
        """Hook of an arm's SAE: from the study file, else from the SAE.

        ConfigError if neither names one, IncompatibleSae if they differ.
        """
        configured, recorded = self.arm(name).hook, self.sae_config(name).hook_name if self.has_saes else None
        configured = configured and (hook_of_module(configured) or configured)
        location = self.at("arms", name, "hook")
        if configured is None and recorded is None:
            fix = "set hook: blocks.<layer>.hook_resid_pre."
            message = (
                "the SAE's cfg.json names no hook." if self.has_saes else "there is no hook, nor an SAE to name it."
            )
            raise ConfigError(message, at=location, fix=fix)
        if configured is not None and recorded is not None and configured != recorded:
            raise IncompatibleSae(
                f"the study says {configured}, but the SAE was trained at {recorded}.",
                at=location,
                fix=f"set hook: {recorded}, or leave it out.",
            )
        return str(configured or recorded)

    @functools.cached_property
    def prepend_bos(self) -> bool | None:
        """Whether rows and prompts begin with BOS: from the study file, else the SAEs; None: the tokenizer's default.

        ConfigError if the SAEs contradict each other.
        """
        with placed(self.at("text")):
            return chat_prepends(resolve_prepend_bos(self.config.text.bos, self.bos_words), self.chat)

    @functools.cached_property
    def chat(self) -> ChatFormat | None:
        """The format of the study's conversations, see `StudyTokens.chat_format`; None if it has none."""
        template, at = self.config.text.chat_template, self.at("text", "chat_template")
        return self.tokens.chat_format(template, self.pair, at) if self.config.has_chats else None

    @functools.cached_property
    def bos_words(self) -> Mapping[str, Any]:
        """`prepend_bos` in the cfg.json of each arm's SAE."""
        arms = self.config.arms if self.has_saes else ()
        return {name: self.sae_config(name).metadata.get("prepend_bos") for name in arms}

    def rows(self) -> TokenRows:
        """The study's text as token rows; cached."""
        return self._rows

    @functools.cached_property
    def _rows(self) -> TokenRows:
        with placed(self.at("text")):
            return study_rows(self.config.text, lambda: self.open_model(self.control), prepend_bos=self.prepend_bos)

    @property
    def control(self) -> str:
        """Name of the control arm."""
        return self.ordered_arms()[0]

    @property
    def treatment(self) -> str:
        """Name of the treatment arm."""
        return self.ordered_arms()[-1]

    @property
    def pair(self) -> tuple[str, str]:
        """Names of the two arms that are compared: control, treatment."""
        return self.control, self.treatment

    def ordered_arms(self) -> list[str]:
        """Control, placebos, treatment: arms that share a model are neighbours, so it is loaded once."""
        roles = ("control", "placebo", "treatment")
        return sorted(self.config.arms, key=lambda name: roles.index(self.config.arms[name].role))

    @functools.cached_property
    def identities(self) -> Mapping[str, dict[str, str | None]]:
        """Hashes of every arm's model and SAE files, and its hook."""
        models: dict[ModelConfig, str] = {}
        identities: dict[str, dict[str, str | None]] = {}
        for name, arm in self.config.arms.items():
            if arm.model not in models:
                models[arm.model] = model_identity(arm.model, at=self.at("arms", name, "model"))
            device = resolve_device(arm.model.device)
            identities[name] = {
                "model": models[arm.model],
                "dtype": str(resolve_dtype(arm.model.dtype, device)),
                "device": device.type,
                **_placement_identity(arm.model),
                "sae": sae_identity(self.sae_folder(name)) if self.has_saes else "",
                "hook": self.hook(name),
            }
            if not self._one_tokenizer:
                identities[name]["tokens"] = str(self.tokens.identity)
        return identities

    @functools.cached_property
    def text_identity(self) -> str:
        """Hash of the study's text."""
        text = self.config.text
        if text.bundled is not None:
            content: Any = hash_folder(bundled_path("texts", text.bundled, at=self.at("text", "bundled")))
        else:
            # Files are hashed by content, so a study may move to another folder.
            content = [(s.name, s.field, source_identity(s)) for s in text.sources]
        chat = [] if self.chat is None else [self.chat.identity(), text.format, text.system, text.positions]
        return fingerprint([text.tokens, text.context_size, content, self.prepend_bos, *chat])

    def arm(self, name: str) -> ArmConfig:
        """The configuration of an arm; UnknownName if there is no such arm."""
        if name not in self.config.arms:
            raise unknown_name("arm", name, self.config.arms, at=str(self.source))
        return self.config.arms[name]

    def open_model(self, name: str, log: Log = SILENT) -> LanguageModel:
        """One arm's model alone; errors as `open_arm`."""
        model = self.arm(name).model
        if model not in self._loaded_models:
            # Drop the others if memory may not suffice.
            size = sum(p.nbytes for loaded in self._loaded_models.values() for p in loaded.model.parameters())
            if len(self._loaded_models) > 1 or size > SHARE_OF_A_MODEL * machine_memory():
                self._loaded_models.clear()
            lm = load_language_model(model, at=self.at("arms", name, "model"), log=log)
            lm = lm if self._one_tokenizer else self.tokens.used_by(lm)
            self._loaded_models[model] = dataclasses.replace(lm, prepend_bos=self.prepend_bos, chat=self.chat)
        return self._loaded_models[model]

    @functools.cached_property
    def _loaded_models(self) -> dict[ModelConfig, LanguageModel]:
        """The models in memory."""
        return {}


def bundled_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in _BUNDLED_STUDIES.glob("*.yaml"))


# A second model is kept in memory if the first takes at most this share. Changes the time, not the numbers.
SHARE_OF_A_MODEL = 1 / 6


@dataclasses.dataclass(frozen=True, eq=False)
class _Arms(Mapping[str, Arm]):
    study: Study

    def __getitem__(self, name: str) -> Arm:
        return self.study.open_arm(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.study.config.arms)

    def __len__(self) -> int:
        return len(self.study.config.arms)


def _placement_identity(model: ModelConfig) -> dict[str, str | None]:
    """Settings that change a model's numbers: quantisation, an unmerged adapter; empty by default."""
    unmerged = model.adapter is not None and (model.merge_adapter is False or model.device_map or model.quantize)
    return {
        **({} if model.quantize is None else {"quantize": model.quantize}),
        **({"adapter": "not merged"} if unmerged else {}),
    }


def require_width(sae: SaeConfig, width: int, hook: str, model: str, *, at: str) -> None:
    """Raise IncompatibleSae if the SAE's width differs from the model's, or it reads two models."""
    if sae.metadata.get("reads") or ARCHITECTURES[sae.architecture].sides:
        raise IncompatibleSae(
            "the SAE was trained on the activations of two models; an arm has one.",
            at=at,
            fix="choose an SAE of one model; see docs/crosscoder.md for those of two.",
        )
    if sae.d_in != width:
        trained = sae.metadata.get("model_name")
        raise IncompatibleSae(
            f"the SAE has d_in={sae.d_in}, but {hook} of {model} gives {width}.",
            at=at,
            fix="choose an SAE trained on this model" + (f", or set the model to {trained}." if trained else "."),
        )
