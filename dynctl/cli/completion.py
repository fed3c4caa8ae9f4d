"""`dynctl completion`: a script made from the verbs and their own options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.invoke import command_of
from dynctl.cli.main import VERBS
from dynctl.cli.render import data, json_data
from dynctl.deploy.logs import ROLES
from dynctl.errors import UsageError

NAMED = ("down", "ps", "status", "logs", "events", "wait", "top", "rollback", "lock", "unlock")
"""Verbs that take a deployment's name."""
SEATED = ("restart", "scale", "drain", "undrain", "exec")
"""Verbs that take roles and replicas of them."""
FILES = ("up", "doctor", "plan", "validate")
"""Verbs that take a recipe's file."""

SEATS = tuple(role for role in ROLES if role not in ("controller", "engine"))

Options = Mapping[str, list[tuple[str, str]]]
"""Verb → (flag, help)."""

Shell = Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell it is for.")]


def completion(shell: Shell, as_json: options.Json = False) -> None:
    """Completion script for bash, zsh or fish.

    bash: eval "$(dynctl completion bash)" in ~/.bashrc; zsh: the same with zsh in ~/.zshrc, after compinit;
    fish: dynctl completion fish > ~/.config/fish/completions/dynctl.fish
    """
    makers: dict[str, Callable[[Options], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
    maker = makers.get(shell)
    if maker is None:
        raise UsageError(f"no completion for '{shell}'", hint=f"there is: {', '.join(makers)}")
    script = maker(all_options())
    if as_json:
        json_data({"shell": shell, "script": script})
    else:
        data(script)


def all_options() -> Options:
    """The flags of every verb with their help, from the verbs themselves."""
    found: dict[str, list[tuple[str, str]]] = {}
    for verb, (target, summary) in VERBS.items():
        params = command_of(verb, target, summary).params
        flags = [(flag, p.help or "") for p in params for flag in p.opts if flag.startswith("-")]
        found[verb] = sorted([*flags, ("--help", "Show what it does and its options.")])
    return found


def bash(verbs: Options) -> str:
    """The script for bash 4 and later."""
    cases = "\n".join(
        f'    {verb}) words="{" ".join(flag for flag, _ in flags)}" ;;' for verb, flags in verbs.items()
    )
    return f"""_dynctl() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" verb="${{COMP_WORDS[1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{" ".join(verbs)} --help --version" -- "$current"))
    return
  fi
  case "$verb" in
{cases}
  esac
  if [[ "$current" != -* ]]; then
    case "$verb" in
    {"|".join(FILES)}) COMPREPLY=($(compgen -f -- "$current")); return ;;
    completion) words="bash zsh fish" ;;
    logs) words="$(_dynctl_names) {" ".join(ROLES)}" ;;
    {"|".join(NAMED)}) words="$(_dynctl_names)" ;;
    {"|".join(SEATED)}) words="{" ".join(SEATS)}" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
_dynctl_names() {{ command ls "${{DYNCTL_HOME:-$HOME/.dynctl}}/deployments" 2>/dev/null; }}
complete -o filenames -F _dynctl dynctl"""


def zsh(verbs: Options) -> str:
    """The script for zsh, after compinit."""
    summaries = "\n".join(f"    '{verb}:{_quoted(VERBS[verb][1])}'" for verb in verbs)
    cases = "\n".join(
        f"    {verb}) flags=({' '.join(_zsh_flag(flag, text) for flag, text in flags)}) ;;"
        for verb, flags in verbs.items()
    )
    return f"""_dynctl() {{
  local -a verbs flags names
  verbs=(
{summaries}
  )
  if (( CURRENT == 2 )); then _describe 'verb' verbs; return; fi
  case "$words[2]" in
{cases}
  esac
  if [[ "$words[CURRENT]" == -* ]]; then _describe 'option' flags; return; fi
  names=(${{(f)"$(command ls "${{DYNCTL_HOME:-$HOME/.dynctl}}/deployments" 2>/dev/null)"}})
  case "$words[2]" in
    {"|".join(FILES)}) _files ;;
    completion) compadd bash zsh fish ;;
    logs) compadd -a names; compadd {" ".join(ROLES)} ;;
    {"|".join(NAMED)}) compadd -a names ;;
    {"|".join(SEATED)}) compadd {" ".join(SEATS)} ;;
  esac
}}
compdef _dynctl dynctl"""


def fish(verbs: Options) -> str:
    """The script for fish."""
    lines = [
        "function __dynctl_names; set -q DYNCTL_HOME; or set -l DYNCTL_HOME ~/.dynctl; "
        "command ls $DYNCTL_HOME/deployments 2>/dev/null; end",
        "complete -c dynctl -f",
    ]
    for verb, flags in verbs.items():
        first, own = "__fish_use_subcommand", f"'__fish_seen_subcommand_from {verb}'"
        lines.append(f"complete -c dynctl -n {first} -a {verb} -d '{_quoted(VERBS[verb][1])}'")
        for flag, text in flags:
            kind = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            lines.append(f"complete -c dynctl -n {own} {kind} -d '{_quoted(text)}'")
    seen = "__fish_seen_subcommand_from"
    lines.append(f"complete -c dynctl -n '{seen} {' '.join(NAMED)}' -a '(__dynctl_names)'")
    lines.append(f"complete -c dynctl -n '{seen} {' '.join(SEATED)}' -a '{' '.join(SEATS)}'")
    lines.append(f"complete -c dynctl -n '{seen} logs' -a '{' '.join(ROLES)}'")
    lines.append(f"complete -c dynctl -n '{seen} {' '.join(FILES)}' -F")
    lines.append(f"complete -c dynctl -n '{seen} completion' -a 'bash zsh fish'")
    return "\n".join(lines)


def _zsh_flag(flag: str, text: str) -> str:
    return f"'{flag}:{_quoted(text)}'"


def _quoted(text: str) -> str:
    """Text that may stand inside single quotes and after a colon."""
    return " ".join(text.split()).replace("'", "").replace(":", ",")
