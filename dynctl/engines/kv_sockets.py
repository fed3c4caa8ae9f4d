"""Where an engine that speaks ZeroMQ publishes KV events for the sidecar beside it. Pure.

Events hold the tokens of all prompts, and whoever can connect to a port of the machine can read them: so they
go over unix sockets in the run directory, which only its owner can enter, wherever the engine can bind them.
"""

from __future__ import annotations

from dynctl.engines.base import EngineLaunch

FOLDER = "sockets"
"""In the run directory, the working directory of engine and sidecar: relative paths stay short enough."""


def unix_endpoints(launch: EngineLaunch) -> tuple[str, str] | None:
    """The endpoints of events and of their replay; None where they must be ports.

    That is with several data-parallel ranks, whose endpoints engines tell apart by port alone, and in a
    container, which may not see the run directory. Named for the engine's port: its role may change.
    """
    if launch.parallel.data > 1 or launch.environment.container:
        return None
    name = f"ipc://{FOLDER}/{launch.ports['http']}"
    return f"{name}.kv", f"{name}.replay"
