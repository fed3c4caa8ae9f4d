"""Runs inside an engine's own environment: its argument parser over command lines from standard input.

`python engine_parsers.py vllm|sglang` reads a JSON list of argument lists (after "serve") and writes a JSON
object: `parsed`, per list the values that are not the default, or {"error": message}; `options`, the names
of each option the parser knows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from typing import Any

Parser = argparse.ArgumentParser


def vllm_parser() -> Parser:
    """The parser of `vllm serve`."""
    from vllm.entrypoints.cli.serve import cmd_init  # type: ignore[import-not-found]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

    top: Parser = FlexibleArgumentParser()
    serve: Parser = cmd_init()[0].subparser_init(top.add_subparsers(dest="subparser"))
    return serve


def sglang_parser() -> Parser:
    """The parser of `sglang serve`."""
    from sglang.srt.server_args import ServerArgs  # type: ignore[import-not-found]

    parser = Parser(prog="sglang")
    ServerArgs.add_cli_args(parser)
    return parser


def check_vllm(values: argparse.Namespace) -> None:
    """Quick checks of vLLM after parsing. Raises ValueError or TypeError."""
    from vllm.entrypoints.launchers.cli_args import (  # type: ignore[import-not-found]
        validate_parsed_serve_args,
    )

    validate_parsed_serve_args(values)


def check_sglang(values: argparse.Namespace) -> None:
    """The parser takes any text as events configuration; its own class reads it. Raises ValueError."""
    from sglang.srt.disaggregation.kv_events import KVEventsConfig  # type: ignore[import-not-found]

    if values.kv_events_config:
        given = json.loads(values.kv_events_config)
        read = KVEventsConfig.from_cli(values.kv_events_config)
        lost = [key for key, value in given.items() if getattr(read, key, None) != value]
        if lost:
            raise ValueError(f"keys of --kv-events-config that are not read: {lost}")


def parse(parser: Parser, argv: list[str], engine: str) -> dict[str, Any]:
    """What the parser made of one list."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            values = parser.parse_args(argv)
        (check_vllm if engine == "vllm" else check_sglang)(values)
    except (SystemExit, ValueError, TypeError) as error:
        return {"error": output.getvalue()[-500:] or repr(error)}
    return {name: str(value) for name, value in vars(values).items() if value != parser.get_default(name)}


def main() -> None:
    """See the module."""
    engine = sys.argv[1]
    lists = json.load(sys.stdin)
    parser = vllm_parser() if engine == "vllm" else sglang_parser()
    options = [list(action.option_strings) for action in parser._actions if action.option_strings]
    answer = {"parsed": [parse(parser, argv, engine) for argv in lists], "options": options}
    sys.__stdout__.write("\nANSWER " + json.dumps(answer) + "\n")  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
