"""`dynctl up` on hosts that are reached by SSH."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from dynctl.cli.elsewhere import command_there, run_async, save_remote
from dynctl.cli.pick import home
from dynctl.cli.render import prose
from dynctl.deploy.home import Home, new_run_id
from dynctl.deploy.remote import HostSite, Started, raise_first, start, sweep, with_addresses
from dynctl.deploy.run import Checked
from dynctl.launchers.bootstrap import Bootstrap, interpreter
from dynctl.launchers.probe import HostFacts, probe
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_config import SshOptions
from dynctl.launchers.ssh_host import SshHost
from dynctl.launchers.ssh_terminal import forward
from dynctl.recipe.lock import lock_text
from dynctl.topology.inventory import Host, with_gpus


@dataclass(frozen=True, slots=True)
class How:
    """How the user wants it."""

    detach: bool
    timeout_s: float | None
    as_json: bool
    bootstrap: bool
    wheelhouse: Path | None


def up_over_ssh(checked: Checked, how: How) -> int:
    """Start what the recipe says on the hosts of its inventory, and attend it; the exit code."""
    home().prepare()
    return run_async(_up(checked, how))


async def _up(checked: Checked, how: How) -> int:
    async with SshHosts(SshOptions.find(os.environ)) as hosts:
        reached = await _reach(checked, hosts)
        prose(f"{len(reached)} hosts reached: {', '.join(reached)}", style="dim")
        checked, sites = await _look(checked, reached, how)
        run_id = new_run_id(checked.loaded.recipe.name, time.gmtime())
        started = await start(checked, lock_text(checked.loaded, metadata.version("dynctl")), sites, run_id)
        return await _attend(started, sites, reached, how)


async def _reach(checked: Checked, hosts: SshHosts) -> dict[str, SshHost]:
    """A connection to every host. Raises SshError that tells of all that could not be reached."""
    found = await hosts.connect_all(checked.inventory.hosts)
    raise_first(found.values())
    return {name: one for name, one in found.items() if isinstance(one, SshHost)}


async def _look(checked: Checked, reached: Mapping[str, SshHost], how: How) -> tuple[Checked, list[HostSite]]:
    """What each host is: interpreter, GPUs, address, ports in use."""
    looked = await asyncio.gather(
        *(_look_at(host, reached[host.name], how) for host in checked.inventory.hosts), return_exceptions=True
    )
    raise_first(looked)
    seen = [one for one in looked if isinstance(one, tuple)]
    facts = {site.name: told for site, told in seen}
    inventory = with_gpus(checked.inventory, {name: len(told.gpus) for name, told in facts.items()})
    inventory = with_addresses(inventory, {name: told.reached_at for name, told in facts.items()})
    return replace(checked, inventory=inventory), [site for site, _ in seen]


async def _look_at(host: Host, shell: SshHost, how: How) -> tuple[HostSite, HostFacts]:
    told = await probe(shell)
    python = await interpreter(shell, host, told, Bootstrap(how.bootstrap, how.wheelhouse))
    there = f"{told.home}/.dynctl"
    return HostSite(host.name, shell, python, there, frozenset(told.listening), host.ssh), told


async def _attend(
    started: Started, sites: Sequence[HostSite], reached: Mapping[str, SshHost], how: How
) -> int:
    """Write down where it is, then have the head wait until it is ready; without success nothing is left."""
    plan, remote = started.plan, started.remote
    place = Home(home().root)
    run = place.run_of(plan.name)
    if run is None or run.run_id != plan.run_id:
        run = place.create_run(plan.run_id, {})
        place.point(plan.name, run)
    save_remote(run, remote)
    args = [plan.name]
    args += ["--detach"] if how.detach else []
    args += ["--timeout", f"{how.timeout_s}s"] if how.timeout_s is not None else []
    args += ["--json"] if how.as_json else []
    args += ["--adopted"] if started.adopted else []
    code = await forward(reached[remote.head.name], command_there(remote, "attend", args))
    if code not in (0, 130) and not started.adopted:
        await sweep(sites, plan.run_id, 0.0)
    return code
