"""What fewstep tells its users to do can be done: commands, flags, arguments, extras and targets in its texts exist.

Texts are read from the sources, so that errors which no test provokes are judged too.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from commandline import HOLE, ROOT, flag_action, make_targets, usage_error
from fewstep.cli import VERBS
from fewstep.engines import backend_names, find
from fewstep.export.embedded import embedded_bundle
from fewstep.runtime.call import RECORDED, Call
from fewstep.runtime.pictures.parameters import command_line
from fewstep.schedules.solvers.registry import SAMPLERS
from fewstep.schedules.spacing import SPACINGS
from fewstep.serving.ray_serve import Replicas

ROOMS = ("families", "weights", "schedules", "engines", "runtime", "serving", "export", "commands", "bench")
FILES = [*sorted(ROOT.glob("*.py")), *(p for r in ROOMS for p in sorted((ROOT / r).rglob("*.py")))]
IMPERATIVES = {"export", "build", "run", "verify", "serve", "bench", "inspect"}
"""Verbs of the command line that are English verbs too: a clause that has one speaks of that command."""
FOREIGN = {"--no-validation": "optimum's exporter"}
"""Flags of other programs that texts name."""
PUBLIC = ("fewstep", *(f"fewstep.{r}" for r in ("families", "schedules", "engines", "runtime", "serving", "export")))

COMMAND = re.compile(r"(?<![\w.])fewstep ([a-z]+)([^`;,()\n]*)")
LEADS_IN = re.compile(r"`$|\b(?:with|it|them|one|see): $", re.IGNORECASE)
FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*)(?:[ =](\w[\w.:-]*\w|\w))?")
CLAUSE = re.compile(r"[.;,:] |\bor (?=[a-z]+ )")
ARGUMENT = re.compile(r"(?<![\w.=-])([a-z_][a-z0-9_]*)=(?!=)")


@dataclasses.dataclass(frozen=True)
class Text:
    """One text of the sources: what it says, where, and whether an error says it."""

    words: str
    file: Path
    line: int
    of_error: bool

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def wordings(node: ast.expr) -> list[str]:
    """All that an expression can say: conditions taken both ways, and a hole for what is only known at run time."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp():
            return [*wordings(node.body), *wordings(node.orelse)]
        case ast.BoolOp():
            return [w for value in node.values for w in wordings(value)]
        case ast.BinOp(op=ast.Add()):
            return ["".join(pair) for pair in itertools.product(wordings(node.left), wordings(node.right))]
        case ast.JoinedStr():
            return ["".join(parts) for parts in itertools.product(*map(wordings, node.values))]
        case ast.FormattedValue():
            return wordings(node.value)
        case ast.Name() if node.id in constants():
            return [constants()[node.id]]
    return [HOLE]


@functools.cache
def constants() -> dict[str, str]:
    """The texts that modules give a name, like `REBUILD`."""
    named: dict[str, str] = {}
    for node in (n for p in FILES for n in ast.parse(p.read_text(encoding="utf-8")).body):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))) if " " in text:
                named[name] = text
    return named


def texts_of(tree: ast.Module, file: Path) -> Iterator[Text]:
    """Every text of a file once, whole: not the parts of a joined one."""

    def visit(node: ast.AST, of_error: bool) -> Iterator[Text]:
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of_error = called.endswith("Error")
        elif isinstance(node, ast.keyword):
            of_error = of_error or node.arg in {"remedy", "expected", "hint"}
        elif isinstance(node, ast.Assign):
            of_error = any(
                n in ast.unparse(t).lower() for t in node.targets for n in ("remedy", "hint", "again", "rebuild")
            )
        if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
            variants = [w for w in wordings(node) if w.strip(HOLE)]
            yield from (Text(w, file, node.lineno, of_error) for w in variants)
            if variants:
                return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, of_error)

    yield from visit(tree, of_error=False)


@functools.cache
def texts() -> tuple[Text, ...]:
    return tuple(t for p in FILES for t in texts_of(ast.parse(p.read_text(encoding="utf-8")), p))


