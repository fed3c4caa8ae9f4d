"""`dynctl up` on the name of what runs on other machines: the head is told the recipe and applies it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

import msgspec

from dynctl.cli.elsewhere import command_there, host_of
from dynctl.cli.limit import Limit
from dynctl.cli.pick import home
from dynctl.deploy.claim import same_text
from dynctl.deploy.home import next_name
from dynctl.deploy.remote_note import Remote, read_remote
from dynctl.deploy.run import Checked
from dynctl.errors import LaunchError
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_host import SshHost
from dynctl.launchers.ssh_terminal import forward
from dynctl.recipe.lock import lock_text

ANSWER_S = 30.0
_PUT = 'umask 077; cat > "$0.tmp" && mv "$0.tmp" "$0"'


@dataclass(frozen=True, slots=True)
class Change:
    """How the user wants a change of what runs."""

    yes: bool = False
    force: bool = False
    as_json: bool = False


async def change_there(checked: Checked, hosts: SshHosts, how: Change, limit: Limit) -> int | None:
    """Change what runs under this name; its exit code. None: no controller looks after it, or its recipe is
    this one; then `up` sees to it that all of it runs.
    """
    async with limit.during(checked.loaded.recipe.name, "its head was being asked what runs there"):
        put = await _put_there(checked, hosts)
    if put is None:
        return None
    head, remote, name = put
    args = [
        remote.name,
        "--recipe",
        name,
        *(["--yes"] if how.yes else []),
        *(["--force"] if how.force else []),
    ]
    args += limit.options()
    args += ["--json"] if how.as_json else []
    return await forward(head, command_there(remote, "apply", args))


async def _put_there(checked: Checked, hosts: SshHosts) -> tuple[SshHost, Remote, str] | None:
    """Put the recipe where it is to be applied: the head, the run, the file's name. None: `change_there`."""
    run = home().note_of(checked.loaded.recipe.name)
    if run is None:
        return None
    remote = read_remote(run)
    if remote.ended:
        return None
    head = await hosts.connect(host_of(remote.head))
    if not await _supervised(head, remote):
        return None
    folder = f"{remote.head.home}/runs/{remote.run_id}"
    lock = lock_text(checked.loaded, metadata.version("dynctl"))
    now = await head.run(["cat", f"{folder}/recipe.lock.yaml"], timeout_s=ANSWER_S)
    if same_text(now.stdout.decode(errors="replace"), lock):
        return None
    name = next_name()
    put = await head.run(["sh", "-c", _PUT, f"{folder}/{name}"], stdin=lock.encode(), timeout_s=ANSWER_S)
    if put.code:
        why = put.stderr.decode(errors="replace").strip()
        raise LaunchError(f"the recipe cannot be written there: {why}", where=remote.head.name)
    return head, remote, name


async def _supervised(head: SshHost, remote: Remote) -> bool:
    """Whether its controller lives, as the head says."""
    done = await head.run(command_there(remote, "status", [remote.name, "--json"]), timeout_s=ANSWER_S)
    try:
        told = msgspec.json.decode(done.stdout or b"null")
    except msgspec.MsgspecError:
        return False
    return isinstance(told, dict) and bool(told.get("controller_pid"))
