"""Runs one verb: its function is found, its options parsed, its failures told in one message."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from dynctl.cli.exits import EXIT_CODES, INTERRUPTED
from dynctl.errors import DynctlError, UsageError

ENDED = "--"


def load(target: str) -> Callable[..., Any]:
    """The function named "module:function"."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def command_of(verb: str, target: str, summary: str) -> Any:
    """The click command of a verb, made from the function's typer annotations."""
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    function = load(target)
    app.command(
        name=verb, help=function.__doc__ or summary, context_settings={"help_option_names": ["-h", "--help"]}
    )(function)
    return typer.main.get_command(app)


def invoke(verb: str, target: str, summary: str, args: list[str]) -> int:
    """Run a verb; every failure ends in one message and its exit code."""
    as_json = "--json" in (args[: args.index(ENDED)] if ENDED in args else args)
    try:
        return _run(verb, target, summary, args)
    except DynctlError as error:
        return report(error, as_json=as_json)
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except OSError as error:
        if _debug():
            traceback.print_exc()
        return report(
            DynctlError(error.strerror or str(error), where=str(error.filename or "")), as_json=as_json
        )
    except Exception as error:
        # The top of the process: a fault of dynctl's own must still end in one message for scripts.
        if _debug():
            raise
        name = type(error).__name__
        hint = "a fault in dynctl; DYNCTL_DEBUG=1 shows the traceback"
        return report(DynctlError(f"{name}: {error}", hint=hint), as_json=as_json)


def _run(verb: str, target: str, summary: str, args: list[str]) -> int:
    import typer

    from dynctl.cli.pick import Elsewhere

    # UsageError of click, which some versions of typer carry inside: BadParameter's parent in all of them.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    command = command_of(verb, target, summary)
    try:
        # Not command.main, which ends the process itself with 1 when the reader of our output has gone.
        with command.make_context(f"dynctl {verb}", list(args)) as context:
            code = command.invoke(context)
    except Elsewhere as there:
        from dynctl.cli.elsewhere import run_there

        return run_there(there.run, verb, args)
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        return INTERRUPTED
    except usage_error as error:
        message = str(getattr(error, "format_message", error.__str__)())
        raise UsageError(message.rstrip("."), hint=f"dynctl {verb} --help shows what is valid") from error
    return code if isinstance(code, int) else 0


def report(error: DynctlError, *, as_json: bool) -> int:
    """Tell an error: for scripts on stdout, for people on stderr; its exit code."""
    if as_json:
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        sys.stdout.write(
            json.dumps({"error": {"type": error.kind, "message": message, "where": error.where}}) + "\n"
        )
    else:
        from dynctl.cli.render import prose

        prose(str(error), style="error")
    if _debug() and error.__traceback__ is not None:
        traceback.print_exception(error)
    return EXIT_CODES.get(error.kind, 1)


def unknown_verb(verb: str, verbs: Iterable[str]) -> UsageError:
    """What to say to a verb that is none."""
    what = "option" if verb.startswith("-") else "verb"
    close = difflib.get_close_matches(verb, list(verbs), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "dynctl --help lists the verbs"
    return UsageError(f"no such {what}: {verb}", hint=hint)


def _debug() -> bool:
    return os.environ.get("DYNCTL_DEBUG", "") not in ("", "0")
