"""Keys on disk: private, whole, and checked when read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynctl.errors import TransportError
from dynctl.transport.keys import Keys, load_engine_key, save_engine_key


def test_saved_keys_are_read_back_and_private(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = Keys.generate()
    keys.save(path)
    assert Keys.load(path) == keys
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_secret_is_not_shown() -> None:
    keys = Keys.generate()
    assert keys.secret not in repr(keys)


def test_two_pairs_differ() -> None:
    assert Keys.generate() != Keys.generate()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o666])
def test_keys_open_to_others_are_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    Keys.generate().save(path)
    path.chmod(mode)
    with pytest.raises(TransportError, match=r"open to others.*chmod 600"):
        Keys.load(path)


@pytest.mark.root
def test_keys_of_another_user_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    Keys.generate().save(path)
    os.chown(path, 12345, 12345)
    with pytest.raises(TransportError, match="belong to user 12345"):
        Keys.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"nonsense",
        b'{"version":2,"public":"a","secret":"b"}',
        b'{"version":1,"public":"a","secret":"b"}',
    ],
)
def test_broken_keys_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(TransportError, match="not a keys file") as caught:
        Keys.load(path)
    assert caught.value.where == str(path)


def test_missing_keys_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="No such file"):
        Keys.load(tmp_path / "keys.json")


def test_directory_is_no_keys_file(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="not a regular file"):
        Keys.load(tmp_path)


def test_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "keys.json"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        Keys.generate().save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_an_engines_key_is_private_new_each_time_and_never_empty(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        save_engine_key(tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        made.append(load_engine_key(tmp_path / name))
    assert made[0] != made[1]
    assert min(map(len, made)) >= 32
    (tmp_path / "a").write_text("\n")
    with pytest.raises(TransportError, match="empty"):
        load_engine_key(tmp_path / "a")
    (tmp_path / "b").chmod(0o644)
    with pytest.raises(TransportError, match="open to others"):
        load_engine_key(tmp_path / "b")
