"""`fewstep completion bash|zsh|fish`: the script that has a shell complete verbs, options and their choices."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

SHELLS = {
    "bash": 'eval "$(fewstep completion bash)"  # in ~/.bashrc',
    "zsh": 'eval "$(fewstep completion zsh)"  # in ~/.zshrc, after compinit',
    "fish": "fewstep completion fish > ~/.config/fish/completions/fewstep.fish",
}
BASH = """_fewstep() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}}
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
        return
    fi
    case "$verb $before" in
{choices}
    esac
    if [[ $word == -* ]]; then
        case $verb in
{flags}
        esac
    elif ((COMP_CWORD == 2)); then
        case $verb in
{words}
        esac
    fi
}}
complete -o default -F _fewstep fewstep
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def define(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "\n".join(["set it up with:", *(f"  {line}" for line in SHELLS.values()), "", parser.epilog or ""])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS)


def execute(options: argparse.Namespace) -> int:
    from .common import emit

    whole: argparse.ArgumentParser = options.whole_parser()
    script = fish(whole) if options.shell == "fish" else bash(whole)
    emit(options, {"shell": options.shell, "script": script}, (ZSH if options.shell == "zsh" else "") + script)
    return 0


def verb_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb, or of each action that a verb has."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(inner[0].choices) if inner else {}


def summaries(parser: argparse.ArgumentParser) -> dict[str, str]:
    """What each verb does, in words."""
    listed = [c for a in parser._actions if isinstance(a, argparse._SubParsersAction) for c in a._choices_actions]
    return {choice.dest: choice.help or "" for choice in listed}


def bash(whole: argparse.ArgumentParser) -> str:
    """For bash, and for zsh with its `bashcompinit`."""
    verbs = verb_parsers(whole)
    choices, flags, words = [], [], []
    for verb, parser in verbs.items():
        for action in _actions(parser):
            if action.option_strings and action.choices is not None:
                cases = "|".join(f'"{verb} {f}"' for f in action.option_strings)
                choices.append(f"        {cases}) {_reply(map(str, action.choices))}; return ;;")
        flags.append(f"            {verb}) {_reply(f for a in _actions(parser) for f in a.option_strings)} ;;")
        first = [*verb_parsers(parser), *_first_words(parser)]
        words += [f"            {verb}) {_reply(first)} ;;"] if first else []
    lines = {"choices": choices, "flags": flags, "words": words}
    return BASH.format(
        verbs=" ".join([*verbs, *whole._option_string_actions]), **{name: "\n".join(of) for name, of in lines.items()}
    )


def fish(whole: argparse.ArgumentParser) -> str:
    verbs, said = verb_parsers(whole), summaries(whole)
    flags = [f.removeprefix("--") for f in whole._option_string_actions if f.startswith("--")]
    lines = [f"complete -c fewstep -n __fish_use_subcommand -l {flag}" for flag in flags]
    for verb, parser in verbs.items():
        within = f"-n '__fish_seen_subcommand_from {verb}'"
        lines.append(f"complete -c fewstep -f -n __fish_use_subcommand -a {verb} -d {_quoted(said[verb])}")
        for action in _actions(parser):
            for flag in action.option_strings:
                short = f"-s {flag[1:]}" if len(flag) == 2 else f"-l {flag[2:]}"
                value = "" if action.nargs == 0 else " -r"
                named = "" if action.choices is None else f" -f -a {_quoted(' '.join(map(str, action.choices)))}"
                lines.append(f"complete -c fewstep {within} {short}{value}{named} -d {_quoted(_help(action))}")
        for word in (*verb_parsers(parser), *_first_words(parser)):
            lines.append(f"complete -c fewstep {within} -a {word}")
    return "\n".join(lines) + "\n"


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """What has a flag, of a verb and of the actions that it has."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)
        elif action.option_strings:
            yield action


def _first_words(parser: argparse.ArgumentParser) -> list[str]:
    """What may stand first beside files: names of embedded models, or a word of a few."""
    from .common import EMBEDDED

    first = next((a for a in parser._actions if not a.option_strings), None)
    if first is None or isinstance(first, argparse._SubParsersAction):
        return []
    return list(EMBEDDED) if first.dest in ("bundle", "path") else list(map(str, first.choices or ()))


def _reply(words: Iterator[str] | list[str] | map[str]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(dict.fromkeys(words))}" -- "$word"))'


def _help(action: argparse.Action) -> str:
    """The first clause of an option's help."""
    return re.split(r"[;:(]", action.help or "")[0].replace("%%", "%").strip()


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
