from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.errors import (
    ConnectFailed,
    ContextTooLong,
    DynctlError,
    LaunchError,
    PeerLost,
    RequestError,
    TransportError,
)
from dynctl.frontend.__main__ import read_spec
from dynctl.frontend.accounts import Accounts
from dynctl.frontend.disagg import flow_for
from dynctl.frontend.pipeline import error_type_of
from dynctl.frontend.server import STATUSES, tell
from dynctl.observability.metrics import Metrics


def test_prefill_without_a_contract_is_refused_at_start() -> None:
    with pytest.raises(LaunchError, match="no prefill/decode contract"):
        flow_for(frozenset({"prefill", "decode"}), None)


def test_a_spec_that_is_none_is_told_with_its_file(tmp_path: Path) -> None:
    broken = tmp_path / "spec.json"
    for text in ("{", "{}", '{"deployment": 1}'):
        broken.write_text(text)
        with pytest.raises(LaunchError) as caught:
            read_spec(broken)
        assert caught.value.where == str(broken)
    with pytest.raises(LaunchError):
        read_spec(tmp_path / "missing.json")


def kinds(root: type[DynctlError]) -> set[str]:
    """Kinds of the errors this process can meet; those of other rooms' processes are not among them."""
    rooms = ("dynctl.errors", "dynctl.frontend")
    return {root.kind}.union(
        *(kinds(child) for child in root.__subclasses__() if child.__module__.startswith(rooms))
    )


def test_each_error_a_request_can_end_with_has_a_status() -> None:
    served = kinds(RequestError) | {"peer_lost", "connect_failed", "deadline_exceeded"}
    assert served <= set(STATUSES)
    assert all(400 <= told.status < 600 for told in STATUSES.values())


def test_addresses_stay_inside() -> None:
    for error in (PeerLost("x 10.0.0.5", where="http://10.0.0.5:1"), ConnectFailed("10.0.0.5")):
        assert b"10.0.0.5" not in tell(error)
    assert b"10.0.0.5" not in tell(TransportError("10.0.0.5"))
    assert b'"code":"context_length_exceeded"' in tell(ContextTooLong("long"))


def test_metric_words_of_errors() -> None:
    assert error_type_of(RequestError("x")) == "validation"
    assert error_type_of(PeerLost("x")) == "engine"
    assert error_type_of(DynctlError("x")) == "internal"


def test_accounts_tell_how_requests_ended() -> None:
    metrics = Metrics()
    accounts = Accounts(metrics)
    for end in ("", "cancelled", "unavailable"):
        account = accounts.open("m", "completions", stream=False)
        account.prompt(0)
        account.prompt(10)
        account.output_tokens = 5
        account.close(end)
    text = metrics.render().decode()
    assert 'status="success"} 1.0' in text
    assert 'model_cancellation_total{endpoint="completions",model="m",request_type="unary"} 1.0' in text
    assert 'model_rejection_total{endpoint="completions",model="m"} 1.0' in text
    assert 'input_sequence_tokens_count{model="m"} 3.0' in text
    assert 'output_tokens_total{model="m"} 15.0' in text
    assert 'inflight_requests{model="m"} 0.0' in text
