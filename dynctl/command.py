"""A command line as a value: the one place that quotes, and that masks secrets when shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

MASK = "***"
_SECRET_NAME = re.compile(
    r"((API|ACCESS|PRIVATE)_?KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE
)
_SECRET_FLAG = re.compile(r"^--?(admin-)?(api[-_]key|hf[-_]token|password)(=|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Command:
    """What one process is started with.

    `argv` is a list, never a shell string. `env` is added to the inherited environment; it is the whole of
    what dynctl sets. `files` maps a path relative to the run directory to the content that must be there
    (mode 0600) before the process starts.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def shown_env(self) -> dict[str, str]:
        """The environment with secrets masked, sorted by name."""
        return {k: MASK if _SECRET_NAME.search(k) else v for k, v in sorted(self.env.items())}

    def shown_argv(self) -> tuple[str, ...]:
        """The argument list with the values of secret flags masked."""
        shown: list[str] = []
        hide_next = False
        for arg in self.argv:
            match = _SECRET_FLAG.match(arg)
            if hide_next:
                shown.append(MASK)
                hide_next = False
            elif match and match.group(3) == "=":
                shown.append(arg.split("=", 1)[0] + "=" + MASK)
            else:
                shown.append(arg)
                hide_next = match is not None
        return tuple(shown)

    def render(self) -> str:
        """One line a shell would take, secrets masked: for people to read."""
        parts = [f"{k}={shlex.quote(v)}" for k, v in self.shown_env().items()]
        parts.extend(shlex.quote(a) for a in self.shown_argv())
        return " ".join(parts)
