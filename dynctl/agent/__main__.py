"""`python -m dynctl.agent --run-dir DIR --run-id ID --node NAME --endpoint tcp://IP:PORT`: a node's hands."""

from __future__ import annotations

import sys

from dynctl.agent.keeper import keep


def agent() -> int:
    """The agent itself; its exit code."""
    from dynctl.agent.process import main  # here, since the keeper needs nothing of it

    return main()


if __name__ == "__main__":
    sys.exit(keep(agent))
