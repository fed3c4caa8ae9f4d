"""The cluster for a test run, and a check after each of its tests that nothing is left of it.

A test that asks for `cluster` (or a home) gets the marker of that name: skipped where there can be none.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster import environment
from tests.cluster.cluster import Cluster, running
from tests.cluster.hosts import USER
from tests.cluster.login import Login

_BEFORE = pytest.StashKey[tuple[Cluster, dict[Path, int]]]()
"""The cluster, and how long its logs were when the test began."""
_LOG_LINES = 40


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "cluster" in item.fixturenames:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Hosts head, n1..n4 (Slurm nodes) and priv, up and whole; the same for all tests."""
    try:
        python = environment.build()
    except environment.BuildFailed as error:
        pytest.fail(f"the test user's Python: {error}", pytrace=False)
    with running(python) as up:
        yield up


@pytest.fixture(autouse=True)
def _nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves processes or jobs of the test user behind, with the list, and ends them."""
    if "cluster" not in request.fixturenames:
        yield
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    request.node.stash[_BEFORE] = (cluster, cluster.log_sizes())
    yield
    left = cluster.clean()
    if left:
        pytest.fail("left over (and ended now):\n" + "\n".join(left), pytrace=False)


@pytest.fixture
def token() -> str:
    """A name that no other test has, for jobs, folders, environments: t-<8 hex>."""
    return f"t-{secrets.token_hex(4)}"


@pytest.fixture
def login(cluster: Cluster, home: Path, token: str) -> Login:
    """dynctl on the login node, for jobs of one test's name."""
    return Login(cluster, home, token)


@pytest.fixture
def home(cluster: Cluster, token: str) -> Iterator[Path]:
    """A new DYNCTL_HOME in the shared $HOME; on the hosts of `cluster.private_home` it is another folder."""
    path = cluster.user_home / token / "dynctl"
    tops = [cluster.folder / "hosts" / host / "home" / token for host in cluster.private_home]
    yield from _folders(path, [path.parent, *tops])


@pytest.fixture
def local_home(cluster: Cluster, token: str) -> Iterator[Path]:
    """A new DYNCTL_HOME in /run/local, which is another folder on each host and outlives its reboot."""
    path = Path("/run/local") / token / "dynctl"
    yield from _folders(path, [cluster.folder / "hosts" / host / "local" / token for host in cluster.names])


def _folders(path: Path, tops: list[Path]) -> Iterator[Path]:
    for top in tops:
        top.mkdir()
        shutil.chown(top, USER, USER)
    yield path
    for top in tops:
        shutil.rmtree(top, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    before = item.stash.get(_BEFORE, None)
    if report.failed and before is not None and isinstance(item, pytest.Function):
        cluster, sizes = before
        told = [("logs of the cluster", cluster.log_tails(sizes))]
        for name in ("home", "local_home"):
            if isinstance(path := item.funcargs.get(name), Path):
                told.append((f"logs in {path}", _dynctl_logs(path)))
        report.sections.extend((title, text) for title, text in told if text)
    return report


def _dynctl_logs(home: Path) -> str:
    """The last lines of all logs of all runs, as far as the home can be read from the machine."""
    parts = []
    for path in sorted(home.glob("runs/*/logs/*")):
        lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        parts.append("\n".join([f"-- {path.relative_to(home)}", *lines]))
    return "\n".join(parts)
