"""The planner on a trace whose rate rises and falls, beside fixed numbers, the classic formula and an oracle.

    python -m tests.perf.planner [--load trace|wave] [--mode aggregated|disaggregated|both] [--repeats N]
        [--seed N ...] [--cold] [--why] [--alone]

The trace is Mooncake's (tests/data) with twice its requests, several times one after another, each time from
other users; its gaps are stretched and shrunk so that its rate goes up and down (`rate_at`). The wave is
another load: Poisson arrivals whose rate is a sine, prompts and answers of log-normal lengths, nothing
cached. All is simulated (`dynctl.simulator`): the real router and the real planner, replicas as `PROFILE`
says. docs/profiling.md has the table.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from random import Random

import msgspec

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import DEFAULT, Limits
from dynctl.perfmodel.simulation import Finished, Group, Result, Service, Task, Told
from dynctl.perfmodel.trace import TraceRequest, denser, load_trace
from dynctl.planner.config import PlannerConfig, RoleConfig
from dynctl.simulator.pilots import Planner
from dynctl.simulator.run import Runs

TRACE = Path(__file__).resolve().parent.parent / "data" / "mooncake_trace.jsonl.gz"
LIMITS = Limits(kv_tokens=600_000, sequences=256, batched_tokens=8192)
PROFILE = msgspec.structs.replace(DEFAULT, limits=LIMITS)
SLA = Sla(ttft_s=4.0, itl_s=0.025, percentile=0.95)
BOOT_S = 60.0
PERIOD_S = 1800.0
STARTS = {"aggregated": {"aggregated": 10}, "disaggregated": {"prefill": 8, "decode": 2}}
"""Replicas at the beginning, about what the mean rate takes."""
WAVE_S, WAVE_MOST = 1200.0, 17.0
"""Period of the wave, and its highest rate: 5.7 times its lowest."""
WAVE_LENGTHS = ((8.4, 0.9), (4.8, 0.8))
"""Mean and deviation of the logarithms of prompts and answers: on average 6,700 and 167 tokens."""
DENSITY = 2.0
"""So many times the trace's requests: numbers of replicas then are less coarse."""
HEADS = (
    "policy",
    "seed",
    "SLA met",
    "TTFT",
    "ITL",
    "TTFT p95",
    "ITL p95",
    "GPU-hours",
    "of oracle",
    "aborted",
)


def rate_at(at_s: float) -> float:
    """The rate beside the trace's own: a wave of half an hour between 0.3 and 1.7, and a burst in each."""
    wave = 1.0 + 0.7 * math.sin(2 * math.pi * at_s / PERIOD_S)
    burst = 0.6 if (at_s % PERIOD_S) // 60 in (20, 21, 22) else 0.0
    return wave + burst


def shaped(requests: list[TraceRequest], repeats: int) -> list[TraceRequest]:
    """The trace so often one after another, its time running as `rate_at` says."""
    span_s = requests[-1].at_s + 1.0
    layer = 1 + max(block for one in requests for block in one.blocks)
    found, now_s, trace_s = [], 0.0, 0.0
    for turn in range(repeats):
        for one in requests:
            due_s = turn * span_s + one.at_s
            while trace_s < due_s:
                step_s = min(1.0, (due_s - trace_s) / rate_at(now_s))
                trace_s += step_s * rate_at(now_s)
                now_s += step_s
                if due_s - trace_s < 1e-6:
                    break
            blocks = tuple(block + turn * layer for block in one.blocks)
            found.append(msgspec.structs.replace(one, at_s=now_s, blocks=blocks))
    return found


def wave(repeats: int, seed: int) -> list[TraceRequest]:
    """So many periods of `WAVE_S`."""
    rng, now_s = Random(seed), 0.0
    found: list[TraceRequest] = []
    while True:
        now_s += rng.expovariate(WAVE_MOST)
        if now_s > repeats * WAVE_S:
            return found
        if rng.random() * WAVE_MOST < WAVE_MOST / 1.7 * (1.0 + 0.7 * math.sin(2 * math.pi * now_s / WAVE_S)):
            prompt, answer = (round(rng.lognormvariate(*of)) for of in WAVE_LENGTHS)
            found.append(TraceRequest(now_s, min(60_000, max(1, prompt)), min(4000, max(1, answer))))


