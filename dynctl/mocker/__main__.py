"""`python -m dynctl.mocker`: an engine without a model."""

from __future__ import annotations

import logging
import sys

from dynctl.errors import DynctlError
from dynctl.http.runtime import run as run_loop
from dynctl.mocker.options import parse_options
from dynctl.mocker.service import run


def main() -> int:
    """Parse the command line and serve; the exit code."""
    options = parse_options(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s [%(name)s] %(message)s")
    if options.fault_die_at_start:
        sys.stderr.write(f"RuntimeError: {options.fault_die_at_start}\n")
        return 1
    try:
        return run_loop(run(options))
    except DynctlError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
