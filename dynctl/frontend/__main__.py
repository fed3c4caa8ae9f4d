"""`python -m dynctl.frontend --spec FILE`: one frontend process, working directory = run directory."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import msgspec

from dynctl.errors import DynctlError, LaunchError, Superseded
from dynctl.frontend.service import run
from dynctl.http import runtime
from dynctl.observability import logs
from dynctl.protocol.exits import LastWords
from dynctl.protocol.specs import FrontendSpec

logger = logging.getLogger(__name__)


def main() -> int:
    """Run one frontend; 0 after an ordinary stop, 1 with last words left behind."""
    parser = argparse.ArgumentParser(prog="python -m dynctl.frontend", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="the frontend's spec, as JSON")
    path: Path = parser.parse_args().spec
    incarnation = int(os.environ.get("DYNCTL_INCARNATION", "1"))
    seat = os.environ.get("DYNCTL_PROCESS", path.stem)
    logs.setup(seat)
    try:
        runtime.run(run(read_spec(path), incarnation))
    except Superseded as error:
        logger.warning("frontend.superseded %s", error)
        return 1
    except DynctlError as error:
        logger.error("frontend.failed %s", error)
        words = LastWords(id=seat, incarnation=incarnation, kind=error.kind, message=str(error))
        words.save(Path.cwd())
        return 1
    return 0


def read_spec(path: Path) -> FrontendSpec:
    """The spec in `path`. Raises LaunchError naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=FrontendSpec)
    except (OSError, msgspec.MsgspecError) as error:
        raise LaunchError(f"not a frontend spec: {error}", where=str(path)) from error


if __name__ == "__main__":
    sys.exit(main())
