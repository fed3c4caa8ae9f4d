"""Follow-up jobs: when a job has lost a node and no other is free, another job gives one in its place.

The follow-up job starts nothing (`controller.slurm_holder`); once it runs, its nodes are hosts of the
deployment like others, on which the controller starts steps. It is given back when nothing is on it any more,
and when the deployment ends. One that Slurm refuses, or that ends, is tried again after longer and longer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from dynctl.controller.follow_ups import (
    Forget,
    Nodes,
    Release,
    Seen,
    Submit,
    Take,
    Widen,
    decide,
    one_step_over_nodes,
)
from dynctl.controller.slurm_successor import seconds_left
from dynctl.deploy.amend import hosts_of
from dynctl.deploy.disk import disk
from dynctl.deploy.events import append_event
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.run import INVENTORY
from dynctl.deploy.slurm_follow_up import LOG, follow_up_script
from dynctl.deploy.slurm_inventory import hosts_of_job
from dynctl.deploy.slurm_script import JobContext
from dynctl.deploy.slurm_size import parts_of
from dynctl.deploy.slurm_up import staged_recipe
from dynctl.deploy.slurm_view import pending_text
from dynctl.errors import DynctlError, LaunchError, SlurmUnreachable
from dynctl.launchers.files import write_atomic
from dynctl.launchers.slurm_client import JobRow, SlurmClient
from dynctl.launchers.slurm_fleet import SlurmFleet
from dynctl.launchers.slurm_follow import FollowUp, save_follow_ups
from dynctl.launchers.slurm_job import FRESH_S, JobRecord, JobTable
from dynctl.launchers.slurm_step import JobSite, run_on
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.slurm import Slurm
from dynctl.topology.inventory import Host, Inventory

logger = logging.getLogger(__name__)

LOOK_S, LOOK_IDLE_S = 2.0, 15.0
TRY_S = 20.0
"""For a node that has been given to answer."""
AGAIN_S, AGAIN_MOST_S = 10.0, 600.0
"""After a job that did not help: twice as long each time, until none has failed for the longest of these."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What following up works with. `stage(site, source, target, nodes)` copies a model to nodes' disks."""

    run: RunDir
    client: SlurmClient
    fleet: SlurmFleet
    site: JobSite
    stage: Callable[[JobSite, str, str, Sequence[str]], None]


