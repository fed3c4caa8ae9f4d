"""Models copied to a node's own disk: once, whole, and never half."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from dynctl.deploy.stage import stage, staged_path
from dynctl.errors import LaunchError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    blob = tmp_path / "blob"
    blob.write_text("weights")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "w.bin").symlink_to(blob)
    return folder


def test_links_into_the_hub_cache_become_files(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "disk" / "m"
    assert stage(model, target) == len("{}weights")
    assert (target / "sub" / "w.bin").read_text() == "weights"
    assert not (target / "sub" / "w.bin").is_symlink()


def test_what_is_there_is_not_copied_again(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    assert stage(model, target)
    assert stage(model, target) == 0


def test_a_model_that_changed_is_copied_anew(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    stage(model, target)
    (model / "config.json").write_text('{"a": 1}')
    assert stage(model, target)
    assert (target / "config.json").read_text() == '{"a": 1}'


def test_half_a_copy_is_not_taken_for_a_model(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    (target / "config.json").write_text("half")
    stage(model, target)
    assert (target / "config.json").read_text() == "{}"


def test_two_jobs_on_one_node_copy_once(model: Path, tmp_path: Path) -> None:
    copied: list[int] = []
    threads = [threading.Thread(target=lambda: copied.append(stage(model, tmp_path / "m"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(copied) == [0, 0, 0, 9]


def test_a_disk_that_is_too_small_is_told_before_the_copy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage())
    with pytest.raises(LaunchError, match="too little space for the model"):
        stage(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


class Usage:
    free = 3


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="there is no such model directory"):
        stage(tmp_path / "none", tmp_path / "m")


def test_models_of_one_name_from_two_places_do_not_collide() -> None:
    assert staged_path("/a/model", "/disk") != staged_path("/b/model", "/disk")
    assert staged_path("/a/model/", "/disk") == staged_path("/a/model", "/disk")
