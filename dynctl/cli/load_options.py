"""The options that say what load is sent, for the verbs that measure, and what is made of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from dynctl.cli import options
from dynctl.errors import UsageError
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.trace import load_trace
from dynctl.profiler.load.spec import Api, Closed, Lengths, Load, Open, Replay, check

ENV_KEY = "DYNCTL_API_KEY"
_DEFAULT_REQUESTS = 200
_WARM_SHARE = 10
CONSTANT = "constant"


def _sla(text: str) -> Sla:
    try:
        return parse_sla(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def parse_sla(text: str) -> Sla:
    """An SLA from "ttft=200ms,itl=20ms,percentile=p95". Raises ValueError that says what would be right."""
    from dynctl.recipe.units import parse_duration

    shape = "ttft=200ms,itl=20ms,percentile=p95"
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name in found:
            raise ValueError(f"{name} is given twice")
        if name in ("ttft", "itl"):
            found[name] = parse_duration(value)
            if not found[name] > 0:
                raise ValueError(f"{name} must be above 0: nothing is that fast")
        elif name == "percentile":
            try:
                found[name] = float(value.removeprefix("p")) / 100
            except ValueError as error:
                raise ValueError(f"percentile must be such as p95, not {value!r}") from error
            if not 0 < found[name] < 1:
                raise ValueError(f"percentile must be between p0 and p100, not {value!r}")
        else:
            raise ValueError(f"{name!r} is no part of an SLA: {shape}")
    if not found.keys() & {"ttft", "itl"}:
        raise ValueError(f"neither ttft nor itl is asked for: {shape}")
    return Sla(ttft_s=found.get("ttft"), itl_s=found.get("itl"), percentile=found.get("percentile", 0.95))


Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency", "-c", metavar="N", help="So many in flight (default 8).", show_default=False
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate", "-r", metavar="R", help="Requests a second, as a Poisson process.", show_default=False
    ),
]
Burstiness = Annotated[
    str | None,
    typer.Option(
        "--burstiness",
        metavar="G",
        help="With --rate: gamma gaps; 1 is Poisson, less is burstier, 'constant' has no chance in it.",
        show_default=False,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Replay it: JSON lines with timestamp, input_length, output_length, hash_ids.",
        show_default=False,
    ),
]
Speedup = Annotated[
    float, typer.Option("--speedup", metavar="X", help="With --trace: so many times as fast.")
]
Isl = Annotated[int, typer.Option("--isl", metavar="TOKENS", help="Prompt tokens.")]
Osl = Annotated[int, typer.Option("--osl", metavar="TOKENS", help="Answer tokens.")]
Spread = Annotated[
    float,
    typer.Option(
        "--spread", metavar="S", help="Lengths vary evenly by this share: 0.5 is half to one and a half."
    ),
]
Shared = Annotated[
    int,
    typer.Option(
        "--shared", metavar="TOKENS", help="So many of a prompt's first tokens are a common beginning."
    ),
]
Prefixes = Annotated[
    int, typer.Option("--prefixes", metavar="N", help="How many common beginnings there are.")
]
Turns = Annotated[
    int,
    typer.Option("--turns", metavar="N", help="Conversations of so many requests, each with its whole past."),
]
Think = Annotated[
    float,
    typer.Option(
        "--think", metavar="TIME", parser=options.duration, help="Between turns.", show_default="0s"
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests", "-n", metavar="N", help="How many (default 200, or --duration).", show_default=False
    ),
]
Duration = Annotated[
    float,
    typer.Option(
        "--duration", metavar="TIME", parser=options.duration, help="Send for so long.", show_default=False
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option(
        "--warmup",
        metavar="N",
        help="First requests, sent but not counted (default: --concurrency; with --rate a tenth of "
        "--requests, and until the load has lasted twice as long as a request).",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="The same seed: the same prompts and times (default: a new one).",
        show_default=False,
    ),
]
SlaOption = Annotated[
    Sla | None,
    typer.Option(
        "--sla",
        metavar="SLA",
        parser=_sla,
        help="Such as ttft=200ms,itl=20ms,percentile=p95.",
        show_default=False,
    ),
]
ApiOption = Annotated[str, typer.Option("--api", metavar="chat|completions", help="Which endpoint.")]
Deadline = Annotated[
    float,
    typer.Option(
        "--deadline", metavar="TIME", parser=options.duration, help="For each request.", show_default="10m"
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos/--no-ignore-eos", help="Ask that answers do not end by themselves."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        metavar="FILE",
        help=f"Holds the API key; default: ${ENV_KEY}.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Given:
    """The options of a load, as they were given."""

    concurrency: Concurrency = None
    rate: Rate = None
    burstiness: Burstiness = None
    trace: Trace = None
    speedup: Speedup = 1.0
    isl: Isl = 512
    osl: Osl = 128
    spread: Spread = 0.0
    shared: Shared = 0
    prefixes: Prefixes = 1
    turns: Turns = 1
    think: Think = 0.0
    requests: Requests = None
    duration: Duration = 0.0
    warmup: Warmup = None
    seed: Seed = None
    sla: SlaOption = None
    api: ApiOption = "chat"
    ignore_eos: IgnoreEos = True
    deadline: Deadline = 600.0


def takes_load(verb: Callable[..., int]) -> Callable[..., int]:
    """The verb with the options of a load beside its own: it is called with `load`, made of them, first."""

    @functools.wraps(verb)
    def called(**values: Any) -> int:
        given = {name: values.pop(name) for name in names}
        return verb(load=load_of(Given(**given)), **values)

    hints = get_type_hints(Given, include_extras=True)
    names = tuple(hints)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(Given)
    ]
    own_hints = get_type_hints(verb, include_extras=True)
    own = [
        one.replace(kind=keyword, annotation=own_hints[name])
        for name, one in inspect.signature(verb).parameters.items()
        if name != "load"
    ]
    arguments = [one for one in own if _is_argument(one.annotation)]
    rest = [one for one in own if one not in arguments]
    parameters = [*arguments, *added, *rest]
    called.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": int}
    return called


def _is_argument(annotation: Any) -> bool:
    kinds = get_args(annotation)[1:]
    return any(isinstance(kind, type(typer.Argument())) for kind in kinds)


def load_of(given: Given) -> Load:
    """The load. Raises UsageError for one that means nothing, ProfileError for a broken trace."""
    arrivals = _arrivals(given)
    requests = given.requests
    if requests is None:
        requests = 0 if given.duration or given.trace else _DEFAULT_REQUESTS
    elif requests < 1:
        raise UsageError(f"--requests must be at least 1, not {requests}")
    return check(
        Load(
            arrivals=arrivals,
            isl=Lengths(tokens=given.isl, spread=given.spread),
            osl=Lengths(tokens=given.osl, spread=given.spread),
            requests=requests,
            duration_s=given.duration,
            warmup=_warmup(given, arrivals, requests),
            settle=given.warmup is None and isinstance(arrivals, Open),
            shared_tokens=given.shared,
            prefixes=given.prefixes,
            turns=given.turns,
            think_s=given.think,
            api=_api(given.api),
            seed=secrets.randbelow(1 << 31) if given.seed is None else given.seed,
            deadline_s=given.deadline,
            ignore_eos=given.ignore_eos,
            sla=given.sla or Sla(),
        )
    )


def api_key(file: Path | None) -> str:
    """The key in the file, else in the environment; "" = none. Raises UsageError for a file without one."""
    if file is None:
        return os.environ.get(ENV_KEY, "")
    try:
        found = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the API key cannot be read: {error}", where=str(file)) from error
    if not found or len(found.split()) != 1:
        raise UsageError("it must hold one API key and nothing else", where=str(file))
    return found


def _arrivals(given: Given) -> Closed | Open | Replay:
    ways = {"--concurrency": given.concurrency, "--rate": given.rate, "--trace": given.trace}
    chosen = [flag for flag, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are different loads", hint="give one of them")
    if given.burstiness is not None and given.rate is None:
        raise UsageError("--burstiness is of the gaps that --rate makes", hint="give --rate as well")
    if given.trace is not None:
        return Replay(requests=tuple(load_trace(given.trace)), speedup=given.speedup)
    if given.rate is None:
        return Closed(concurrency=8 if given.concurrency is None else given.concurrency)
    return Open(rate=given.rate, burstiness=_calmness(given.burstiness))


def _calmness(text: str | None) -> float | None:
    if text is None or text == CONSTANT:
        return 1.0 if text is None else None
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--burstiness {text} is no number", hint=f"such as 0.5, or {CONSTANT}") from error


def _warmup(given: Given, arrivals: Closed | Open | Replay, requests: int) -> int:
    if given.warmup is not None:
        return given.warmup
    match arrivals:
        case Closed(concurrency=concurrency):
            return concurrency
        case Open(rate=rate):
            return (requests or round(rate * given.duration)) // _WARM_SHARE
    return 0


def _api(text: str) -> Api:
    if text == "chat":
        return "chat"
    if text == "completions":
        return "completions"
    raise UsageError(f"--api {text} is not known", hint="chat or completions")
