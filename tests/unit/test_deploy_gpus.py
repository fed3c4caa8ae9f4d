from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.deploy.gpus import claim_of, require_free
from dynctl.deploy.home import Home
from dynctl.deploy.plan import Plan, PlannedNode
from dynctl.deploy.remote import require_idle
from dynctl.deploy.remote_hosts import HostSite
from dynctl.errors import PlacementError
from dynctl.launchers.base import Launcher, Owned, ProcessHandle


class Living:
    """A launcher that finds processes of these runs alone."""

    def __init__(self, *runs: str) -> None:
        self.runs = runs

    def owned(self, run_id: str) -> list[Owned]:
        one = Owned(ProcessHandle(1, 1, 1), 0, "decode-0", 1)
        return [one] if run_id in self.runs else []


def living(*runs: str) -> Launcher:
    return Living(*runs)  # type: ignore[return-value]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    made.prepare()
    made.create_run("one-1", {"gpus.json": claim_of("one", "one-1", [0, 1])})
    made.create_node("two-1", "n1", {"gpus.json": claim_of("two", "two-1", [4])})
    return made


def test_gpus_of_a_living_run_are_not_given_twice(home: Home) -> None:
    with pytest.raises(PlacementError, match="'one' has GPU 1 already") as refused:
        require_free(home, living("one-1"), [1, 2])
    assert "--share-gpus" in refused.value.hint
    with pytest.raises(PlacementError, match="'two' has GPU 4"):
        require_free(home, living("two-1"), [4])


def test_gpus_of_a_run_that_has_ended_and_ones_own_are_free(home: Home) -> None:
    require_free(home, living(), [0, 1, 4])
    require_free(home, living("one-1"), [0], "one-1")
    require_free(home, living("one-1"), [2, 3])


def test_gpus_of_another_host_that_shares_the_directory_are_another_matter(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    require_free(home, living("one-1"), [0])


def test_a_claim_that_cannot_be_read_is_in_nobodys_way(home: Home) -> None:
    (home.runs / "one-1" / "gpus.json").write_text("{")
    require_free(home, living("one-1"), [0])


def test_gpus_that_somebody_uses_are_seen_before_the_start() -> None:
    plan = Plan(
        name="d",
        run_id="d-1",
        target="ssh",
        backend="b",
        model="m",
        url="",
        registry="",
        membership="",
        roles={},
        nodes=(PlannedNode("n1", "10.0.0.1", (0, 1)), PlannedNode("n2", "10.0.0.2", (0,))),
        processes=(),
    )
    idle = HostSite("n1", None, "", "", busy={5: "python (pid 7)"})  # type: ignore[arg-type]
    require_idle(plan, [idle])
    busy = HostSite("n2", None, "", "", busy={0: "python (pid 7)"})  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match=r"GPU 0 by python \(pid 7\)") as refused:
        require_idle(plan, [idle, busy])
    assert refused.value.where == "n2"
