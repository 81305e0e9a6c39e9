"""The documents say what is so: their commands parse, their Python compiles and imports, their files are there.

What is quick and needs no network is really run; a bundle of the embedded student stands in for `bundles/sd-turbo`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commandline import ROOT, flags_of, make_targets, usage_error, verb_parsers
from fewstep.cli import VERBS, main
from fewstep.export.embedded import embedded_bundle

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PLAIN, PYTHON = {"", "sh", "bash", "text"}, {"python"}
STARTS = re.compile(r"(?:\.venv/bin/)?(?:fewstep|make|python|pip|podman|serve) ")
STAND_IN = "bundles/sd-turbo"
SCHEDULER = {
    **{"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085},
    **{"beta_end": 0.012, "num_train_timesteps": 1000, "timestep_spacing": "leading", "steps_offset": 1},
}
LONG = {"serve", "bench", "export"}
"""Verbs that are not run: one never ends, one takes minutes, one needs a checkpoint of its own."""
CODE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w./*-]*\w\.(?:py|md|json|toml|txt|sh|html|png)|[\w-]+/[\w./-]*|[A-Z]\w+file")


@dataclass(frozen=True)
class Piece:
    """A piece of a document: its text and where it begins."""

    document: Path
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def pieces(pattern: re.Pattern[str], group: int, *, but_code: bool = False) -> list[tuple[Piece, re.Match[str]]]:
    """What a pattern matches in all documents; code blocks are blanked where `but_code`."""
    matches = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if but_code:
            text = CODE.sub(lambda m: "\n" * m[0].count("\n"), text)
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start(group)) + 1
            matches.append((Piece(document, line, match[group]), match))
    return matches


def blocks(languages: set[str]) -> list[Piece]:
    return [piece for piece, match in pieces(CODE, 2) if match[1] in languages]


def spans() -> list[Piece]:
    """Code in running text, on one line."""
    return [Piece(p.document, p.line, " ".join(p.text.split())) for p, _ in pieces(SPAN, 1, but_code=True)]


def indented() -> list[Piece]:
    """Commands in blocks that are indented."""
    lines = re.compile(r"^ {4}((?:\w+=\S+ )*(?:fewstep|make|python|pip) .*)$", re.MULTILINE)
    return [p for p, _ in pieces(lines, 1, but_code=True)]


def commands(piece: Piece) -> list[Piece]:
    """The commands of a block or span, without comments, variables that are set before them, and their folder."""
    lines = []
    joined = piece.text.replace("\\\n", "  ")
    for number, line in enumerate(joined.splitlines()):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            words[0] = words[0].rpartition("/")[2]
            lines.append(Piece(piece.document, piece.line + number, shlex.join(words)))
    return lines


def shell_lines() -> list[Piece]:
    """Every command of blocks, whole; and the spans that begin as one does."""
    pieces = [*blocks(PLAIN), *indented(), *spans()]
    return [c for p in pieces if STARTS.match(p.text) for c in commands(p)]


def script_flags(script: Path) -> set[str]:
    return set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", script.read_text(encoding="utf-8")))


def command_fault(words: list[str]) -> str:
    """What is wrong with a command, if it is one of ours."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    match words:
        case ["fewstep", verb] if verb in VERBS:
            return ""  # a verb by its name
        case ["fewstep", *rest]:
            return usage_error(rest)
        case ["make", *targets]:
            wrong = [t for t in targets if "=" not in t and t not in make_targets()]
            return f"no target {', '.join(wrong)}" if wrong else ""
        case ["python", script, *rest] if script.endswith(".py"):
            if not (ROOT / script).is_file():
                return f"there is no {script}"
            unknown = {w.strip("[]") for w in rest if w.startswith(("--", "[--"))} - script_flags(ROOT / script)
            return f"{script} has no {', '.join(unknown)}" if unknown else ""
        case ["pip", "install", *packages]:
            named = {e for p in packages for m in re.findall(r"fewstep\[([\w,-]+)\]", p) for e in m.split(",")}
            return f"no extra {', '.join(named - extras.keys())}" if named - extras.keys() else ""
    return ""


def test_every_command_is_one() -> None:
    lines = [(p, shlex.split(p.text)) for p in shell_lines()]
    assert sum(words[0] == "fewstep" for _, words in lines) > 25, "the commands are not seen"
    faults = [f"{p.place}: {p.text}: {f}" for p, words in lines if (f := command_fault(words))]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("fewstep export CHECKPOINT FOLDER --reference", "unrecognized arguments: --reference"),
        ("fewstep build --dry-run", "the following arguments are required: bundle"),
        ("fewstep paint", "invalid choice: 'paint'"),
        ("make demos", "no target demos"),
        ("python bench/flour.py BUNDLE", "there is no bench/flour.py"),
        ("python bench/floor.py BUNDLE [--speed N]", "bench/floor.py has no --speed"),
        ("pip install 'fewstep[cpu,gpu]'", "no extra gpu"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, fault: str) -> None:
    assert fault in command_fault(shlex.split(command))


