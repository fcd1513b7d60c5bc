"""``sfumato --print-completion SHELL``: a script that completes commands, methods and options at the tab key."""

from __future__ import annotations

import contextlib
import io
import re
from importlib import import_module

from sfumato import catalog
from sfumato.errors import BadInput, unknown

SHELLS = ("bash", "zsh")
SCRIPT = """{first}_sfumato() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{options}
    esac
    if [ "$COMP_CWORD" -eq 2 ]; then
      case "${{COMP_WORDS[1]}}" in
{methods}
      esac
    elif [ "${{cur#-}}" = "$cur" ]; then words=""; fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _sfumato sfumato
"""
"""Where no word fits, the shell's own completion of paths is next."""


def script(args: list[str], commands: list[str]) -> str:
    """The script for the shell that ``args`` name; to be sourced in the shell's start-up file.

    Raises:
        BadInput: no shell is named, or none of `SHELLS`.
    """
    if len(args) != 1:
        raise BadInput('name a shell, as in sfumato --print-completion bash')
    if args[0] not in SHELLS:
        raise unknown("shell", args[0], SHELLS)
    methods = {
        verb: [m.name for m in catalog.methods(verb)]
        for verb in commands
        if verb in catalog.verbs() and verb != "sample"  # whose methods are values of --scheduler
    }
    lines = []
    for command in commands:
        for name in methods.get(command, ("",)):
            pattern = f'"{command} {name}"' if name else f'"{command} "*'
            lines.append(f'      {pattern}) words="{_options(command, *filter(None, [name]))}" ;;')
    listed = {**methods, "choose": catalog.verbs(), "cite": [m.name for m in catalog.METHODS]}
    return SCRIPT.format(
        first="autoload -U +X bashcompinit && bashcompinit\n" if args[0] == "zsh" else "",
        commands=" ".join(commands),
        options="\n".join(lines),
        methods="\n".join(f'        {command}) words="{" ".join(names)}" ;;' for command, names in listed.items()),
    )


def _options(command: str, *method: str) -> str:
    """The options of a command, from the lines of its help that begin with one."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        import_module(f"sfumato.commands.{command}").main([*method, "--help"])
    starts = re.findall(r"^(?:│ |  )((?:-h, )?--.*)", told.getvalue(), flags=re.M)
    return " ".join(dict.fromkeys(x for line in starts for x in re.findall(r"--[a-z][\w-]*", line)) or ["--help"])
