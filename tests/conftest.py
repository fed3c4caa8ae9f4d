"""What some tests need from the machine, said once: a test that cannot run names its reason.

With DYNCTL_TESTS_REQUIRE=all (as `.ci/run` sets it) a missing need fails the test instead of skipping it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest

REQUIRE_ALL = os.environ.get("DYNCTL_TESTS_REQUIRE") == "all"


def _root(mark: pytest.Mark) -> str:
    return "" if os.geteuid() == 0 else "needs root"


def _debian(mark: pytest.Mark) -> str:
    """`@pytest.mark.debian("openssl")`: the packages, each with a program of its name."""
    missing = [package for package in mark.args if not _on_path(package)]
    return f"needs Debian packages: {' '.join(missing)}" if missing else ""


def _on_path(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is not None


def _vllm(mark: pytest.Mark) -> str:
    from tests.engines import environment

    return environment.why_not_vllm()


def _sglang(mark: pytest.Mark) -> str:
    from tests.engines import environment

    return environment.why_not_sglang()


def _aiperf(mark: pytest.Mark) -> str:
    from tests.engines import environment

    return environment.why_not_aiperf()


def _aiconfigurator(mark: pytest.Mark) -> str:
    from tests.engines import environment

    return environment.why_not_aiconfigurator()


def _cluster(mark: pytest.Mark) -> str:
    from tests.cluster.cluster import why_not

    return why_not()


NEEDS: dict[str, Callable[[pytest.Mark], str]] = {
    "root": _root,
    "debian": _debian,
    "vllm": _vllm,
    "sglang": _sglang,
    "aiperf": _aiperf,
    "aiconfigurator": _aiconfigurator,
    "cluster": _cluster,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist (`-n 2 --dist loadgroup`) one process has all of the one cluster, and each other
    file is one process's, so that nothing a file starts is started twice.
    """
    for item in items:
        cluster = item.get_closest_marker("cluster") is not None
        item.add_marker(pytest.mark.xdist_group("cluster" if cluster else item.nodeid.partition("::")[0]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, need in NEEDS.items():
        mark = item.get_closest_marker(marker)
        if mark is None:
            continue
        reason = need(mark)
        if reason and REQUIRE_ALL:
            pytest.fail(f"{marker}: {reason}", pytrace=False)
        if reason:
            pytest.skip(f"{marker}: {reason}")
