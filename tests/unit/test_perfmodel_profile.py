"""The profile file and the times read from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.errors import ProfileError
from dynctl.perfmodel.interpolate import bilinear, linear
from dynctl.perfmodel.profile import DEFAULT, Profile, load_profile, parse_profile


def document(**changes: Any) -> bytes:
    base = msgspec.to_builtins(DEFAULT)
    for path, value in changes.items():
        section, _, name = path.partition("__")
        if name:
            base[section][name] = value
        else:
            base[section] = value
    return msgspec.json.encode(base)


def test_lines_pass_through_points_and_are_prolonged() -> None:
    xs, ys = (0.0, 10.0, 20.0), (1.0, 2.0, 4.0)
    assert [linear(xs, ys, x) for x in (0, 5, 10, 15, 20, 30, -10)] == [1, 1.5, 2, 3, 4, 6, 0]


def test_grid_is_bilinear_between_its_points() -> None:
    grid = ((0.0, 10.0), (20.0, 30.0))
    assert bilinear((0, 1), (0, 1), grid, 0.5, 0.5) == 15
    assert bilinear((0, 1), (0, 1), grid, 1, 0) == 20
    assert bilinear((0, 1), (0, 1), grid, 2, 0) == 40


def test_a_prompt_read_in_chunks_costs_what_it_costs_whole() -> None:
    whole = DEFAULT.prefill_s(0, 4096)
    chunks = sum(DEFAULT.prefill_s(start, 512) for start in range(0, 4096, 512))
    assert chunks == pytest.approx(whole)


def test_a_mixed_step_adds_prompt_work_to_the_decode_step() -> None:
    assert DEFAULT.step_s(0.5, 64, 0) == pytest.approx(0.5 + DEFAULT.decode_s(64, 0))
    assert DEFAULT.step_s(0.5, 0, 0) == pytest.approx(0.5 + DEFAULT.prefill.seconds[0])


def test_transfer_takes_latency_plus_bytes_over_bandwidth() -> None:
    assert DEFAULT.transfer_s(0) == DEFAULT.transfer.latency_s
    per_token = DEFAULT.transfer.bytes_per_token / DEFAULT.transfer.bytes_per_s
    assert DEFAULT.transfer_s(1000) == pytest.approx(DEFAULT.transfer.latency_s + 1000 * per_token)


def test_a_written_profile_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(document())
    assert load_profile(path) == DEFAULT
    assert isinstance(load_profile(path), Profile)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2 is not known"),
        ({"prefill__tokens": [0]}, r"prefill\.tokens must hold at least two"),
        ({"decode__batch": [1, 1, 2, 3]}, r"decode\.batch must hold"),
        ({"decode__context": [5, 1, 2]}, r"decode\.context must hold"),
        ({"prefill__seconds": [1.0]}, r"prefill\.seconds needs one value"),
        ({"decode__seconds": [[1.0]]}, r"decode\.seconds needs a row"),
        ({"transfer__bytes_per_s": 0}, r"bytes_per_s must be above 0"),
        ({"prefill__seconds": [-1.0, 1, 2, 3]}, "must not be negative"),
        ({"prefill__tokens": [1, 2, 3, 4]}, "must begin with 0"),
        ({"prefill__token": [1]}, "unknown field"),
        ({"name": 5}, r"\$\.name"),
    ],
)
def test_a_wrong_profile_names_the_field(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ProfileError, match=words) as error:
        parse_profile(document(**changes), "p.json")
    assert error.value.where == "p.json"


def test_bytes_that_are_no_json_are_refused() -> None:
    with pytest.raises(ProfileError, match="not a profile"):
        parse_profile(b"{", "p.json")


def test_a_missing_profile_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot read"):
        load_profile(tmp_path / "none.json")
