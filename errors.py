"""Every way in which fewstep refuses: one type per kind, each with the exit code that the command line gives it.

A message has three parts: what was found, what was expected, and what mends it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewstepError(Exception):
    """Base of all errors that fewstep raises on purpose.

    `found` says what is wrong, `expected` what would have been right, `remedy` the argument or command that mends it.
    """

    exit_code = 1

    def __init__(self, found: str, *, expected: str = "", remedy: str = "") -> None:
        self.found, self.expected, self.remedy = found, expected, remedy
        parts = [found]
        if expected:
            parts.append(f"expected {expected}")
        text = "; ".join(parts)
        super().__init__(f"{text}. {remedy}" if remedy else text)


class ArgumentError(FewstepError):
    """An argument that cannot be used: wrong range, wrong type, or impossible beside another one."""

    exit_code = 2


class UnknownNameError(ArgumentError):
    """A name that no table holds; the message lists the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, remedy: str = "") -> None:
        names = sorted(set(known))
        folded = {n.casefold(): n for n in names}
        near = [folded[n] for n in difflib.get_close_matches(str(name).casefold(), folded, n=4, cutoff=0.3)]
        self.kind, self.name, self.near = kind, name, tuple(near)
        expected = f"one like {', '.join(near)}" if near else f"one of {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}", expected=expected, remedy=remedy)


class UnsupportedError(ArgumentError):
    """Something that exists and that fewstep does not do; refused by its name."""

    exit_code = 4


class MissingError(FewstepError):
    """A file, folder, engine or weight that is not there."""

    exit_code = 3


class MissingExtraError(MissingError):
    """An optional dependency that is not installed."""

    def __init__(self, module: str, extra: str, *, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the module {module!r}, which is not installed",
            remedy=f"Install it with: pip install 'fewstep[{extra}]'",
        )


class CorruptError(FewstepError):
    """A file whose bytes are not what its format or its manifest says."""

    exit_code = 4


class WriteError(FewstepError):
    """A place where something is to be written and cannot be."""

    exit_code = 3


class UnsafeFileError(FewstepError):
    """A file that is refused for what it could do: pickles, links, paths that leave their folder."""

    exit_code = 4


class PickledFileError(UnsafeFileError):
    """Weights in a pickle, which can run code when it is loaded."""

    def __init__(self, name: str, *, expected: str = "a .safetensors file") -> None:
        super().__init__(
            f"{name} is a pickle, which can run code when it is loaded",
            expected=expected,
            remedy="Take its .safetensors file where there is one; else docs/checkpoints.md says how to convert it.",
        )


class MismatchError(FewstepError):
    """An engine or bundle made for something else: another machine, version, shape or graph."""

    exit_code = 4


class GateError(FewstepError):
    """A numeric comparison with the reference that came out above its limit."""

    exit_code = 5


class NonFiniteError(FewstepError):
    """NaN or infinity in a latent or in an image."""

    exit_code = 5


class BlackImageError(FewstepError):
    """An image without a single lit pixel, the sign of an overflow in the decoder."""

    exit_code = 5


class OutOfMemoryError(FewstepError):
    """Memory that does not suffice, of the host or of a device; the message says what would fit."""

    exit_code = 3


class CancelledError(FewstepError):
    """The caller or the user stopped the work."""

    exit_code = 130


class QueueFullError(FewstepError):
    """A server that has as much work as it takes; `retry_after_s` says when there should be room again."""

    def __init__(self, found: str, *, retry_after_s: float, expected: str = "", remedy: str = "") -> None:
        self.retry_after_s = retry_after_s
        super().__init__(found, expected=expected, remedy=remedy)


class DeadlineError(FewstepError):
    """A request that was not finished by its deadline."""


class UnavailableError(FewstepError):
    """A server that takes no requests: it is starting, draining, closed, or its engine has failed."""


class EngineFailedError(UnavailableError):
    """An engine that raised during an evaluation, or did not come back from one."""
