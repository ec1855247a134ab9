"""Every error that a user can cause, in one tree.

    SaeffectError
    ├── ConfigError            a study or training file says something impossible
    │   └── UnknownName        a name that is not one of the valid ones (they are listed)
    ├── NotFound               a file, folder, model or bundled artifact is not there
    ├── Unreachable            a download is needed and no source answers
    ├── BadFile                a file is there but truncated, malformed, or holds NaN
    ├── ShapeMismatch          two arrays that must fit do not
    ├── IncompatibleSae        an SAE that cannot belong to this model and hook
    ├── IncompatibleModels     two arms that cannot be compared (another tokenizer, say)
    ├── EmptySelection         nothing is left to study: no words, no features, no text
    ├── InUse                  another process is writing to the same folder
    ├── Undefined              a statistic that has no value for these data
    └── Interrupted            stopped by the user; the message says how to resume

Each message says what is wrong and what was expected; `at` says where, `fix` what to do.
"""

# ruff: noqa: N818 - errors are named after the problem, without a suffix
from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

__all__ = [
    "BadFile",
    "ConfigError",
    "EmptySelection",
    "IncompatibleModels",
    "IncompatibleSae",
    "InUse",
    "Interrupted",
    "NotFound",
    "SaeffectError",
    "ShapeMismatch",
    "Undefined",
    "UnknownName",
    "Unreachable",
    "first_line",
    "placed",
    "unknown_name",
]


class SaeffectError(Exception):
    """Base of all errors below; `at` is a file, a key of the study file, or an argument.

    Example:
        >>> print(NotFound("no folder 'sae'.", at="arms.control.sae", fix="train one."))
        NotFound: no folder 'sae'.
          at:  arms.control.sae
          fix: train one.
    """

    exit_code = 2

    def __init__(self, message: str, *, at: str | None = None, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.at = at
        self.fix = fix

    def __str__(self) -> str:
        lines = [f"{type(self).__name__}: {self.message}"]
        if self.at:
            lines.append(f"  at:  {self.at}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def placed(self, at: str) -> SaeffectError:
        """The same error, with `at` in front of its place, if that does not begin with the same file."""
        if not (self.at or "").startswith(f"{at.partition(', ')[0]}, "):
            self.at = f"{at}, {self.at}" if self.at else at
        return self


class ConfigError(SaeffectError):
    """A study or training file says something impossible."""


class UnknownName(ConfigError):
    """A name that is not among the valid ones."""


class NotFound(SaeffectError):
    """A file, folder, model or bundled artifact is not there."""


class Unreachable(SaeffectError):
    """A download is needed and no source answers."""


class BadFile(SaeffectError):
    """A file is there but truncated, malformed, or holds values that cannot be used."""


class ShapeMismatch(SaeffectError):
    """Two arrays that must fit do not."""


class IncompatibleSae(SaeffectError):
    """An SAE that cannot belong to this model and hook."""


class IncompatibleModels(SaeffectError):
    """Two arms that cannot be compared."""


class EmptySelection(SaeffectError):
    """Nothing is left to study."""


class InUse(SaeffectError):
    """Another process is writing to the same folder."""


class Undefined(SaeffectError):
    """A statistic that has no value for these data."""


class Interrupted(SaeffectError):
    """Stopped by the user, or (`by_another`) by the end of another process; the message says how to resume."""

    exit_code = 130

    def __init__(
        self, message: str, *, at: str | None = None, fix: str | None = None, by_another: bool = False
    ) -> None:
        super().__init__(message, at=at, fix=fix)
        self.by_another = by_another


def unknown_name(kind: str, name: object, valid: Iterable[str], *, at: str | None = None) -> UnknownName:
    """An `UnknownName` that lists the valid names and suggests a similar one.

    Example:
        >>> print(unknown_name("projection", "cosin", ["dot", "cosine"]))
        UnknownName: there is no projection 'cosin'; valid: cosine, dot.
          fix: did you mean 'cosine'?
    """
    names = sorted(valid)
    near = difflib.get_close_matches(str(name), names, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(names) or '(none)'}."
    return UnknownName(f"there is no {kind} {str(name)!r}; valid: {', '.join(names) or '(none)'}.", at=at, fix=fix)


@contextlib.contextmanager
def placed(at: str) -> Iterator[None]:
    """Put `at` in front of the place of an error that leaves the block.

    Example:
        >>> with placed("study.yaml"):
        ...     raise NotFound("no folder 'sae'.", at="arms.control.sae")
        Traceback (most recent call last):
        saeffect.errors.NotFound: NotFound: no folder 'sae'.
          at:  study.yaml, arms.control.sae
    """
    try:
        yield
    except SaeffectError as error:
        raise error.placed(at) from None


def first_line(error: BaseException) -> str:
    """First line of another library's error, with the second where it ends in a colon; its class name if it is empty.

    Example:
        >>> first_line(KeyError()), first_line(OSError("no such file\\nand more")), first_line(OSError("bad:\\n size"))
        ('KeyError', 'no such file', 'bad: size')
    """
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first
