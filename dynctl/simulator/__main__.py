"""`python -m dynctl.simulator --spec FILE`: runs the task in a file, tells of it in JSON lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from dynctl.errors import DynctlError
from dynctl.perfmodel.simulation import Failed, Task, Told
from dynctl.simulator.run import run


def tell(told: Told) -> None:
    """One line, at once."""
    sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
    sys.stdout.buffer.flush()


def main() -> int:
    """Run the task; 0, or 1 after an error was told as the last line."""
    parser = argparse.ArgumentParser(prog="python -m dynctl.simulator")
    parser.add_argument("--spec", type=Path, required=True, help="the task, as JSON")
    given = parser.parse_args()
    try:
        run(msgspec.json.decode(given.spec.read_bytes(), type=Task), tell)
    except DynctlError as error:
        tell(Failed(kind=error.kind, message=error.message, where=error.where, hint=error.hint))
        return 1
    except BrokenPipeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
