"""Follow-up jobs at Slurm and on disk: submitted, used, given back. Everything here blocks.

A job is written down before it is submitted, so that whoever comes after finds it by its name.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import msgspec

from dynctl.controller.follow_ups import Lacking, Seen, Submit, lost_groups
from dynctl.controller.moving import Lack
from dynctl.controller.slurm_successor import seconds_left
from dynctl.deploy.amend import hosts_of
from dynctl.deploy.disk import disk
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.run import INVENTORY
from dynctl.deploy.slurm_follow_up import LOG, follow_up_script
from dynctl.deploy.slurm_grow import awaited_groups
from dynctl.deploy.slurm_inventory import hosts_of_job
from dynctl.deploy.slurm_script import JobContext
from dynctl.deploy.slurm_size import Size, gpus_of_kind, kinds_of
from dynctl.deploy.slurm_up import staged_recipe
from dynctl.errors import DynctlError, LaunchError, SlurmUnreachable
from dynctl.launchers.files import write_atomic
from dynctl.launchers.slurm_client import JobRow, SlurmClient
from dynctl.launchers.slurm_fleet import SlurmFleet
from dynctl.launchers.slurm_follow import FollowUp, save_follow_ups
from dynctl.launchers.slurm_job import FRESH_S, JobRecord, JobTable
from dynctl.launchers.slurm_step import JobSite, run_on
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.slurm import Slurm
from dynctl.topology.inventory import Host, Inventory, is_awaited

TRY_S = 20.0
"""For a node that has been given to answer."""


class GivenTwice(LaunchError):
    """A job has been given a node that the deployment has already: another one will not be."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What following up works with. `own` are the nodes of the deployment's own job; `stage(site, source,
    target, nodes)` copies a model to nodes' disks.
    """

    run: RunDir
    client: SlurmClient
    fleet: SlurmFleet
    site: JobSite
    own: Collection[str]
    stage: Callable[[JobSite, str, str, Sequence[str]], None]


class FollowUpJobs:
    """Those of one deployment. `known` are the ones that have not ended as far as is known."""

    def __init__(self, ways: Ways, known: Sequence[FollowUp]) -> None:
        self.known = list(known)
        self._ways = ways
        self._table = JobTable(ways.client, [one.job for one in known])

    def options(self) -> Slurm:
        """What the recipe says of Slurm. Raises RecipeError."""
        return self._recipe().recipe.slurm or Slurm()

    def facts(self, lack: Lack) -> tuple[list[Lacking], list[Seen]]:
        """What is lacking, and the jobs as Slurm has them. Raises DynctlError."""
        seen, now = [], time.time()
        for one in self.known:
            doubtful = not lack.lost.isdisjoint(one.nodes)  # what Slurm has just said may be from before
            row, age_s = self._table.row(one.job, fresh=doubtful), now - one.job.submitted_at
            seen.append(Seen(one, row, fresh=age_s < FRESH_S, waited_s=age_s))
        if not lack.nodes:
            return [], seen
        roles = [role for role, _ in kinds_of(self._recipe())]
        lost = frozenset(node for node in lack.nodes if not is_awaited(node))
        apart, together = lost_groups(lack.plan, lost)
        hosts = self._inventory(lack.plan).hosts if apart else ()
        parts = [_part_of(roles, host) for host in hosts if host.name in apart]
        lacking = [Lacking(part, parts.count(part)) for part in sorted(set(parts))]
        for role, nodes in together:
            part = next((i for i, one in enumerate(roles) if one in (None, role)), 0)
            lacking.append(Lacking(part, nodes, whole=True))
        for part, groups in sorted(awaited_groups(lack.plan, roles).items()):
            lacking += [Lacking(part, nodes, grows=True, whole=nodes > 1) for nodes in groups]
        return lacking, seen

    def submit(self, lack: Lack, what: Submit) -> FollowUp:
        """Submit a job and write it down, first that it may come to be. Raises DynctlError."""
        run, client = self._ways.run, self._ways.client
        loaded = self._recipe()
        if not (loaded.recipe.slurm or Slurm()).follow_up:
            raise LaunchError("no other job is asked for a node: slurm.follow_up is false")
        name = f"{run.run_id}.follow-{secrets.token_hex(2)}"
        context = JobContext(name, str(run.path), sys.executable, str(run.path.parent.parent))
        hosts = self._inventory(lack.plan)
        # Two jobs on one node would each count its GPUs from 0, and a lost one Slurm may not know to be lost.
        avoid = {host.name for host in hosts.hosts} - (self._ways.fleet.returned & lack.lost)
        avoid |= set(self._about_to_be_given())
        size = Size(what.nodes, gpus_of_kind(hosts, kinds_of(loaded)[what.part][0]))
        script = follow_up_script(loaded, context, what.part, size, avoid, seconds_left(run, client))
        record = JobRecord(job_id="", name=name, submitted_at=time.time())
        made = FollowUp(
            job=record, wanted=what.nodes, part=what.part, avoid=tuple(sorted(avoid)), grows=what.grows
        )
        before = list(self.known)
        self._keep([*before, made])
        environ = {k: v for k, v in os.environ.items() if k not in loaded.secrets}
        try:
            job_id = replace(client, environ=environ).submit(script, str(run.path))
        except SlurmUnreachable:
            raise  # it may have been taken: it is looked for by its name
        except DynctlError:
            self._keep(before)
            raise
        made = msgspec.structs.replace(made, job=msgspec.structs.replace(record, job_id=job_id))
        self._keep([*before, made])
        return made

    def _about_to_be_given(self) -> list[str]:
        """Nodes of jobs that have started, and are not used yet. Raises SlurmError."""
        rows = [self._table.row(one.job, fresh=True) for one in self.known if not one.nodes]
        lists = [row.nodes for row in rows if row is not None and row.active and row.nodes]
        return [name for one in lists for name in self._ways.client.hostnames(one)]

    def avoid(self, follow_up: FollowUp, row: JobRow, avoid: tuple[str, ...]) -> None:
        """It is to be given none of these nodes. Raises DynctlError."""
        wanted = kinds_of(self._recipe())[follow_up.part][1].exclude
        self._ways.client.avoid(row.id, [*filter(None, (wanted, *avoid))])
        self._replace(msgspec.structs.replace(follow_up, avoid=avoid))

    def take(self, lack: Lack, follow_up: FollowUp, row: JobRow) -> FollowUp:
        """Write its nodes down, with the model on their disks if it is staged. Raises DynctlError."""
        run, client = self._ways.run, self._ways.client
        loaded = self._recipe()
        names = client.hostnames(row.nodes)
        mine = {*self._ways.own} - lack.lost | {node for one in self.known for node in one.nodes}
        if twice := sorted(mine & set(names)):
            raise GivenTwice(f"job {row.id} was given {' '.join(twice)}, where the deployment is already")
        role = kinds_of(loaded)[follow_up.part][0]
        hosts = hosts_of_job(client, row.id, names)
        labelled = tuple(replace(host, labels=(role,) if role is not None else ()) for host in hosts)
        site = replace(self._ways.site, others=dict.fromkeys(names, row.id))
        # Slurm gives out nodes that it does not yet know to be dead.
        try:
            run_on(site, names, [sys.executable, "-c", ""], run.logs / LOG, TRY_S)
        except LaunchError as error:
            told = error.message.splitlines()[-1].strip()
            raise LaunchError(
                f"job {row.id} was given {' '.join(names)}, where nothing can be started: {told}"
            ) from error
        staged = staged_recipe(loaded)
        if staged is not loaded:
            self._ways.stage(site, loaded.model.directory, staged.recipe.model.path, names)
        self._write_hosts(lack, labelled)
        job = msgspec.structs.replace(follow_up.job, job_id=row.id)
        taken = msgspec.structs.replace(follow_up, job=job, nodes=tuple(names), started=row.start)
        self._replace(taken)
        return taken

    def cancel(self, follow_up: FollowUp) -> None:
        """End the job if it lives. Raises SlurmError."""
        row = self._table.row(follow_up.job, fresh=True)
        if row is not None and (row.active or row.pending):
            self._ways.client.cancel(row.id)

    def forget(self, lack: Lack, follow_up: FollowUp) -> None:
        """It is over: nothing new goes to its nodes. Raises DynctlError."""
        self._keep([one for one in self.known if one.job.name != follow_up.job.name])
        self._write_hosts(lack, ())

    def tidy(self, lack: Lack) -> None:
        """Nodes of jobs that have ended are no hosts once nothing is there any more. Raises DynctlError."""
        self._write_hosts(lack, ())

    def _write_hosts(self, lack: Lack, more: Sequence[Host]) -> None:
        """The hosts from now on: those of the job, of follow-up jobs, those in use, and `more`."""
        known, names = self._inventory(lack.plan), {host.name for host in more}
        given = {node for one in self.known for node in one.nodes}
        stay = {*self._ways.own, *given, *lack.busy} - names
        hosts = (*(host for host in known.hosts if host.name in stay), *more)
        if hosts == known.hosts:
            return
        with disk("the run directory cannot be written"):
            made = replace(known, hosts=hosts)
            write_atomic(self._ways.run.path / INVENTORY, msgspec.json.encode(made))

    def _replace(self, follow_up: FollowUp) -> None:
        self._keep([follow_up if one.job.name == follow_up.job.name else one for one in self.known])

    def _keep(self, follow_ups: Sequence[FollowUp]) -> None:
        save_follow_ups(self._ways.run.path, follow_ups)
        self.known = list(follow_ups)

    def _recipe(self) -> LoadedRecipe:
        return load_recipe(self._ways.run.lock, (), (), files_here=False)

    def _inventory(self, plan: Plan) -> Inventory:
        return hosts_of(self._ways.run, plan)


def _part_of(roles: Sequence[str | None], host: Host) -> int:
    """The number of the part of the job that a host is of."""
    return next((i for i, role in enumerate(roles) if role is None or role in host.labels), 0)
