"""`dynctl logs`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.pick import home, pick, view
from dynctl.cli.render import paint, prose
from dynctl.deploy.home import RunDir
from dynctl.deploy.logs import Follower, Line, is_selection, log_files, merged, parse_since
from dynctl.deploy.state import ENDED
from dynctl.errors import UsageError

_POLL_S = 0.1

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME] [ROLE[/I]]", help="A deployment, a role or one of its replicas.", show_default=False
    ),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Stay and print new lines; Ctrl-C leaves.")]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="10m, 2h, 1d ago, or an ISO time.", show_default=False),
]
Grep = Annotated[
    str | None, typer.Option("--grep", metavar="REGEX", help="Only lines that match.", show_default=False)
]
Lines = Annotated[
    int | None,
    typer.Option("--lines", "-n", metavar="N", min=0, help="Only the last N lines.", show_default=False),
]


def logs(
    words: Words = None,
    follow: Follow = False,
    since: Since = None,
    grep: Grep = None,
    lines: Lines = None,
    as_json: options.Json = False,
) -> None:
    """Logs of the processes of a deployment, by time; also after it has ended.

    ROLE is prefill, decode, aggregated, frontend, controller or engine; decode/0 is the same as decode-0.
    """
    name, select = split_words(words or [])
    run = pick(name, ended=True)
    pattern = compiled(grep)
    now = time.time()
    start = parse_since(since, now) if since else 0.0
    found = log_files(run.logs, select)
    if not found and not follow and not as_json:
        seen = view(run)
        prose(f"{seen.name} has no logs yet: {seen.reason or f'it is {seen.phase}'}", style="warning")
    follower = Follower(now)
    ends = {file.source: follower.skip(file) for file in found} if follow else None
    show(last(matching(merged(found, now, start, ends), pattern), lines), as_json=as_json)
    if follow:
        tail_on(run, select, follower, pattern, as_json=as_json)


def split_words(words: list[str]) -> tuple[str | None, str | None]:
    """(deployment, selection) of the arguments. Raises UsageError for too many."""
    if len(words) > 2:
        raise UsageError(f"too many arguments: {' '.join(words)}", hint="dynctl logs [NAME] [ROLE[/i]]")
    if len(words) == 2:
        return words[0], words[1]
    if not words:
        return None, None
    word = words[0]
    if is_selection(word) and word not in home().names():
        return None, word
    return (word, None) if word in home().names() else (None, word)


def compiled(grep: str | None) -> re.Pattern[str] | None:
    """The pattern. Raises UsageError when it is none."""
    try:
        return re.compile(grep) if grep is not None else None
    except re.error as error:
        raise UsageError(f"--grep: {error}", hint="a regular expression of Python") from error


def matching(lines: Iterable[Line], pattern: re.Pattern[str] | None) -> Iterator[Line]:
    """The lines in which the pattern is found."""
    return (line for line in lines if pattern is None or pattern.search(line.text))


def last(lines: Iterable[Line], count: int | None) -> Iterable[Line]:
    """The last `count` lines, or all."""
    return lines if count is None else deque(lines, maxlen=count)


def show(lines: Iterable[Line], *, as_json: bool) -> None:
    """Print lines, whose they are in front."""
    for line in lines:
        if as_json:
            text = json.dumps({"ts": line.at, "source": line.source, "text": line.text})
        else:
            text = f"{paint(line.source.ljust(14), 'dim')} {line.text}"
        sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tail_on(
    run: RunDir, select: str | None, follower: Follower, pattern: re.Pattern[str] | None, *, as_json: bool
) -> None:
    """Print what is added, until the deployment has ended and all of it is printed."""
    while True:
        over = view(run).phase in ENDED
        show(matching(follower.read(log_files(run.logs, select)), pattern), as_json=as_json)
        if over:
            return
        time.sleep(_POLL_S)
