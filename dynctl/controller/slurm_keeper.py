"""`python -m dynctl.controller.slurm_keeper --run-dir DIR`: keeps the controller of a job alive.

What the batch script runs. The job lasts as long as this: a controller that is killed must not take the
service with it, so another one takes over from it. Light, since it does nothing else.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from types import FrameType

RESUBMIT = "--resubmit"
"""The warning of the end starts a successor instead of the end."""
MOST_RESTARTS = 10
STABLE_S = 600.0
"""A controller that has lived so long was well: earlier ones no longer count."""
_PAUSE_S = 0.5
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main() -> int:
    """Until the controller has ended of itself; its exit code."""
    resubmit = RESUBMIT in sys.argv
    args = [arg for arg in sys.argv[1:] if arg != RESUBMIT]
    told: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGUSR1 and resubmit:
            subprocess.Popen([sys.executable, "-u", "-m", "dynctl.controller.slurm_successor", *args])
            return
        told.append(signum)
        if child is not None and child.poll() is None:
            child.send_signal(signum)

    for signum in _FORWARDED:
        signal.signal(signum, forward)
    restarts = 0
    while True:
        started = time.monotonic()
        argv = [sys.executable, "-u", "-m", "dynctl.controller.slurm_job", *args]
        child = subprocess.Popen(argv, preexec_fn=die_together)
        code = child.wait()
        restarts = 0 if time.monotonic() - started > STABLE_S else restarts + 1
        if code >= 0 or told or restarts > MOST_RESTARTS:
            return code if code >= 0 else 128 - code
        sys.stderr.write(f"the controller was killed by signal {-code}: another one takes over\n")
        time.sleep(_PAUSE_S)


def die_together() -> None:
    """In the child, before it begins: it is killed with us, since the job ends with us."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
