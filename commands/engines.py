"""`fewstep engines list|show|verify|prune`: the engines of this user, and the bundles that the cache keeps."""

from __future__ import annotations

import argparse
import time

from ..errors import ArgumentError
from .common import emit


def define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "show", "verify", "prune"))
    parser.add_argument(
        "name",
        nargs="*",
        help="an engine's name, or how it begins (default: all; prune: by its rules; list, prune: a kept bundle's too)",
    )
    parser.add_argument("--unused-days", type=float, help="prune: those not opened for so many days")
    parser.add_argument("--keep-mib", type=int, help="prune: the longest unused until the rest fits")
    parser.add_argument("--everything", action="store_true", help="prune: all of them")
    parser.add_argument("--dry-run", action="store_true", help="prune: only say what would go")


def execute(options: argparse.Namespace) -> int:
    given = [
        o for o in ("unused_days", "keep_mib", "everything", "dry_run") if getattr(options, o) not in (None, False)
    ]
    if given and options.action != "prune":
        raise ArgumentError(
            f"--{given[0].replace('_', '-')} for {options.action}", expected="prune", remedy="Leave it out."
        )
    rules = [o for o in given if o != "dry_run"]
    if rules and options.name:
        raise ArgumentError(f"--{rules[0].replace('_', '-')} beside names", expected="names, or rules that choose")
    return {"list": _list, "show": _show, "verify": _verify, "prune": _prune}[options.action](options)


def _list(options: argparse.Namespace) -> int:
    from ..engines import default_store
    from ..engines.inventory import list_engines
    from ..engines.kept import list_kept

    bundles = [k for k in list_kept() if not options.name or k.name.startswith(tuple(options.name))]
    named = [n for n in options.name if not any(k.name.startswith(n) for k in bundles)]
    engines = list_engines(default_store(), named) if named or not options.name else []
    data = [{"name": e.name, "bytes": e.length, "used": e.used, "state": e.state, "reason": e.reason} for e in engines]
    lines = []
    for e in engines:
        lines.append(f"{e.name}  {e.length / 1e6:9.2f} MB  used {_day(e.used)}  {e.state} {e.reason}")
    kept = [{"name": k.name, "bytes": k.length, "used": k.used, "reason": k.reason} for k in bundles]
    lines = lines or ["no engines"]
    lines += [f"{k.name}  {k.length / 1e6:9.2f} MB  used {_day(k.used)}  a bundle {k.reason}" for k in bundles]
    emit(options, {"engines": data, "bundles": kept}, "\n".join(lines))
    return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _show(options: argparse.Namespace) -> int:
    from ..engines import default_store
    from ..engines.inventory import show_engine

    if len(options.name) != 1:
        raise ArgumentError(
            f"{len(options.name)} names are given",
            expected="the name of one engine",
            remedy="List them with: fewstep engines list",
        )
    entry = show_engine(default_store(), options.name[0])
    data = {
        "name": entry.name,
        "key": entry.key.to_json(),
        "bytes": entry.length,
        "built": entry.built,
        "facts": entry.facts,
        "gate": entry.gate,
    }
    emit(options, data, "\n".join(f"{k}: {v}" for k, v in data.items()))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ..engines import default_store
    from ..engines.inventory import verify_engines

    verdicts = verify_engines(default_store(), options.name)
    data = {n: None if e is None else str(e) for n, e in verdicts.items()}
    digest = default_store().digest()
    lines = [f"{n}  {e or 'whole'}" for n, e in data.items()] or ["no engines"]
    emit(options, {"engines": data, "store_digest": digest}, "\n".join([*lines, f"digest of the store: {digest}"]))
    return max((e.exit_code for e in verdicts.values() if e is not None), default=0)


def _prune(options: argparse.Namespace) -> int:
    from ..engines import default_store
    from ..engines.inventory import prune_engines
    from ..engines.kept import list_kept

    keep = None if options.keep_mib is None else options.keep_mib * 2**20
    gone = prune_engines(
        default_store(),
        options.name,
        unused_days=options.unused_days,
        keep_bytes=keep,
        everything=options.everything,
        dry_run=options.dry_run,
        kept=list_kept(),
    )
    data = [{"name": p.name, "bytes": p.length, "reason": p.reason} for p in gone]
    verb = "would delete" if options.dry_run else "deleted"
    emit(
        options,
        {"pruned": data, "dry_run": options.dry_run},
        "\n".join(f"{verb} {p.name}  {p.length / 1e6:.2f} MB  {p.reason}" for p in gone) or "nothing to delete",
    )
    return 0
