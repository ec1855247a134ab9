"""What a tokenizer does, measured instead of read off its class: which ids it has, their texts, how it cuts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "continued",
    "known_tokens",
    "ordinary_token",
    "special_tokens",
    "token_texts",
    "tokenizer_identity",
    "tokenizer_trouble",
]

_SENTENCEPIECE = ("sentencepiece", "google.protobuf")  # packages that read a tokenizer.model


def known_tokens(tokenizer: Any) -> dict[int, str]:
    """Every id that the tokenizer knows, with the token in its own notation, in the order of the ids.

    The ids may have holes, so the highest is not the number of tokens less one.
    """
    tokens = {int(i): token for token, i in tokenizer.get_vocab().items()}
    return {i: tokens[i] for i in sorted(tokens)}


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids that stand for no text: beginnings and ends of texts, marks of a chat, masks."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def ordinary_token(tokenizer: Any) -> int | None:
    """An id with a text of its own, to decode others behind: that of an "a" if there is one."""
    special = special_tokens(tokenizer)
    ids = (*tokenizer.encode("a", add_special_tokens=False)[-1:], *known_tokens(tokenizer))
    return next((i for i in ids if i not in special), None)


def continued(
    tokenizer: Any, texts: Iterable[Sequence[int]], before: int | None, *, skip_special_tokens: bool = False
) -> list[str]:
    """What each sequence of ids adds to the text before it.

    Decoders of SentencePiece drop the space at the very beginning of what they decode, so ids are decoded behind
    another token, whose text is taken off again.

    Args:
        tokenizer: Decodes.
        texts: Sequences of ids.
        before: The other token, see `ordinary_token`.
        skip_special_tokens: Whether special tokens are left out.
    """
    how = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    first = [] if before is None else [before]
    head = str(tokenizer.decode(first, **how)) if first else ""
    found = []
    for ids in texts:
        text = str(tokenizer.decode([*first, *ids], **how))
        found.append(text[len(head) :] if text.startswith(head) else str(tokenizer.decode(list(ids), **how)))
    return found


def token_texts(tokenizer: Any, n: int) -> list[str]:
    """The text of each id below `n`: a leading space stays; half a character is U+FFFD; `<unused i>` in the holes."""
    known = [i for i in known_tokens(tokenizer) if i < n]
    texts = dict(zip(known, continued(tokenizer, ([i] for i in known), ordinary_token(tokenizer)), strict=True))
    return [texts.get(i, f"<unused {i}>") for i in range(n)]


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 of the tokens, their ids, and the rules by which text is cut into them."""
    digest = hashlib.sha256()
    for i, token in known_tokens(tokenizer).items():
        digest.update(f"{i}\0{token}\0".encode("utf-8", "surrogatepass"))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules["model"].pop("vocab", None)
        how = {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "model")}
        digest.update(json.dumps(how, sort_keys=True).encode())
    return digest.hexdigest()


def tokenizer_trouble(place: Path | str, said: str) -> tuple[str, str]:
    """Why transformers cannot load a tokenizer, and what to do about it.

    Args:
        place: The folder, or a hub id.
        said: What transformers says; it names the last of several things that it tried.
    """
    why = said.strip().splitlines()[0] if said.strip() else "no reason is given"
    if "trust_remote_code" in said:
        return why, "set trust_remote_code: true if you trust the code that comes with the model."
    there = {file.name for file in place.iterdir()} if isinstance(place, Path) and place.is_dir() else set()
    alone = any(name.endswith(".model") for name in there) and "tokenizer.json" not in there
    if alone or any(name in said.lower() for name in ("sentencepiece", "tiktoken", "protobuf")):
        if not all(map(_installed, _SENTENCEPIECE)):
            why = "it is a tokenizer.model alone, and sentencepiece or protobuf, which read it, are not installed"
            return why, "pip install 'saeffect[sentencepiece]', or put the base model's tokenizer.json into the folder."
        return why, "tokenizer.model is no SentencePiece model; put the base model's tokenizer.json into the folder."
    if isinstance(place, Path):
        return why, "save the tokenizer beside the model: tokenizer.save_pretrained(folder)."
    return why, "check the name and your connection, or save the tokenizer beside the model."


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package around it
        return False
