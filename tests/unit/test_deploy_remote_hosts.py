"""What goes wrong on several hosts at once is one message that can be read."""

from __future__ import annotations

import pytest

from dynctl.deploy.remote_hosts import raise_first
from dynctl.errors import HostDynctlMissing, HostLost, LaunchError, SshError

HINT = "--bootstrap brings it there"


def told(*answers: object) -> SshError:
    with pytest.raises(SshError) as raised:
        raise_first(answers)
    return raised.value


def test_what_is_the_same_on_all_hosts_is_said_once() -> None:
    error = told(*(HostDynctlMissing("no dynctl", where=f"n{i}", hint=HINT) for i in (1, 2, 3)), "fine")
    assert str(error) == f"n1, n2, n3: no dynctl ({HINT})"
    assert isinstance(error, HostDynctlMissing)


def test_one_remedy_for_different_faults_is_said_once_at_the_end() -> None:
    old = HostDynctlMissing("dynctl 0.0.9 is there", where="n2", hint=HINT)
    assert str(told(HostDynctlMissing("no dynctl", where="n1", hint=HINT), old)) == (
        f"n1: no dynctl\nn2: dynctl 0.0.9 is there ({HINT})"
    )


def test_each_fault_keeps_its_own_remedy() -> None:
    lost = HostLost("gone", where="n2", hint="wait")
    error = told(HostDynctlMissing("no dynctl", where="n1", hint=HINT), lost, HostLost("off", where="n3"))
    assert str(error) == f"n1: no dynctl ({HINT})\nn2: gone (wait)\nn3: off"


def test_an_error_nobody_foresaw_is_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError):
        raise_first([ZeroDivisionError(), LaunchError("x")])
