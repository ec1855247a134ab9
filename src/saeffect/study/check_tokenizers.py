"""What is checked of a study's tokenizers: that all models have the tokens that its texts and prompts are cut into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from saeffect.errors import ConfigError, SaeffectError
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.loading import ModelShape, locate_model, model_shape
from saeffect.lm.tokens import find_bos_id, known_tokens, separator_id, with_bos
from saeffect.study.study import Study
from saeffect.study.texts import study_rows
from saeffect.study.training import arm_recipe

__all__ = ["check_prompt", "check_tokenizers"]


def check_tokenizers(study: Study) -> list[str]:
    """Compare the tokenizers of the arms, and the text with what the models can read.

    Returns:
        What to tell.

    Raises:
        SaeffectError: A tokenizer cannot be loaded, or has other tokens than the control's.
        ConfigError: A row of text is longer than a model's positions, or holds a token without an embedding, or no
            token can stand between documents.
    """
    tokens = study.tokens
    lines = [f"arm {arm}'s own tokenizer {one.words()}" for arm, one in tokens.differences.items()]
    if tokens.differences:
        n = len(known_tokens(tokens.tokenizer) if tokens.shared is None else tokens.shared)
        lines.append(f"every arm reads the control's tokens; top tokens are ranked over the {n:,} that all have")
    else:
        lines.append("every arm has the same tokens and cuts text alike")
    if study.config.text.sources:
        try:
            separator_id(tokens.tokenizer)
        except SaeffectError as error:
            raise error.placed(study.at("text", "sources")) from None
    shapes = _shapes(study)
    _check_context(study, shapes)
    return lines + _check_embedded(study, shapes)


def check_prompt(study: Study, key: str, prompt: str, ids: Sequence[int]) -> None:
    """Whether there are positions to steer and to write at: the steer stage would find out after all the others.

    Args:
        study: The study.
        key: "prompts" or "search_prompts".
        prompt: One of them.
        ids: Its tokens; a BOS in front of them is neither steered nor enough of a prompt.

    Raises:
        ConfigError: There are none, or not enough, or a token has no embedding.
    """
    steering, at = study.config.steering, study.at("steering", key)
    bos = find_bos_id(study.tokens.tokenizer, study.prepend_bos)
    ids = with_bos(ids, bos)
    n_own = len(ids) - (bos is not None)
    if n_own == 0:
        raise ConfigError(
            f"the prompt {prompt!r} has no tokens; expected at least one.",
            at=at,
            fix="write something, or leave it out.",
        )
    if n_own == 1 and steering is not None and steering.positions == "prompt":
        raise ConfigError(
            f"the prompt {prompt!r} is one token, and positions: prompt steers at all of its tokens but the last;"
            " expected at least two tokens.",
            at=at,
            fix="use a longer prompt, or positions: all or generated.",
        )
    shapes = _shapes(study)
    longest = len(ids) + (steering.max_new_tokens if steering is not None else 0)
    positions = min((one.n_positions for one in shapes.values() if one.n_positions), default=None)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"the prompt {prompt[:40]!r} and its text come to {longest:,} tokens, but the model takes {positions:,}.",
            at=at,
            fix="use a shorter prompt, or fewer max_new_tokens.",
        )
    for arm, shape in shapes.items():
        _refuse_unembedded(study, arm, shape, ids, f"the prompt {prompt[:40]!r}", at)


def _shapes(study: Study) -> dict[str, ModelShape]:
    """By arm, where a model's config.json tells."""
    shapes = {name: model_shape(locate_model(arm.model)) for name, arm in study.config.arms.items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _check_context(study: Study, shapes: dict[str, ModelShape]) -> None:
    """Refuse rows, of the study's text or of the SAEs' training, that are longer than a model's positions."""
    for arm, shape in shapes.items():
        wanted = {"text": study.config.text.context_size} if study.config.text.sources else {}
        if study.config.training is not None:
            wanted["training"] = arm_recipe(study, arm).context_size
        for section, size in wanted.items():
            if shape.n_positions and size > shape.n_positions:
                raise ConfigError(
                    f"rows of text have {size:,} tokens, but the model of {arm} takes {shape.n_positions:,}.",
                    at=study.at(section, "context_size"),
                    fix=f"set context_size to {shape.n_positions} or less.",
                )


def _check_embedded(study: Study, shapes: dict[str, ModelShape]) -> list[str]:
    """Tokens that a model has no embedding for are refused where the text holds one, else told."""
    known = known_tokens(study.tokens.tokenizer)
    short = {arm: one for arm, one in shapes.items() if one.d_vocab and max(known) >= one.d_vocab}
    if not short:
        return []
    lm = LanguageModel(None, study.tokens.tokenizer, "control", prepend_bos=study.prepend_bos)
    rows = study_rows(study.config.text, lambda: lm, prepend_bos=study.prepend_bos)
    for arm, shape in short.items():
        _refuse_unembedded(study, arm, shape, rows.ids.flatten().tolist(), "the text", study.at("text"))
    arm, shape = next(iter(short.items()))
    beyond = [token for i, token in known.items() if i >= (shape.d_vocab or 0)]
    return [f"{_shown(beyond)} without embedding in the model of {arm} ({shape.d_vocab:,} rows); no text has them"]


def _refuse_unembedded(study: Study, arm: str, shape: ModelShape, ids: Iterable[int], what: str, at: str) -> None:
    highest = max(ids, default=0)
    if shape.d_vocab and highest >= shape.d_vocab:
        token = known_tokens(study.tokens.tokenizer).get(highest, "")
        raise ConfigError(
            f"{what} holds the token {token!r} (id {highest:,}), but the embedding of {arm}'s model has"
            f" {shape.d_vocab:,} rows.",
            at=at,
            fix="take the tokenizer that was saved with the model, or resize the model's embedding and save it.",
        )


def _shown(tokens: list[str]) -> str:
    return f"{len(tokens):,} tokens of the tokenizer ({', '.join(tokens[:3])}{', ...' if len(tokens) > 3 else ''}) are"