class SlurmFollowUps:
    """As `More`, by jobs."""

    def __init__(self, ways: Ways, known: Sequence[FollowUp]) -> None:
        self.grown = 0
        self._ways = ways
        self._known = list(known)
        self._table = JobTable(ways.client, [one.job for one in known])
        self._wanted: tuple[frozenset[str], frozenset[str], Plan | None] = (frozenset(), frozenset(), None)
        self._rows: dict[str, JobRow | None] = {}
        self._said: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._failures = 0
        self._failed_at = self._again_at = 0.0

    def want(self, nodes: frozenset[str], lost: frozenset[str], plan: Plan) -> None:
        """As `More`."""
        if nodes != self._wanted[0]:
            self._wake.set()
        self._wanted = nodes, lost, plan
        if self._task is None and (nodes or self._known):
            self._task = asyncio.get_running_loop().create_task(self._follow(), name="follow-ups")

    def told(self) -> str:
        """As `More`."""
        return "; ".join(
            f"for {_nodes(one.wanted)} more, {pending_text(row, None)}"
            for one in self._known
            if (row := self._rows.get(one.job.name)) is not None and row.pending
        )

    async def dismiss(self) -> None:
        """As `More`."""
        await self.close()
        for one in list(self._known):
            try:
                await asyncio.to_thread(self._cancel, one)
            except DynctlError as error:
                # Its script ends by itself when it sees that the deployment has.
                logger.warning("follow_up.not_cancelled job=%s error=%s", one.job.job_id, error)

    async def close(self) -> None:
        """As `More`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
            except DynctlError as error:
                self._say_once("follow_up.unsure", message=str(error))
            except Exception:
                # The top of a task: what breaks here must not keep the next look from being taken.
                logger.exception("follow_up.broke")
            waits = self._wanted[0] or any(not one.nodes for one in self._known)
            try:
                async with asyncio.timeout(LOOK_S if waits else LOOK_IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        nodes, lost, plan = self._wanted
        if plan is None:
            return
        lacking, seen = await asyncio.to_thread(self._facts, nodes)
        self._rows = {one.follow_up.job.name: one.row for one in seen}
        for one in seen:
            if one.row is not None and one.row.pending:
                told = {"reason": one.row.reason, "job": one.row.id}
                self._say_once("follow_up.pending", about=one.follow_up.job.name, **told)
        used = {process.node for process in plan.processes}
        for act in decide(lacking, seen, Nodes(used, lost, self._ways.fleet.returned)):
            match act:
                case Submit(part, count):
                    await self._submit(part, count)
                case Take(follow_up, row):
                    await self._take(follow_up, row)
                case Widen(follow_up, row, back):
                    await asyncio.to_thread(self._widen, follow_up, row, back)
                case Release(follow_up, why, failed):
                    await asyncio.to_thread(self._cancel, follow_up)
                    self._let_go(follow_up, "follow_up.released", why, failed=failed)
                case Forget(follow_up, why):
                    self._let_go(follow_up, "follow_up.ended", why, failed=True)

    def _facts(self, nodes: Collection[str]) -> tuple[Mapping[int, int], list[Seen]]:
        """Nodes lacking by part, and the jobs as Slurm has them. Blocks. Raises DynctlError."""
        seen = []
        for one in self._known:
            row = self._table.row(one.job)
            seen.append(Seen(one, row, fresh=time.time() - one.job.submitted_at < FRESH_S))
        if not nodes:
            return {}, seen
        roles = [part.role for part in parts_of(self._recipe())]
        hosts = self._inventory().hosts
        parts = [_part_of(roles, host) for host in hosts if host.name in nodes]
        return {part: parts.count(part) for part in sorted(set(parts))}, seen

    async def _submit(self, part: int, count: int) -> None:
        now = time.monotonic()
        if now < self._again_at:
            return
        try:
            made = await asyncio.to_thread(self._submitted, part, count)
        except DynctlError as error:
            self._put_off(now)
            wait_s = round(self._again_at - now)
            self._say_once("follow_up.refused", message=str(error), again_in_s=wait_s)
            return
        self._say("follow_up.submitted", job=made.job.job_id, nodes=count)

    def _submitted(self, part: int, count: int) -> FollowUp:
        """Submit a job and write it down, first that it may come to be. Blocks. Raises DynctlError."""
        nodes, lost, plan = self._wanted
        run, client = self._ways.run, self._ways.client
        if plan is not None and (spread := one_step_over_nodes(plan, nodes)):
            raise LaunchError(f"the ranks of {' '.join(spread)} are one step, which cannot be of two jobs")
        loaded = self._recipe()
        options = loaded.recipe.slurm or Slurm()
        if not options.follow_up:
            raise LaunchError("no other job is asked for a node: slurm.follow_up is false")
        name = f"{run.run_id}.follow-{secrets.token_hex(2)}"
        context = JobContext(name, str(run.path), sys.executable, str(run.path.parent.parent))
        # Two jobs on one node would each count its GPUs from 0, and a lost one Slurm may not know to be lost.
        avoid = {host.name for host in self._inventory().hosts} - (self._ways.fleet.returned & lost)
        script = follow_up_script(loaded, context, part, count, avoid, seconds_left(run, client))
        record = JobRecord(job_id="", name=name, submitted_at=time.time())
        before, made = (
            list(self._known),
            FollowUp(job=record, wanted=count, part=part, avoid=tuple(sorted(avoid))),
        )
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

    def _widen(self, follow_up: FollowUp, row: JobRow, back: Collection[str]) -> None:
        """Nodes that are back may be given to it. Blocks. Raises DynctlError."""
        avoid = tuple(node for node in follow_up.avoid if node not in back)
        wanted = parts_of(self._recipe())[follow_up.part].options.exclude
        self._ways.client.avoid(row.id, [*filter(None, (wanted, *avoid))])
        wider = msgspec.structs.replace(follow_up, avoid=avoid)
        self._keep([wider if one.job.name == wider.job.name else one for one in self._known])

    async def _take(self, follow_up: FollowUp, row: JobRow) -> None:
        """Have its nodes among the deployment's hosts."""
        try:
            taken = await asyncio.to_thread(self._taken, follow_up, row)
        except DynctlError as error:
            await asyncio.to_thread(self._cancel, follow_up)
            self._let_go(follow_up, "follow_up.released", str(error), failed=True)
            return
        self._ways.fleet.join(taken.nodes, row.id, self._wanted[1])
        self.grown += 1
        self._say("follow_up.started", job=row.id, nodes=" ".join(taken.nodes))

    def _taken(self, follow_up: FollowUp, row: JobRow) -> FollowUp:
        """Write its nodes down, with the model on their disks if it is staged. Blocks. Raises DynctlError."""
        run, client = self._ways.run, self._ways.client
        loaded, known = self._recipe(), self._inventory()
        names = client.hostnames(row.nodes)
        role = parts_of(loaded)[follow_up.part].role
        hosts = hosts_of_job(client, row.id, names)
        labelled = tuple(replace(host, labels=(role,) if role is not None else ()) for host in hosts)
        site = replace(self._ways.site, others=dict.fromkeys(names, row.id))
        # Slurm gives out nodes that it does not yet know to be dead.
        run_on(site, names, [sys.executable, "-c", ""], run.logs / LOG, TRY_S)
        staged = staged_recipe(loaded)
        if staged is not loaded:
            self._ways.stage(site, loaded.model.directory, staged.recipe.model.path, names)
        others = tuple(host for host in known.hosts if host.name not in names)
        with disk("the run directory cannot be written"):
            made = replace(known, hosts=(*others, *labelled))
            write_atomic(run.path / INVENTORY, msgspec.json.encode(made))
        job = msgspec.structs.replace(follow_up.job, job_id=row.id)
        taken = msgspec.structs.replace(follow_up, job=job, nodes=tuple(names), started=row.start)
        self._keep([taken if one.job.name == job.name else one for one in self._known])
        return taken

    def _let_go(self, follow_up: FollowUp, event: str, why: str, *, failed: bool) -> None:
        """It is over: its nodes are lost."""
        self._ways.fleet.part(follow_up.job.job_id, self._wanted[1], why)
        self._keep([one for one in self._known if one.job.name != follow_up.job.name])
        if failed:
            self._put_off(time.monotonic())
        self._say(event, job=follow_up.job.job_id, message=why)

    def _put_off(self, now: float) -> None:
        self._failures = self._failures + 1 if now - self._failed_at < AGAIN_MOST_S else 1
        self._failed_at = now
        self._again_at = now + min(AGAIN_MOST_S, AGAIN_S * 2.0 ** min(self._failures - 1, 16))

    def _cancel(self, follow_up: FollowUp) -> None:
        """End the job if it lives. Blocks. Raises SlurmError."""
        row = self._table.row(follow_up.job, fresh=True)
        if row is not None and (row.active or row.pending):
            self._ways.client.cancel(row.id)

    def _keep(self, follow_ups: Sequence[FollowUp]) -> None:
        save_follow_ups(self._ways.run.path, follow_ups)
        self._known = list(follow_ups)

    def _recipe(self) -> LoadedRecipe:
        return load_recipe(self._ways.run.lock, (), (), files_here=False)

    def _inventory(self) -> Inventory:
        plan = self._wanted[2]
        assert plan is not None
        return hosts_of(self._ways.run, plan)

    def _say_once(self, event: str, about: str = "", **fields: str | int) -> None:
        """Not again while it is the same but for numbers."""
        words = " ".join(str(value) for value in fields.values() if isinstance(value, str))
        if self._said.get(event + about) != words:
            self._said[event + about] = words
            self._say(event, **fields)

    def _say(self, event: str, **fields: str | int) -> None:
        logger.info("%s %s", event, " ".join(f"{k}={v}" for k, v in fields.items()))
        try:
            append_event(self._ways.run.events, time.time(), event, **fields)
        except OSError as error:
            # The event is in the log, where there is room.
            logger.error("events.unwritable error=%s", error)


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _part_of(roles: Sequence[str | None], host: Host) -> int:
    """The number of the part of the job that a host is of."""
    return next((i for i, role in enumerate(roles) if role is None or role in host.labels), 0)
