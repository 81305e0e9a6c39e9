"""What a newcomer meets on the command line: a line for a mistake, help in groups, completion, a bar."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import call, flags_of, verb_parsers
from fewstep.cli import VERBS
from fewstep.commands.common import bar

MOST_IN_A_GROUP = 32


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (
            ["run", "student"],
            2,
            "neither a prompt nor prompt_embeds; expected one of the two. Pass a prompt (--prompt).",
        ),
        (["run", "student", "--prompt", "x", "--size", "64"], 2, "See: fewstep run --help"),
        (["run", "student", "--prompt", "x", "--steps", "abc"], 2, "See: fewstep run --help"),
        (["run", "student", "--prompt", "x", "--step", "3"], 2, "ambiguous option"),
        (["run", "student", "--prompt", "x", "--sedd", "3"], 2, "expected one like --seed"),
        (["run", "student", "--prompt", "x", "--bogus=1"], 2, "unrecognized arguments: --bogus=1. See: fewstep run"),
        (["schedule", "show", "euler", "--stepz", "3"], 2, "unrecognized arguments: --stepz"),
        (["run", "student", "--prompt", "x", "--seed", "-1"], 2, "Leave it out for a random one."),
        (["inspect", "nosuch.png"], 3, "there is no file 'nosuch.png'"),
        (["run", "student", "--prompt", "x", "--sampler", "DPM fast"], 4, "known and not done, for its fixed orders"),
        (["paint"], 2, "See: fewstep --help"),
        ([], 2, "See: fewstep --help"),
    ],
)
def test_a_mistake_is_a_line(capsys: pytest.CaptureFixture[str], command: list[str], code: int, words: str) -> None:
    found, out, err = call(capsys, *command)
    (line,) = [x for x in err.splitlines() if not x.startswith("preset ")]
    assert (found, out) == (code, "")
    assert words in line


def test_the_help_of_verbs_with_many_options_is_in_groups() -> None:
    for verb, parser in verb_parsers().items():
        for group in parser._action_groups:
            assert len(group._group_actions) <= MOST_IN_A_GROUP, f"{verb}: {group.title}"
    run = verb_parsers()["run"]
    titles = [g.title for g in run._action_groups if g._group_actions]
    assert titles.index("how prompts are read") < titles.index("memory and precision")
    assert "samplers" in str(titles[-1])  # what is asked for least
    (ungrouped,) = [g for g in run._action_groups if g.title == "options"]
    assert len(ungrouped._group_actions) <= 10
    assert run.format_usage() == "usage: fewstep run bundle [options]\n"
    assert verb_parsers()["grid"].format_usage() == "usage: fewstep grid bundle [options]\n"


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    script = tmp_path_factory.mktemp("completion") / "fewstep.bash"
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "completion", "bash"], capture_output=True, text=True, check=True
    )
    script.write_text(done.stdout, encoding="utf-8")
    return script


@pytest.mark.parametrize(
    ("typed", "least", "never"),
    [
        ("fewstep r", {"run"}, {"bench"}),
        ("fewstep run st", {"student"}, {"base"}),
        ("fewstep run student --prompt-s", {"--prompt-syntax"}, {"--prompt"}),
        ("fewstep run student --prompt-syntax ", {"plain", "a1111"}, {"--steps"}),
        ("fewstep run student --backend ten", {"tensorrt", "tensorrt-rtx"}, {"auto"}),
        ("fewstep engines pr", {"prune"}, {"list"}),
        ("fewstep engines prune --un", {"--unused-days"}, set()),
        ("fewstep completion ", {"bash", "zsh", "fish"}, set()),
        ("fewstep run student --image pic", set(), {"student"}),
    ],
)
def test_bash_completes(bash: Path, typed: str, least: set[str], never: set[str]) -> None:
    """In bash itself, as it calls the function."""
    script = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _fewstep; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        [shutil.which("bash") or "", "-euc", script, "bash", str(bash), *typed.split(" ")],
        capture_output=True,
        text=True,
        check=True,
    )
    replies = set(done.stdout.split())
    assert least <= replies
    assert not never & replies


def test_every_verb_and_flag_is_completed(bash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, fish, _ = call(capsys, "completion", "fish")
    assert code == 0
    script = bash.read_text(encoding="utf-8")
    for verb, parser in verb_parsers().items():
        summary = VERBS[verb].replace("'", r"\'")
        assert f"-a {verb} -d '{summary}'" in fish
        line = next(x for x in script.splitlines() if x.strip().startswith(f"{verb}) ") and "--help" in x)
        for flag in flags_of(parser):
            assert re.search(rf"[ \"]{re.escape(flag)}[ \"]", line), flag
            if flag.startswith("--"):
                assert re.search(rf"from {verb}' -l {re.escape(flag[2:])}( |$)", fish, re.MULTILINE), flag
    assert call(capsys, "completion", "zsh")[1].startswith("autoload -U +X bashcompinit")
    assert fish.replace(r"\'", "").count("'") % 2 == 0


def test_a_build_says_what_its_backend_does_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("build", "student", "--component", "vae_encoder", "--force")
    code, _, quiet = call(capsys, *command)
    assert (code, "fewstep.engines" in quiet) == (0, False)
    code, _, err = call(capsys, *command, "--verbose")
    assert (code, "fewstep.engines: vae_encoder on ort-cpu: " in err) == (0, True), err


def test_a_bar_whose_end_is_not_known_names_its_stage_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with bar(None, "B", "weights") as drawn:
        drawn.set_description_str("weights unet")
        drawn.update(177_000)
        assert str(drawn).startswith("weights unet: "), str(drawn)
        assert ": :" not in str(drawn)


def test_run_shows_a_bar_with_the_time_left_on_a_terminal(tmp_path: Path) -> None:
    pty, fcntl, termios = (pytest.importorskip(n) for n in ("pty", "fcntl", "termios"))
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-m", "fewstep", "run", "base", "--prompt", "x", "--steps", "60"])  # noqa: S606 this project, in a terminal of its own
    shown = b""
    while True:
        try:
            read = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            break
        if not read:
            break
        shown += read
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    os.close(terminal)
    assert re.search(rb"denoise: +\d+%.*\d+/60 \[\d\d:\d\d<\d\d:\d\d", shown), shown
    assert b"image.png  seed" in shown
