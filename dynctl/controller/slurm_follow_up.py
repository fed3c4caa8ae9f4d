"""Follow-up jobs: nodes for more replicas than the job has room for, and in the place of lost nodes.

A follow-up job starts nothing (`controller.slurm_holder`); once it runs, its nodes are hosts of the
deployment like others, on which the controller starts steps. It is given back when nothing is on it any
more, and when the deployment ends. In the place of lost nodes one that Slurm refuses, or that ends, is tried
again after longer and longer; for more replicas it is given up, since the deployment does without them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from dynctl.controller.follow_ups import Avoid, Forget, Nodes, Release, Seen, Submit, Take, decide
from dynctl.controller.moving import Lack
from dynctl.controller.slurm_follow_jobs import FollowUpJobs, GivenTwice, Ways
from dynctl.deploy.events import append_event
from dynctl.deploy.plan import Plan
from dynctl.deploy.slurm_view import pending_text
from dynctl.errors import DynctlError, PlacementError, RecipeError, SlurmRejected
from dynctl.launchers.slurm_client import JobRow
from dynctl.launchers.slurm_follow import FollowUp

logger = logging.getLogger(__name__)

LOOK_S, LOOK_IDLE_S = 2.0, 15.0
SOON_S = 0.5
"""After a job was submitted, before the next one is: that must avoid the nodes that the first may get."""
AGAIN_S, AGAIN_MOST_S = 10.0, 600.0
"""After a job that did not help: twice as long each time, until none has failed for the longest of these."""
NEW_S = 30.0
"""A new controller does not know yet which nodes are lost: it gives back none of what it has found."""
_FOR_GOOD = (SlurmRejected, RecipeError, PlacementError)
"""What a job is refused with the next time too."""


class SlurmFollowUps:
    """As `More`, by jobs."""

    def __init__(self, ways: Ways, known: Sequence[FollowUp]) -> None:
        self.grown = 0
        self._ways = ways
        self._jobs = FollowUpJobs(ways, known)
        self._lack: Lack | None = None
        self._rows: dict[str, JobRow | None] = {}
        self._said: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._failures = 0
        self._failed_at = self._again_at = 0.0
        self._settled_at = time.monotonic() + (NEW_S if known else 0.0)
        self._hurry = False
        self._hopeless = self._trouble = ""
        self._given_up: Plan | None = None

    def want(self, lack: Lack) -> None:
        """As `More`."""
        before, self._lack = self._lack, lack
        if before is None or (lack.nodes, lack.busy, lack.lost) != (before.nodes, before.busy, before.lost):
            self._wake.set()
        if self._task is None and (lack.nodes or self._jobs.known):
            self._task = asyncio.get_running_loop().create_task(self._follow(), name="follow-ups")

    def told(self) -> str:
        """As `More`."""
        waits = [
            f"for {_nodes(one.wanted)} more, {pending_text(row, None)}"
            for one in self._jobs.known
            if (row := self._rows.get(one.job.name)) is not None and row.pending
        ]
        lacks = self._lack is not None and self._lack.nodes
        return "; ".join(waits or ([self._trouble] if lacks and self._trouble else []))

    def remedy(self) -> str:
        """As `More`."""
        try:
            asks = self._jobs.options().follow_up
        except DynctlError as error:
            return str(error)
        if asks:
            return "another job is asked for a node in its place"
        return "slurm.follow_up: true would ask for another job, slurm.spares has nodes ready"

    def hopeless(self) -> str:
        """As `More`."""
        why, self._hopeless = self._hopeless, ""
        return why

    async def dismiss(self) -> None:
        """As `More`."""
        await self.close()
        for one in list(self._jobs.known):
            try:
                await asyncio.to_thread(self._jobs.cancel, one)
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
            self._hurry = False
            try:
                if self._lack is not None:
                    await self._look(self._lack)
            except DynctlError as error:
                self._say_once("follow_up.unsure", message=str(error))
            except Exception:
                # The top of a task: what breaks here must not keep the next look from being taken.
                logger.exception("follow_up.broke")
            if self._hurry:
                await asyncio.sleep(SOON_S)
                continue
            waits = (self._lack and self._lack.nodes) or any(not one.nodes for one in self._jobs.known)
            try:
                async with asyncio.timeout(LOOK_S if waits else LOOK_IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _look(self, lack: Lack) -> None:
        lacking, seen = await asyncio.to_thread(self._jobs.facts, lack)
        self._tell_pending(seen)
        self._hurry = any(one.unsettled for one in seen)
        most_s = (await asyncio.to_thread(self._jobs.options)).grow_within if lacking else 0.0
        new = time.monotonic() < self._settled_at
        for act in decide(lacking, seen, Nodes(lack.busy, lack.lost, self._ways.fleet.returned), most_s):
            match act:
                case Submit():
                    await self._submit(lack, act)
                case Take(follow_up, row):
                    await self._take(lack, follow_up, row)
                case Avoid(follow_up, row, avoid):
                    await asyncio.to_thread(self._jobs.avoid, follow_up, row, avoid)
                case Release(follow_up, why, failed):
                    if failed or not new:
                        await self._release(lack, act)
                case Forget(follow_up, why):
                    cancelled = self._rows.get(follow_up.job.name) is not None and not follow_up.nodes
                    await self._let_go(lack, "follow_up.ended", Release(follow_up, why, failed=True))
                    if follow_up.grows and cancelled:
                        self._give_up(lack, why)
        await asyncio.to_thread(self._jobs.tidy, lack)

    def _tell_pending(self, seen: Sequence[Seen]) -> None:
        self._rows = {one.follow_up.job.name: one.row for one in seen}
        for one in seen:
            if one.row is not None and one.row.pending:
                told = {"reason": one.row.reason, "job": one.row.id}
                self._say_once("follow_up.pending", about=one.follow_up.job.name, **told)

    async def _submit(self, lack: Lack, what: Submit) -> None:
        now = time.monotonic()
        if self._hurry or now < self._again_at or (what.grows and lack.plan is self._given_up):
            return
        try:
            made = await asyncio.to_thread(self._jobs.submit, lack, what)
        except DynctlError as error:
            if what.grows and isinstance(error, _FOR_GOOD):
                self._say("follow_up.refused", message=str(error))
                self._give_up(lack, str(error))
                return
            self._put_off(now)
            wait_s, self._trouble = round(self._again_at - now), f"{error}: it is asked again"
            self._say_once("follow_up.refused", message=str(error), again_in_s=wait_s)
            return
        self._hurry = True
        self._say("follow_up.submitted", job=made.job.job_id, nodes=what.nodes)

    async def _take(self, lack: Lack, follow_up: FollowUp, row: JobRow) -> None:
        """Have its nodes among the deployment's hosts."""
        try:
            taken = await asyncio.to_thread(self._jobs.take, lack, follow_up, row)
        except DynctlError as error:
            await asyncio.to_thread(self._jobs.cancel, follow_up)
            failed = not isinstance(error, GivenTwice)
            await self._let_go(lack, "follow_up.released", Release(follow_up, _line(error), failed))
            return
        self._trouble = ""
        self._ways.fleet.join(taken.nodes, row.id, lack.lost)
        self.grown += 1
        self._say("follow_up.started", job=row.id, nodes=" ".join(taken.nodes))

    async def _release(self, lack: Lack, what: Release) -> None:
        await asyncio.to_thread(self._jobs.cancel, what.follow_up)
        await self._let_go(lack, "follow_up.released", what)
        if what.failed and what.follow_up.grows and not what.follow_up.nodes:
            self._give_up(lack, what.why)

    async def _let_go(self, lack: Lack, event: str, what: Release) -> None:
        """It is over: its nodes are lost."""
        job = what.follow_up.job.job_id
        self._ways.fleet.part(job, lack.lost, lack.busy, what.why)
        await asyncio.to_thread(self._jobs.forget, lack, what.follow_up)
        if what.failed:
            self._put_off(time.monotonic())
            self._trouble = f"{what.why}: another job is asked for"
        self._say(event, job=job, message=what.why)

    def _give_up(self, lack: Lack, why: str) -> None:
        """More replicas are not to be had now: the deployment does without them, and says why."""
        self._hopeless, self._given_up = why, lack.plan
        self._again_at = 0.0

    def _put_off(self, now: float) -> None:
        self._failures = self._failures + 1 if now - self._failed_at < AGAIN_MOST_S else 1
        self._failed_at = now
        self._again_at = now + min(AGAIN_MOST_S, AGAIN_S * 2.0 ** min(self._failures - 1, 16))

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


def _line(error: DynctlError) -> str:
    """All it says in one line."""
    return " ".join(str(error).split())


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