def command_faults(words: str) -> list[str]:
    """What is wrong with each `fewstep VERB ...`. A verb alone is a name; a word after it that is none ends prose."""
    faults = []
    for match in COMMAND.finditer(words):
        verb, rest = match[1], re.split(r"\.(?:\s|$)|: | \(", match[2])[0].strip()
        quoted = bool(LEADS_IN.search(words[: match.start()]))
        if verb not in VERBS:
            faults += [f"`fewstep {verb}` is no command"] * quoted
        elif rest and (quoted or "--" in rest):
            first, *others = rest.split(" ")[0].split("|")
            tail = shlex.split(rest)[1:]
            for word in (first, *others):
                reason = usage_error([verb, word, *tail])
                faults += [f"`fewstep {verb} {rest}`: {reason}"] * bool(reason)
    return faults


def flag_faults(words: str, verbs: Iterable[str], own: Iterable[str] = ()) -> list[str]:
    """What is wrong with each `--flag`: no verb takes it, or not the one its clause names, or not with that value."""
    faults = []
    for clause in CLAUSE.split(words):
        named = set(re.findall(r"\w+", clause.lower())) & IMPERATIVES
        named |= {m[1] for m in COMMAND.finditer(clause)} & VERBS.keys()
        for flag, value in FLAG.findall(clause):
            if flag in FOREIGN or flag in own:
                continue
            actions = [a for v in named or verbs if (a := flag_action(flag, v)) is not None]
            if not actions:
                faults.append(f"{flag} is no flag of {' or '.join(sorted(named or verbs))}")
            elif value and not any(admits(a, value) for a in actions):
                faults.append(f"{flag} does not take {value}")
    return faults


def admits(action, value: str) -> bool:
    """Whether a flag takes the word after it; one that takes a list of names, or none at all, takes any."""
    return action.nargs == 0 or action.choices is None or value in action.choices


def own_flags(file: Path) -> set[str]:
    """The flags of a script that has a parser of its own."""
    source = file.read_text(encoding="utf-8")
    return set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", source)) if "ArgumentParser(" in source else set()


def spoken_of(file: Path) -> Iterable[str]:
    """The verbs whose flags a file's texts may name: a command's module speaks of its own."""
    return [file.stem] if file.parent.name == "commands" and file.stem in VERBS else VERBS


def test_every_command_in_a_text_parses() -> None:
    faults = [f"{t.place}: {f}" for t in texts() for f in command_faults(t.words)]
    assert not faults, "\n".join(faults)
    assert sum(bool(COMMAND.search(t.words)) for t in texts() if t.of_error) > 15, "the commands are not seen"


def test_every_flag_in_a_text_exists() -> None:
    prose = [t for t in texts() if " " in t.words.strip() and "--" in t.words]
    faults = [f"{t.place}: {f}" for t in prose for f in flag_faults(t.words, spoken_of(t.file), own_flags(t.file))]
    assert not faults, "\n".join(faults)
    assert len(prose) > 40, "the flags are not seen"


@functools.cache
def public_parameters() -> frozenset[str]:
    """The parameters of public callables, of methods of public classes, and the options that samplers pass on."""
    names = {"last_sigma"}.union(*(s.options for s in SAMPLERS.values()))
    spacings = [f for s in SPACINGS.values() if (f := s.timesteps or s.sigmas) is not None]
    names |= {n for f in spacings for n in inspect.signature(f).parameters}
    names |= {n for s in SPACINGS.values() for n in s.options}
    names |= set(inspect.signature(Replicas).parameters)
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            thing = getattr(module, name)
            own = vars(thing).items() if inspect.isclass(thing) else ()
            methods = [m for n, m in own if inspect.isfunction(m) and (n[0] != "_" or n == "__call__")]
            for function in (thing, *methods):
                if callable(function):
                    names |= set(inspect.signature(function).parameters)
    return frozenset(names)


def config_keys() -> set[str]:
    """The fields of diffusers' configurations that are read, which errors name as that library does."""
    sources = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "schedules" / "compat").glob("*.py"))]
    return set(re.findall(r"config\.get\(\"(\w+)\"", "".join(sources)))


def argument_faults(words: str) -> list[str]:
    known = public_parameters() | config_keys()
    return [f"nothing takes {n}=" for n in ARGUMENT.findall(words) if n not in known]


def test_every_argument_in_an_error_is_one() -> None:
    errors = [t for t in texts() if t.of_error]
    faults = [f"{t.place}: {f}" for t in errors for f in argument_faults(t.words)]
    assert not faults, "\n".join(faults)
    assert sum(bool(ARGUMENT.search(t.words)) for t in errors) > 15, "the arguments are not seen"


