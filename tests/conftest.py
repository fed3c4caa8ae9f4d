"""What some tests need from the machine, said once: a test that cannot run names its reason.

With DYNCTL_TESTS_REQUIRE=all (as `.ci/run` sets it) a missing need fails the test instead of skipping it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from dynctl.native import load

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
"""How long an example takes says something of the machine, nothing of the code."""

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


def _compiled(mark: pytest.Mark) -> str:
    return "" if load.compiled is not None else f"needs the compiled hot path: {load.missing}"


NEEDS: dict[str, Callable[[pytest.Mark], str]] = {
    "root": _root,
    "debian": _debian,
    "vllm": _vllm,
    "sglang": _sglang,
    "aiperf": _aiperf,
    "aiconfigurator": _aiconfigurator,
    "cluster": _cluster,
    "compiled": _compiled,
}


@pytest.fixture(params=["python", pytest.param("compiled", marks=pytest.mark.compiled)])
def each_relay(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with the relay's steps in Python, once compiled."""
    if request.param == "python":
        monkeypatch.setattr(load, "compiled", None)
    return str(request.param)


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
