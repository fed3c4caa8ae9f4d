from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dynctl.deploy.gpus import FILE, GpuClaim, Living, claim_of, hold, others, require_free
from dynctl.deploy.home import Home
from dynctl.deploy.plan import Plan, PlannedNode
from dynctl.deploy.remote import require_idle
from dynctl.deploy.remote_hosts import HostSite
from dynctl.errors import PlacementError


def living(*runs: str) -> Living:
    return lambda: runs


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    made.prepare()
    made.create_run("one-1", {"gpus.json": claim_of("one", "one-1", [0, 1])})
    made.create_node("two-1", "n1", {"gpus.json": claim_of("two", "two-1", [4])})
    return made


def test_gpus_of_a_living_run_are_not_given_twice(home: Home) -> None:
    with pytest.raises(PlacementError, match="'one' has GPU 1 already") as refused:
        require_free(home, [1, 2], living=living("one-1"))
    assert "--share-gpus" in refused.value.hint
    with pytest.raises(PlacementError, match="'two' has GPU 4"):
        require_free(home, [4], living=living("two-1"))


def test_gpus_of_a_run_that_has_ended_and_ones_own_are_free(home: Home) -> None:
    require_free(home, [0, 1, 4], living=living())
    require_free(home, [0], "one-1", living=living("one-1"))
    require_free(home, [2, 3], living=living("one-1"))


def test_gpus_of_another_host_that_shares_the_directory_are_another_matter(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    require_free(home, [0], living=living("one-1"))


def test_a_claim_that_cannot_be_read_is_in_nobodys_way(home: Home) -> None:
    (home.runs / "one-1" / "gpus.json").write_text("{")
    require_free(home, [0], living=living("one-1"))


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


def claimed(folder: Path) -> list[int]:
    return msgspec.json.decode((folder / FILE).read_bytes(), type=GpuClaim).gpus


def test_a_claim_grows_only_by_what_is_free_and_else_stays_as_it_was(home: Home) -> None:
    one, alive = home.runs / "one-1", living("one-1", "two-1")
    hold(home, one, "one-1", {0, 1, 2}, alive)
    with pytest.raises(PlacementError, match="'two' has GPU 4"):
        hold(home, one, "one-1", {0, 4}, alive)
    assert claimed(one) == [0, 1, 2]
    hold(home, one, "one-1", {0}, alive)
    assert others(home, "two-1", alive) == {0: "one"}


def test_what_was_killed_claims_nothing(home: Home) -> None:
    assert others(home, "one-1", living("one-1")) == {}
    hold(home, home.runs / "one-1", "one-1", {0, 4}, living("one-1"))


def test_a_run_that_was_told_to_share_shares_also_what_it_gets_later(home: Home) -> None:
    home.create_run("three-1", {FILE: claim_of("three", "three-1", [0], shared=True)})
    hold(home, home.runs / "three-1", "three-1", {0, 4}, living("one-1", "two-1", "three-1"))
    hold(home, home.runs / "three-1", "three-1", {0, 1, 4}, living("one-1", "two-1", "three-1"))
    assert claimed(home.runs / "three-1") == [0, 1, 4]