def service_of(mode: str, *, cold: bool) -> Service:
    """The deployment: one GPU a replica. `cold`: it begins with one of each role."""
    groups = [
        Group(
            role=role,  # type: ignore[arg-type]
            replicas=1 if cold else count,
            gpus=1,
            profile=PROFILE,
            limits=LIMITS,
        )
        for role, count in STARTS[mode].items()
    ]
    return Service(name=mode, groups=tuple(groups), sla=SLA, boot_s=BOOT_S)


def config_of(service: Service) -> PlannerConfig:
    """The planner as it comes, but for the bounds."""
    roles = {
        group.role: RoleConfig(
            minimum=group.least, maximum=group.most, gpus=group.gpus, profile=group.profile
        )
        for group in service.groups
    }
    return PlannerConfig(sla=service.sla, roles=roles, boot_s=service.boot_s)


def line(result: Result, seed: int, oracle_hours: float | None) -> str:
    """A row of the table."""
    times = "-" if not oracle_hours else f"{result.gpu_hours / oracle_hours:.2f}"
    ttft, itl = result.ttft_s.p95 or 0.0, result.itl_s.p95 or 0.0
    met = f"{result.met:.1%} | {result.ttft_met:.1%} | {result.itl_met:.1%}"
    cost = f"{result.gpu_hours:.2f} | {times} | {result.aborted}"
    return f"| {result.policy} | {seed} | {met} | {ttft:.2f} s | {itl * 1e3:.1f} ms | {cost} |"


def rows(service: Service, requests: list[TraceRequest], seed: int, *, why: bool, alone: bool) -> None:
    """Run all of it and print the rows; what else there is to say, on standard error."""
    config = config_of(service)
    task = Task(
        service=service,
        trace=str(TRACE),
        seed=seed,
        planner=msgspec.to_builtins(config),
        compare=True,
    )
    took: dict[str, float] = {}

    def tell(told: Told) -> None:
        if isinstance(told, Finished):
            took[told.result.policy] = told.took_s

    runs = Runs(task, requests, tell)
    results = [runs.steered("planner", Planner(config))] if alone else runs.all(config)
    oracle = next((one.gpu_hours for one in results if one.policy == "oracle"), None)
    for one in results:
        print(line(one, seed, oracle), flush=True)
    planner, span_s = results[0], requests[-1].at_s
    changes, hits = len(planner.reasons), planner.hit_rate
    told = f"{service.name}, seed {seed}: {len(requests)} requests in {span_s:.0f} s, hit rate {hits:.1%}; "
    told += f"planner: {changes} changes, took {took['planner']:.1f} s"
    print("\n".join([told, *(planner.reasons if why else ())]), file=sys.stderr)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--load", choices=("trace", "wave"), default="trace")
    parser.add_argument("--mode", choices=("aggregated", "disaggregated", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--cold", action="store_true", help="one replica of each role to begin with")
    parser.add_argument("--why", action="store_true", help="the planner's reasons")
    parser.add_argument("--alone", action="store_true", help="only the planner, compared with nothing")
    given = parser.parse_args()
    for mode in STARTS if given.mode == "both" else (given.mode,):
        print(f"\n{mode}: SLA {SLA}, boot {BOOT_S:g} s\n")
        print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
        for seed in given.seed:
            if given.load == "wave":
                requests = wave(given.repeats, seed)
            else:
                requests = shaped(denser(load_trace(TRACE), DENSITY, Random(seed)), given.repeats)
            service = service_of(mode, cold=given.cold)
            rows(service, requests, seed, why=given.why, alone=given.alone)


if __name__ == "__main__":
    main()
