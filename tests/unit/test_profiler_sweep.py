"""Candidates side by side: their GPUs, their ends, what they are known by; engines stood in for."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dynctl.cli.profile import Machines, asked_of
from dynctl.errors import DynctlError, LaunchError, ProfileError
from dynctl.perfmodel.choice import Demand, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.split import choose
from dynctl.profiler import sweep as sweep_module
from dynctl.profiler.candidate import alone, candidate, depends_on
from dynctl.profiler.journal import Journal, key_of
from dynctl.profiler.load.spec import Endpoint
from dynctl.profiler.outcome import DecodePoint, LayoutRun, PrefillPoint
from dynctl.profiler.probe import Unserved
from dynctl.profiler.search import DecodeProbe, PrefillProbe, Probe
from dynctl.profiler.service import Asked, ask_of, estimated
from dynctl.profiler.stage import Slots, Stage
from dynctl.profiler.starts import Standing
from dynctl.profiler.sweep import Sweep
from dynctl.recipe.load import load_recipe
from dynctl.recipe.lock import lock_text
from tests.perf.laws import law, write_law, write_recipe


@dataclass
class Starts:
    """Engines that are ready at once."""

    up_now: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)
    most: int = 0

    async def up(self, recipe: Path, name: str, timeout_s: float) -> Standing:
        assert recipe.name == f"{name}.yaml"
        section = load_recipe(recipe).recipe.roles.aggregated
        self.args = dict(section.args) if section else {}
        self.up_now.append(name)
        self.most = max(self.most, len(self.up_now))
        await asyncio.sleep(0.01)
        return Standing(name, f"http://{name}", Path("/nonexistent"))

    async def down(self, name: str, *, remove: bool) -> str:
        self.up_now.remove(name)
        self.forgotten += [name] if remove else []
        return ""

    async def died(self, standing: Standing) -> LaunchError:
        await asyncio.sleep(3600)
        raise AssertionError


class Nobody:
    def begin(self, row: str, total: int) -> None: ...

    def step(self, row: str, doing: str, *, done: bool = False, lasts_s: float = 0.0) -> None: ...

    def end(self, row: str, told: str) -> None: ...


def asked(folder: Path, gpus: int) -> Asked:
    for size in (1, 2, 4):
        write_law(folder, size)
    loaded = load_recipe(write_recipe(folder))
    demand = Demand(rate=3.0, lengths=((600, 40),))
    made = asked_of(loaded, Machines(None, gpus, None, ""), Sla(ttft_s=2.0, itl_s=0.1), demand)
    return made


def stage_for(folder: Path, starts: Starts, gpus: int = 8, *, resume: bool = False) -> Stage:
    return Stage(
        asked=asked(folder, gpus),
        run="r1",
        folder=folder,
        starts=starts,  # type: ignore[arg-type]
        journal=Journal(folder / "journal.jsonl", "r1", resume=resume, clock=time.time),
        slots=Slots(gpus, 9),
        shown=Nobody(),
        ends_s=time.monotonic() + 60.0,
        api_key="secret-of-the-run",
        tokenizer="",
        hardware="mocker",
        version="1",
    )


async def answer(
    probe: Probe, endpoint: Endpoint, seed: str, limit_s: float
) -> tuple[PrefillPoint | DecodePoint, str]:
    await asyncio.sleep(0)
    assert endpoint.api_key == "secret-of-the-run"
    if isinstance(probe, PrefillProbe):
        seconds = 0.02 + probe.isl * 2.5e-4
        return PrefillPoint(isl=probe.isl, seconds=seconds, low_s=0, high_s=0, requests=5), ""
    seconds = 0.016 + probe.batch * (2.5e-4 + probe.context * 1.2e-7)
    return DecodePoint(batch=probe.batch, context=probe.context, seconds=seconds, steps=30), ""


async def swept(stage: Stage, layouts: tuple[Layout, ...]) -> list[LayoutRun]:
    return await Sweep(stage, estimated(stage.asked)[0]).run(layouts)


TP1, TP2, TP4 = Layout(), Layout(tensor=2), Layout(tensor=4)


def test_layouts_are_measured_at_once_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "measured", answer)
    starts = Starts()
    stage = stage_for(tmp_path, starts)
    runs = asyncio.run(swept(stage, (TP1, TP2, TP4)))
    assert [run.layout for run in runs] == [TP1, TP2, TP4]
    assert all(len(run.prefill) == 3 and run.fitted for run in runs)
    assert (starts.most, starts.up_now) == (3, [])
    assert sorted(starts.forgotten) == ["profile-r1-tp1", "profile-r1-tp2", "profile-r1-tp4"]
    assert not list((tmp_path / "candidates").iterdir())


def test_the_limits_that_are_written_are_those_of_the_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "measured", answer)
    starts = Starts()
    stage = stage_for(tmp_path, starts)
    sweep = Sweep(stage, estimated(stage.asked)[0])
    asyncio.run(sweep.run((TP1,)))
    chosen = choose(ask_of(stage.asked, sweep.fits)).chosen
    assert chosen is not None
    for pool in chosen.pools:
        assert pool.batched_tokens == starts.args["max-num-batched-tokens"]
        assert pool.sequences <= starts.args["max-num-seqs"]


def test_of_what_serves_nothing_the_logs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def mute(*_: object) -> tuple[PrefillPoint, str]:
        raise Unserved("no answer")

    monkeypatch.setattr(sweep_module, "measured", mute)
    starts = Starts()
    stage = stage_for(tmp_path, starts)
    runs = asyncio.run(swept(stage, (TP1,)))
    assert "serves nothing" in runs[0].stopped
    assert (starts.forgotten, stage.kept) == ([], ["profile-r1-tp1"])


@pytest.mark.parametrize(
    ("refusing", "told"),
    [
        ((PrefillProbe,), "no prompt was measured that can be relied on: the client was late"),
        ((DecodeProbe,), "no step was measured that can be relied on: the client was late"),
        ((PrefillProbe, DecodeProbe), "no prompt was measured that can be relied on: the client was late"),
    ],
)
def test_a_layout_whose_probes_are_all_refused_has_no_profile_and_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: tuple[type, ...], told: str
) -> None:
    """It is in no dictionary of fitted profiles: who looks for it there finds a KeyError."""

    async def refuse(
        probe: Probe, endpoint: Endpoint, seed: str, limit_s: float
    ) -> tuple[PrefillPoint | DecodePoint | None, str]:
        if isinstance(probe, refusing) and endpoint.url.endswith("-tp1"):
            return None, "the client was late"
        return await answer(probe, endpoint, seed, limit_s)

    monkeypatch.setattr(sweep_module, "measured", refuse)
    monkeypatch.setattr(Sweep, "_look_again", nobody_dies)
    stage = stage_for(tmp_path, Starts())
    first, second = asyncio.run(swept(stage, (TP1, TP2)))
    assert (first.fitted, first.stopped, first.failure) == (None, told, "")
    assert {one.reason for one in first.refused} == {"the client was late"}
    assert second.fitted is not None


@pytest.mark.parametrize(
    ("error", "failure", "stopped"),
    [
        (Unserved("no end after 15 s"), "", "it serves nothing: no end after 15 s"),
        (ZeroDivisionError("oh"), "ZeroDivisionError: oh", ""),
    ],
)
def test_what_one_layout_breaks_by_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, failure: str, stopped: str
) -> None:
    async def break_(
        probe: Probe, endpoint: Endpoint, seed: str, limit_s: float
    ) -> tuple[PrefillPoint | DecodePoint, str]:
        if endpoint.url.endswith("-tp1"):
            raise error
        return await answer(probe, endpoint, seed, limit_s)

    monkeypatch.setattr(sweep_module, "measured", break_)
    monkeypatch.setattr(Sweep, "_look_again", nobody_dies)
    starts = Starts()
    first, second = asyncio.run(swept(stage_for(tmp_path, starts), (TP1, TP2)))
    assert (first.fitted, first.failure, first.stopped) == (None, failure, stopped)
    assert second.fitted is not None
    assert starts.up_now == []


async def nobody_dies(self: Sweep, dying: asyncio.Task[DynctlError]) -> None:
    """Without the wait for it."""


def test_no_more_gpus_are_taken_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "measured", answer)
    starts = Starts()
    stage = stage_for(tmp_path, starts, gpus=4)
    runs = asyncio.run(swept(stage, (TP4, TP4, TP1)))
    assert starts.most <= 1
    assert all(run.fitted for run in runs)


def test_on_a_full_disk_engines_are_ended_and_one_message_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = Starts()
    stage = stage_for(tmp_path, starts)

    async def full(
        probe: Probe, endpoint: Endpoint, seed: str, limit_s: float
    ) -> tuple[PrefillPoint | DecodePoint, str]:
        def write(fd: int, raw: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("dynctl.profiler.journal.os.write", write)
        return await answer(probe, endpoint, seed, limit_s)

    monkeypatch.setattr(sweep_module, "measured", full)
    with pytest.raises(ProfileError, match="No space left on device"):
        asyncio.run(swept(stage, (TP1, TP2)))
    assert starts.most
    assert not starts.up_now


def test_what_the_journal_has_starts_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "measured", answer)
    first = stage_for(tmp_path, Starts())
    before = asyncio.run(swept(first, (TP1,)))
    first.journal.close()
    starts = Starts()
    again = stage_for(tmp_path, starts, resume=True)
    after = asyncio.run(swept(again, (TP1,)))
    assert not starts.most
    assert after[0].fitted == before[0].fitted
    assert again.reused == first.probes


def test_a_layout_that_cannot_win_is_left_after_its_first_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP4 is no faster than TP1: four times the GPUs for nothing."""
    monkeypatch.setattr(sweep_module, "measured", answer)
    runs = asyncio.run(swept(stage_for(tmp_path, Starts(), gpus=4), (TP1, TP4)))
    by_layout = {run.layout: run for run in runs}
    assert not by_layout[TP1].stopped
    assert "15 % better" in by_layout[TP4].stopped
    assert len(by_layout[TP4].decode) == 2


