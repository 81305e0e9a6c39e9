"""The command line: parses arguments and dispatches to `commands/`, one module a verb; nothing else."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .errors import FewstepError, OutOfMemoryError, WriteError
from .places import REFUSALS, ROOM
from .values import printable, printable_json
from .version import __version__

EXIT_CODES = """exit codes: 0 ok, 2 usage, 3 something is missing (an extra, an engine, a file), 4 incompatible or
corrupt, 5 a numeric gate failed, 130 interrupted"""

VERBS = {
    "export": "make a bundle from a checkpoint",
    "build": "build a bundle's engines for this machine",
    "encode": "encode prompts once, for runs without the text encoder",
    "quantize": "put layers into fewer bits, as many as a budget of pictures allows",
    "run": "make images from a bundle",
    "grid": "one labelled picture over samplers, schedules, steps or seeds",
    "bench": "measure a bundle, beside other libraries if asked",
    "inspect": "say what a bundle, an engine or a picture is",
    "verify": "compare a bundle's engines with torch's stored reference",
    "memory": "say what each stage needs, and how many images fit at once",
    "samplers": "list samplers and schedules",
    "schedule": "show the rows of a sampler under a schedule",
    "swap": "replace a loaded bundle's weights by another's, or merge adapters into them",
    "engines": "list, show, verify or prune the engines in the store",
    "triton": "write a model repository for Triton Inference Server",
    "serve": "answer requests for images over HTTP",
    "demo": "make a picture with the embedded model",
    "completion": "print what has a shell complete commands and options",
}


MOST_IN_USAGE = 10


class _Parser(argparse.ArgumentParser):
    """argparse with the exit code that the contract names, and one line for what is wrong instead of all options."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"See: {self.prog} --help")

    def unknown(self, arguments: Sequence[str]) -> UsageError:
        """What to say of arguments that nothing takes, with the nearest flags."""
        flag = next((a.partition("=")[0] for a in arguments if a.startswith("--")), None)
        near = difflib.get_close_matches(flag, self._option_string_actions, n=3, cutoff=0.6) if flag else []
        expected = f"one like {', '.join(near)}" if near else ""
        remedy = f"See: {self.prog} --help"
        return UsageError(f"unrecognized arguments: {' '.join(arguments)}", expected=expected, remedy=remedy)


class UsageError(FewstepError):
    """The command line does not parse."""

    exit_code = 2


def make_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the arguments of `verb` are defined (all of them when it is `None`), so that help is quick."""
    parser = _Parser(prog="fewstep", description="Few-step diffusion: export, build, run.", epilog=EXIT_CODES)
    parser.set_defaults(whole_parser=make_parser)
    parser.add_argument("--version", action="version", version=f"fewstep {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, summary in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary.capitalize() + ".", epilog=EXIT_CODES)
        sub.set_defaults(parser=sub)
        sub.add_argument("--json", action="store_true", help="data as JSON on stdout, progress on stderr")
        if verb in (None, name):
            importlib.import_module(f".commands.{name}", __package__).define(sub)
            sub.usage = sub.usage or _short_usage(sub)
    return parser


def _short_usage(parser: argparse.ArgumentParser) -> str | None:
    """A line for verbs of many options, which their help lists in groups; `None` where argparse's own is short."""
    flagged, named = ([a for a in parser._actions if bool(a.option_strings) is f] for f in (True, False))
    if len(flagged) <= MOST_IN_USAGE or any(isinstance(a, argparse._SubParsersAction) for a in named):
        return None
    needed = [f"{a.option_strings[-1]} {a.metavar or a.dest.upper()}" for a in flagged if a.required]
    words = [f"[{a.dest}]" if a.nargs == "?" else a.dest for a in named]
    return " ".join(["%(prog)s", *words, *needed, "[options]"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in arguments if a in VERBS), "")
    try:
        options, rest = make_parser(verb).parse_known_args(arguments)
        if rest:
            raise options.parser.unknown(rest)
    except UsageError as error:
        return _report(error, as_json="--json" in arguments)
    try:
        return int(importlib.import_module(f".commands.{options.verb}", __package__).execute(options))
    except FewstepError as error:
        return _report(error, as_json=options.json)
    except MemoryError as error:
        remedy = "Ask for less at once; `fewstep memory BUNDLE` says what fits."
        return _report(OutOfMemoryError(str(error) or "memory does not suffice", remedy=remedy), as_json=options.json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        words = REFUSALS.get(error.errno or 0) if error.errno in ROOM else None
        return _report(WriteError(f"{words or error.strerror or error}{where}"), as_json=options.json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _report(error: FewstepError, *, as_json: bool) -> int:
    if as_json:
        parts = {"type": type(error).__name__, "found": error.found, "expected": error.expected, "remedy": error.remedy}
        print(printable_json({"error": parts, "exit_code": error.exit_code}, sys.stdout.encoding))
    print(printable(f"fewstep: {error}", sys.stderr.encoding), file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