def test_every_extra_that_an_error_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "MissingExtraError" and len(node.args) == 2:
                named |= {w for w in wordings(node.args[1]) if w != HOLE}
    named |= {e for t in texts() for m in re.findall(r"fewstep\[([\w,-]+)\]", t.words) for e in m.split(",")}
    assert len(named) > 5, "the extras are not seen"
    assert named <= extras.keys()


def test_every_environment_variable_in_a_text_is_read() -> None:
    names = [(t, n) for t in texts() for n in re.findall(r"\bFEWSTEP_[A-Z_]+", t.words)]
    read = {t.words for t in texts()}
    assert [f"{t.place}: nothing reads {n}" for t, n in names if n not in read] == []
    assert len({n for _, n in names}) > 2, "the variables are not seen"


def test_every_make_target_in_a_text_exists() -> None:
    named = [(t, n) for t in texts() for n in re.findall(r"(?:`|with: )make ([a-z][a-z0-9-]*)", t.words)]
    assert [f"{t.place}: make {n}" for t, n in named if n not in make_targets()] == []
    assert named, "the targets are not seen"


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ('"Make it with: fewstep export CHECKPOINT FOLDER --reference"', "unrecognized arguments: --reference"),
        ('"Export again with this dtype and " "--reference."', "--reference is no flag of export"),
        ('"Give a VAE." if vae else f"Export {name} with --guidance 0."', "--guidance is no flag of export"),
        ('"Rebuild it with: fewstep rebuild BUNDLE"', "`fewstep rebuild` is no command"),
        ('f"Build it with: fewstep build {folder} --size {w} --batch {n} --fast"', "unrecognized arguments: --fast"),
        ('"See `fewstep engines list|purge`."', "invalid choice: 'purge'"),
        ('"Build the engine with --backend tensorrt-xtr."', "--backend does not take tensorrt-xtr"),
        ('"Pass " + "preview=True."', "nothing takes preview="),
    ],
)
def test_a_wrong_text_is_noticed(expression: str, fault: str) -> None:
    tree = ast.parse(f"raise MissingError('it is gone', remedy={expression})")
    wrong = [
        f
        for t in texts_of(tree, Path("x.py"))
        if t.of_error
        for f in (*command_faults(t.words), *flag_faults(t.words, VERBS), *argument_faults(t.words))
    ]
    assert any(fault in f for f in wrong), wrong


def test_the_command_that_a_missing_engine_names_parses() -> None:
    bundle, _ = embedded_bundle("student")
    for dims in (None, {"width": 64, "height": 64, "batch": 1}, {"width": 8, "height": 64, "rows": 4}):
        for name in backend_names():
            words = shlex.split(find.command(bundle, name, dims))
            assert words[0] == "fewstep"
            assert usage_error(words[1:]) == ""


def test_the_command_in_a_picture_parses() -> None:
    """With every option that a call can hold, each as a picture's parameters hold it."""
    options = {f.name: f.default for f in dataclasses.fields(Call) if f.name in RECORDED}
    pairs = {n: [64, 64] for n in options if n.endswith("_size")} | {n: [0, 8] for n in options if "crop" in n}
    values = {"prompt_syntax": "a1111", "long_prompts": "chunk", "clip_skip": 1, "fit": "cover", "seed_device": "cuda"}
    values |= {"frames": 14, "fps": 7, "motion_bucket": 90, "noise_augmentation": 0.1, "min_guidance": 1.5}
    values |= {"decode_chunk": 4, "decoder": "tiny"}
    parameters = {
        **{"bundle": "sd 1", "prompt": "a 'cat'", "negative": "a dog", "prompt_2": "b", "negative_2": "c"},
        **{"steps": 4, "sampler": "euler", "schedule": "karras", "guidance": 5.0, "compat": "diffusers", "seed": 1},
        **{"width": 64, "height": 128, "image": "in.png", "strength": 0.5},
        "options": {"eta": 0.5, "timesteps": [999, 1], "sigmas": [14.0, 0.0]},
        "recorded": {**{n: pairs.get(n, values.get(n, "none")) for n in options}, "mask": "mask.png"},
    }
    words = shlex.split(command_line(parameters, "out.png"))
    assert words[0] == "fewstep"
    assert usage_error(words[1:]) == ""
