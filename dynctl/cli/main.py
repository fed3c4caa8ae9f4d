"""The command line: verb → "module:function", nothing imported until it is chosen.

`dynctl --help` is printed from the table below, without typer, rich or anything else heavy. A verb is a
function with typer annotations; it returns None or an exit code, and raises `DynctlError` for a failure.
"""

from __future__ import annotations

import os
import sys

from dynctl.cli.exits import INTERRUPTED, PIPE_CLOSED
from dynctl.cli.terminal import wants_colour

VERBS: dict[str, tuple[str, str]] = {
    "up": ("dynctl.cli.up:up", "Start what a recipe says and serve it"),
    "attend": ("dynctl.cli.attend:attend", "Wait for a deployment that was just started, as up does"),
    "apply": ("dynctl.cli.amend:apply_next", "Become what a recipe put into the run directory says"),
    "down": ("dynctl.cli.down:down", "Drain and end a deployment"),
    "ps": ("dynctl.cli.ps:ps", "Processes of a deployment and their state"),
    "status": ("dynctl.cli.status:status", "Is it ready, and if not, why"),
    "logs": ("dynctl.cli.logs:logs", "Logs of its processes, also after it has ended"),
    "events": ("dynctl.cli.events:events", "What happened to it, in order"),
    "wait": ("dynctl.cli.wait:wait", "Return when it is ready, settled, degraded or down"),
    "top": ("dynctl.cli.top:top", "Live: roles, GPUs, requests, KV use, hit rate, latencies"),
    "scale": ("dynctl.cli.scale:scale", "Add or remove replicas while it serves"),
    "restart": ("dynctl.cli.restart:restart", "Replace processes one by one, without losing a request"),
    "drain": ("dynctl.cli.drain:drain", "Take workers or a node out of service, and keep them out"),
    "undrain": ("dynctl.cli.drain:undrain", "Bring drained workers back"),
    "rollback": ("dynctl.cli.amend:rollback", "Go back to the recipe before the last change"),
    "lock": ("dynctl.cli.lock:lock", "Let nobody change it, and say why"),
    "unlock": ("dynctl.cli.lock:unlock", "Let it be changed again"),
    "exec": ("dynctl.cli.execute:execute", "Run a command beside a worker, with its environment"),
    "planner": ("dynctl.cli.planner:planner", "What the planner decided, and why"),
    "chat": ("dynctl.cli.chat:chat", "Send one prompt, stream the answer"),
    "bench": ("dynctl.cli.bench:bench", "Send a load and measure what users would get"),
    "compare": (
        "dynctl.cli.compare:compare",
        "Two recipes at the same load: which keeps the SLA, at what cost",
    ),
    "ls": ("dynctl.cli.ls:ls", "All deployments of this user"),
    "plan": ("dynctl.cli.plan:plan", "Show nodes, GPUs, ports and every command, start nothing"),
    "doctor": ("dynctl.cli.doctor:doctor", "Check each host before a start: what is wrong, what would help"),
    "simulate": ("dynctl.cli.simulate:simulate", "Replay a trace against a recipe, hours in seconds"),
    "profile": ("dynctl.cli.profile:profile", "Choose parallelism and replicas for a service level"),
    "estimate": ("dynctl.cli.estimate:estimate", "Predict TTFT and TPOT of serving points, without running"),
    "validate": ("dynctl.cli.validate:validate", "Check a recipe, start nothing"),
    "schema": ("dynctl.cli.schema:schema", "JSON Schema of a recipe, for editors"),
    "recipes": ("dynctl.cli.recipes:recipes", "The recipes that come with dynctl"),
    "completion": ("dynctl.cli.completion:completion", "Completion script for bash, zsh or fish"),
    "version": ("dynctl.cli.version:version", "The version of dynctl"),
}
INTERNAL = ("attend", "apply")
"""Called by dynctl itself on another machine: in no help."""
GROUPS = (
    ("Run", ("up", "down")),
    ("Change", ("scale", "restart", "drain", "undrain", "rollback", "lock", "unlock")),
    ("Look", ("ps", "status", "top", "logs", "events", "wait", "planner", "chat", "exec", "ls")),
    ("Measure", ("profile", "estimate", "simulate", "bench", "compare")),
    ("Prepare", ("doctor", "plan", "validate", "schema", "recipes")),
    ("Tool", ("completion", "version")),
)


def main(argv: list[str] | None = None) -> None:
    """Run one command line and exit with its code."""
    args = sys.argv[1:] if argv is None else argv
    try:
        code = dispatch(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        code = INTERRUPTED
    sys.exit(code)


def dispatch(args: list[str]) -> int:
    """Print the top-level help or run the verb; the exit code."""
    if not args or args[0] in ("-h", "--help", "help"):
        if len(args) > 1 and args[0] == "help":
            return dispatch([args[1], "--help"])
        sys.stdout.write(help_text(colour=wants_colour(sys.stdout.isatty(), os.environ)))
        return 0
    verb, rest = args[0], args[1:]
    if verb in ("-V", "--version"):
        verb = "version"
    if verb not in VERBS:
        from dynctl.cli.invoke import report, unknown_verb

        return report(unknown_verb(verb, VERBS), as_json="--json" in rest)
    from dynctl.cli.invoke import invoke

    return invoke(verb, VERBS[verb][0], VERBS[verb][1], rest)


def help_text(*, colour: bool) -> str:
    """The top-level help."""

    def bold(text: str) -> str:
        return f"\033[1m{text}\033[0m" if colour else text

    def cyan(text: str) -> str:
        return f"\033[36m{text}\033[0m" if colour else text

    lines = [
        f"{bold('Usage:')} dynctl VERB [OPTIONS]",
        "",
        "One recipe to a running LLM service: KV-aware routing over stock engines,",
        "prefill and decode apart or together, on one machine or many.",
    ]
    for title, verbs in GROUPS:
        lines += ["", bold(f"{title}:")]
        lines += [f"  {cyan(verb.ljust(11))} {VERBS[verb][1]}" for verb in verbs]
    lines += [
        "",
        f"{bold('Start here:')}  dynctl up recipes/quickstart.yaml      no GPU, no download",
        f"{bold('A verb:')}      dynctl VERB --help                     options and examples",
        "",
        "Data goes to standard output, prose to standard error; --json with every verb.",
        "Runs are kept under $DYNCTL_HOME (default ~/.dynctl).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