def test_every_flag_is_one() -> None:
    """A flag alone in running text belongs to some verb or to a script of the bench."""
    known = {f for v in verb_parsers().values() for f in flags_of(v)}
    known |= {f for s in sorted((ROOT / "bench").glob("*.py")) for f in script_flags(s)}
    flags = [
        (p, f) for p in spans() if not p.text.startswith("podman") for f in re.findall(r"(?:^| )(--[\w-]+)", p.text)
    ]
    assert len(flags) > 15, "the flags are not seen"
    assert [f"{p.place}: {f}" for p, f in flags if f not in known] == []


def fewstep_names(tree: ast.Module) -> dict[str, Any]:
    """What a block imports of fewstep, by the name it has there; raises what the import raises."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name: importlib.import_module(a.name) for a in node.names if "fewstep" in a.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewstep"):
            module = importlib.import_module(str(node.module))
            names |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
    return names


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in blocks(PYTHON)])
def test_python_compiles_imports_and_names_arguments_that_exist(block: Piece) -> None:
    tree = ast.parse(block.text)
    names = fewstep_names(tree)
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        first, _, rest = ast.unparse(call.func).partition(".")
        called = names.get(first, importlib.import_module("fewstep") if first == "fewstep" else None)
        for name in rest.split(".") if rest and called is not None else ():
            called = getattr(called, name)
        if called is not None:
            parameters = inspect.signature(called).parameters.values()
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                assert {k.arg for k in call.keywords} <= {p.name for p in parameters}, ast.unparse(call)


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_every_link_leads_somewhere() -> None:
    links = [(p, *p.text.partition("#")[::2]) for p, _ in pieces(LINK, 1) if "://" not in p.text]
    assert len(links) > 20, "the links are not seen"
    wrong = []
    for piece, path, anchor in links:
        target = piece.document.parent / path if path else piece.document
        if not target.exists() or (anchor and anchor not in headings(target)):
            wrong.append(f"{piece.place}: {piece.text}")
    assert wrong == []


def files_of_the_house() -> list[str]:
    """The paths of files and folders that are no build products, each after a slash."""
    products = {"build", "dist"}
    tops = [p for p in ROOT.iterdir() if p.name not in products and not p.name.startswith(".")]
    return [f"/{p.relative_to(ROOT).as_posix()}" for top in tops for p in (top, *top.rglob("*"))]


def test_every_file_that_is_named_is_there() -> None:
    """By its whole path or the end of it; or it is one that fewstep reads or writes, and so stands in its sources."""
    here = files_of_the_house()
    sources = "".join(
        (ROOT / f[1:]).read_text(encoding="utf-8") for f in here if f.endswith(".py") and "/tests/" not in f
    )
    named = [p for p in spans() if FILE.fullmatch(p.text) and not p.text.startswith("/")]
    assert len(named) > 40, "the files are not seen"
    wrong = [
        f"{p.place}: {p.text}"
        for p in named
        if not any(Path(f).match(p.text) if "*" in p.text else f.endswith(f"/{p.text.rstrip('/')}") for f in here)
        and not ("/" not in p.text and f'"{p.text}"' in sources)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", ["README.md", "architecture.md"])
def test_the_plan_of_the_house_names_what_is_there(document: str) -> None:
    (plan,) = [p for p in blocks(PLAIN) if "errors.py" in p.text and p.document.name == document]
    named = {w for line in plan.text.splitlines() for w in line.split() if re.fullmatch(r"\w+(\.py|/)", w)}
    rooms = {f"{p.name}/" for p in ROOT.iterdir() if (p / "__init__.py").is_file()}
    assert rooms <= named, f"{rooms - named} are not named"
    assert [w for w in named if not (ROOT / w).exists()] == []


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bundle of the embedded student where documents have sd-turbo's."""
    bundle, _ = embedded_bundle("student")
    shutil.copytree(bundle.folder, tmp_path / STAND_IN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable(piece: Piece) -> bool:
    words = shlex.split(piece.text)
    return words[0] == "fewstep" and len(words) > 1 and words[1] not in LONG and "BUNDLE" not in piece.text


def test_the_readme_s_commands_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, so that a picture that one names is the one that another made."""
    shell = [b for b in blocks(PLAIN) if b.document.name == "README.md" and STARTS.match(b.text)]
    lines = [c for b in shell for c in commands(b) if runnable(c)]
    assert len(lines) > 7, "the commands are not seen"
    for line in lines:
        assert main(shlex.split(line.text)[1:]) == 0, f"{line.place}: {capsys.readouterr().err}"
    assert {"demo.png", "lighthouse.png", "grid.png", "sigmas.png"} <= {p.name for p in workplace.iterdir()}


@pytest.mark.parametrize(
    ("document", "given"),
    [("README.md", {}), ("docs/samplers.md", {"scheduler_config": SCHEDULER})],
)
@pytest.mark.usefixtures("workplace")
def test_python_runs(document: str, given: dict[str, Any]) -> None:
    """A document's blocks one after the other, as a reader would paste them."""
    names = dict(given)
    for block in (b for b in blocks(PYTHON) if b.document == ROOT / document):
        exec(compile(block.text, block.place, "exec"), names)  # noqa: S102 the code blocks of our own documents
    assert len(names) > len(given) + 2
