"""What a verb's exit code means: the one table, and which error gives which.

0    done
1    an error not listed below (with DYNCTL_DEBUG=1 its traceback is shown)
2    called wrongly: unknown verb or option, unknown deployment, a name that is taken
3    the recipe or inventory is wrong
4    the recipe does not fit the nodes, GPUs or ports, or Slurm refuses the job; doctor: something is wrong
5    a process could not be started, or did not live
6    not ready before the deadline
7    a port is in use; doctor: and nothing else is wrong
8    the controller, a service, a host or Slurm could not be reached
9    the service answered with an error
130  interrupted
141  the reader of standard output went away
"""

from __future__ import annotations

EXIT_CODES = {
    "usage": 2,
    "recipe": 3,
    "planner": 3,
    "placement": 4,
    "slurm_rejected": 4,
    "launch": 5,
    "slurm": 5,
    "process_exited": 5,
    "not_ready": 6,
    "port_in_use": 7,
    "node_silent": 8,
    "slurm_unreachable": 8,
    "transport": 8,
    "peer_lost": 8,
    "connect_failed": 8,
    "deadline_exceeded": 8,
    "discovery": 8,
    "ssh": 8,
    "host_unreachable": 8,
    "host_timeout": 8,
    "host_lost": 8,
    "host_key_unknown": 8,
    "host_key_changed": 8,
    "ssh_auth": 8,
    "host_disk_full": 5,
    "host_python": 5,
    "host_dynctl": 5,
    "request": 9,
    "model_not_found": 9,
    "unauthorized": 9,
    "forbidden": 9,
    "overloaded": 9,
    "rejected": 9,
    "context_length_exceeded": 9,
    "engine_failed": 9,
}
"""`DynctlError.kind` → exit code; any other kind is 1."""

UNFIT_HOST = EXIT_CODES["placement"]
UNFIT_FOR = {"reach": EXIT_CODES["transport"], "ports": EXIT_CODES["port_in_use"]}
"""What `doctor` exits with when all that fails is this check; `reach` goes before the others."""

INTERRUPTED = 130
PIPE_CLOSED = 141
