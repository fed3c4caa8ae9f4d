"""`dynctl up` on hosts that are reached by SSH."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import msgspec

from dynctl.cli.elsewhere import command_there, run_async
from dynctl.cli.limit import Limit
from dynctl.cli.pick import home
from dynctl.cli.render import counted, program, prose
from dynctl.cli.up_ssh_again import Change, alone, change_there, require_head
from dynctl.deploy.home import new_run_id
from dynctl.deploy.remote import Started, Wanted, given_up, is_ip, start, with_addresses
from dynctl.deploy.remote_hosts import HostSite, raise_first, sweep
from dynctl.deploy.remote_note import Remote, read_remote, save_keys, save_remote
from dynctl.deploy.run import Checked
from dynctl.errors import HostPythonMissing, SshError
from dynctl.launchers.bootstrap import Bootstrap, bootstrap, find_dynctl, named_dynctl, read_wheelhouse
from dynctl.launchers.probe import probe
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_config import SshOptions
from dynctl.launchers.ssh_host import SshHost
from dynctl.launchers.ssh_terminal import forward
from dynctl.launchers.wheel import Wheel, own_wheel
from dynctl.protocol.hosts import HostFacts, HostQuestion
from dynctl.recipe.lock import lock_text
from dynctl.topology.inventory import Host, with_gpus

_LOOK_S = 15.0


@dataclass(frozen=True, slots=True)
class How:
    """How the user wants it."""

    detach: bool
    limit: Limit
    as_json: bool
    bootstrap: bool
    wheelhouse: Path | None
    share_gpus: bool
    change: Change = field(default_factory=Change)


def up_over_ssh(checked: Checked, how: How) -> int:
    """Start what the recipe says on the hosts of its inventory, and attend it; the exit code."""
    home().prepare()
    return run_async(_up(checked, how))


async def _up(checked: Checked, how: How) -> int:
    limit, name = how.limit, checked.loaded.recipe.name
    async with SshHosts(SshOptions.find(os.environ)) as hosts:
        changed = await change_there(checked, hosts, how.change, limit)
        if changed is not None:
            return changed
        async with limit.during(name, "its hosts were being connected to"):
            reached, missing = await _reach(checked, hosts)
        prose(f"{counted(len(reached), 'host')} reached: {', '.join(reached)}", style="dim")
        async with limit.during(name, "its hosts were being looked at"):
            checked, sites = await _look(checked, reached, missing, how)
        run_id = new_run_id(name, time.gmtime())
        lock = lock_text(checked.loaded, metadata.version("dynctl"))
        wanted = Wanted(run_id, lock, how.share_gpus, tuple(missing))
        async with limit.during(name, "it was being started on its hosts"), alone(name):
            require_head(checked)
            started = await start(checked, wanted, sites, note)
        for error in missing:
            prose(str(error), style="warning")
        return await _attend(started, sites, reached, how)


async def _reach(checked: Checked, hosts: SshHosts) -> tuple[dict[str, SshHost], list[SshError]]:
    """Connections to the hosts, and why there is none to others. Raises SshError that tells of all when the
    head, or any of what does not run yet, cannot be reached.
    """
    found = await hosts.connect_all(checked.inventory.hosts)
    missing = [one for one in found.values() if isinstance(one, SshError)]
    head = found[checked.inventory.hosts[0].name]
    if isinstance(head, SshError) or not is_noted(checked.loaded.recipe.name):
        raise_first(missing)
    return {name: one for name, one in found.items() if isinstance(one, SshHost)}, missing


def is_noted(name: str) -> bool:
    """Whether something of this name runs as far as is known here: the note of what has ended stays."""
    noted = home().note_of(name)
    return noted is not None and not read_remote(noted).ended


async def _look(
    checked: Checked, reached: Mapping[str, SshHost], missing: Sequence[SshError], how: How
) -> tuple[Checked, list[HostSite]]:
    """What each host is: interpreter, GPUs, address, ports in use. Raises what tells of all that are wrong,
    those that are `missing` too.
    """
    # Made of all files of dynctl, so only for hosts where its digest says where to look.
    unnamed = how.bootstrap or not all(host.python for host in checked.inventory.hosts)
    wheel = await asyncio.to_thread(own_wheel) if unnamed else None
    looks = (
        _look_at(host, reached[host.name], wheel, how)
        for host in checked.inventory.hosts
        if host.name in reached
    )
    looked = await asyncio.gather(*looks, return_exceptions=True)
    if any(isinstance(one, BaseException) for one in looked):
        raise_first([*missing, *looked])
    seen = [one for one in looked if isinstance(one, tuple)]
    inventory = with_gpus(checked.inventory, {site.name: len(told.gpus) for site, told, _ in seen})
    inventory = with_addresses(inventory, {site.name: address for site, _, address in seen})
    return replace(checked, inventory=inventory), [site for site, _, _ in seen]


async def _look_at(
    host: Host, shell: SshHost, wheel: Wheel | None, how: How
) -> tuple[HostSite, HostFacts, str]:
    dynctl = asyncio.ensure_future(_dynctl(host, shell, wheel, how))
    facts = asyncio.ensure_future(probe(shell, HostQuestion(), python=host.python))
    dialled = asyncio.ensure_future(reached_at(shell))
    await asyncio.gather(dynctl, facts, dialled, return_exceptions=True)
    # Without a Python nothing else is worth a word; then the verdict on dynctl there: what else a Python that
    # will not do says differs from time to time.
    if isinstance(none := facts.exception(), HostPythonMissing):
        raise none
    python, told, address = dynctl.result(), facts.result(), dialled.result()
    there = host.directory.replace("~", told.home, 1) if host.directory else f"{told.home}/.dynctl"
    taken, busy = frozenset(told.listening), busy_gpus(told)
    return HostSite(host.name, shell, python, there, taken, host.ssh, busy, shell.dialled), told, address


def busy_gpus(told: HostFacts) -> dict[int, str]:
    """Who uses which GPU there."""
    return {
        gpu.index: ", ".join(f"{one.name or 'a process'} (pid {one.pid})" for one in gpu.processes)
        for gpu in told.gpus
        if gpu.processes
    }


async def _dynctl(host: Host, shell: SshHost, wheel: Wheel | None, how: How) -> str:
    """The interpreter there that has this dynctl, brought there if that was asked for."""
    if wheel is None:
        return await named_dynctl(shell, host, metadata.version("dynctl"))
    if not how.bootstrap:
        return await find_dynctl(shell, host, wheel)
    wheels = read_wheelhouse(how.wheelhouse, wheel) if how.wheelhouse is not None else {}
    return await bootstrap(shell, host, Bootstrap(wheel, wheels), _progress)


def _progress(host: str, step: str) -> None:
    prose(f"{host}: {step}", style="dim")


async def reached_at(shell: SshHost) -> str:
    """The address this host was reached at, as itself sees it: behind a jump host, its inner one."""
    said = await shell.check(["sh", "-c", 'printf "\\n%s\\n" "$SSH_CONNECTION"'], timeout_s=_LOOK_S)
    words = said.decode("ascii", "replace").split()[-2:]
    if len(words) < 2 or not is_ip(words[0]):
        hint = "`address` in the inventory names it"
        raise SshError("the host does not say at which address it was reached", where=shell.name, hint=hint)
    return words[0]


def note(remote: Remote, keys: str) -> None:
    """Write down here where a run is: its name means that from now on. Raises LaunchError, UsageError.

    The keys, too, where its controller can be asked from here: whoever may read them may read them there.
    Hosts of the same run that could not be reached this time stay written down: they may hold parts of it.
    """
    place = home().make_note(remote.name)
    before = read_remote(place) if place.remote.exists() else None
    if before is not None and before.run_id == remote.run_id:
        names = {host.name for host in remote.hosts}
        kept = [host for host in before.hosts if host.name not in names]
        remote = msgspec.structs.replace(remote, hosts=[*remote.hosts, *kept])
    save_keys(place, keys if remote.controller else "")
    save_remote(place, remote)


async def _attend(
    started: Started, sites: Sequence[HostSite], reached: Mapping[str, SshHost], how: How
) -> int:
    """Have the head wait until it is ready; without success nothing is left."""
    plan, remote = started.plan, started.remote
    if started.running:
        prose(f"{plan.name} is running already, from the same recipe: every host has its agent", style="good")
    elif started.adopted:
        prose(f"{plan.name}: a new controller takes over what lives")
    args = [plan.name]
    args += ["--detach"] if how.detach else []
    args += how.limit.options()
    args += ["--json"] if how.as_json else []
    args += ["--adopted"] if started.adopted else []
    code = await forward(reached[remote.head.name], command_there(remote, "attend", args))
    if code not in (0, 130) and not started.adopted:
        failed = await sweep(sites, plan.run_id, 0.0)
        note(given_up(remote, failed), "")
        if failed:
            ends = f"{program()} down {plan.name} ends them once it can be reached"
            prose(f"processes may be left on {', '.join(sorted(failed))}: {ends}", style="warning")
    return code