def test_without_time_no_engine_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "measured", answer)
    starts = Starts()
    stage = stage_for(tmp_path, starts)
    stage.ends_s = time.monotonic()
    assert asyncio.run(swept(stage, (TP1,)))[0].stopped == "the budget was used up"
    assert not starts.most


def test_slots_are_hosts_over_ssh(tmp_path: Path) -> None:
    async def taken() -> list[tuple[str, ...]]:
        slots = Slots(16, 9, (("n1", 8), ("n2", 8)))
        async with slots.take(2) as first, slots.take(8) as second:
            found = [first, second]
        async with slots.take(16) as both:
            return [*found, both]

    assert asyncio.run(taken()) == [("n1",), ("n2",), ("n2", "n1")]


def test_a_key_tells_flags_files_sizes_and_versions_apart_and_nothing_else(tmp_path: Path) -> None:
    def key(name: str = "a", layout: Layout = TP1, version: str = "1", **args: object) -> str:
        loaded = load_recipe(write_recipe(tmp_path), [f"engine.args.{k}={v}" for k, v in args.items()])
        made = candidate(loaded, alone(layout), name, name)
        return key_of(depends_on(made, layout, version, "mocker"))

    write_law(tmp_path, 1)
    base = key()
    assert key("another") == base
    others = [key(layout=TP2), key(version="2"), key(speedup=0.5)]
    write_law(tmp_path, 1, slower=2.0)
    others.append(key())
    assert len({base, *others}) == 5


def test_a_candidate_is_the_recipe_under_another_name_and_key(tmp_path: Path) -> None:
    write_law(tmp_path, 2)
    made = candidate(load_recipe(write_recipe(tmp_path)), alone(TP2), "profile-1-tp2", "the-secret-key")
    path = tmp_path / "made.yaml"
    path.write_text(lock_text(made, "0"))
    assert "the-secret-key" not in path.read_text()
    again = load_recipe(path).recipe
    assert (again.name, again.frontend.port, again.frontend.replicas) == ("profile-1-tp2", 0, 1)
    role = again.roles.present()["aggregated"]
    assert (role.replicas, role.tensor_parallel) == (1, 2)
    assert law(2)["name"] == "tp2"
