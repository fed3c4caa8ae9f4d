"""Commands as values: quoting and masking."""

from __future__ import annotations

import shlex

import pytest

from dynctl.command import MASK, Command


def test_render_round_trips_through_a_shell_parser() -> None:
    argv = ("prog", "a b", "it's", '{"k": "v"}', "")
    assert tuple(shlex.split(Command(argv).render())) == argv


@pytest.mark.parametrize(
    "name", ["API_KEY", "HF_TOKEN", "DYNCTL_API_KEY", "aws_secret", "DB_PASSWORD", "S3_ACCESS_KEY"]
)
def test_secret_environment_is_masked_when_shown(name: str) -> None:
    command = Command(("p",), env={name: "hunter2", "PATH_LIKE": "x"})
    assert command.shown_env() == {"PATH_LIKE": "x", name: MASK} or command.shown_env()[name] == MASK
    assert "hunter2" not in command.render()


@pytest.mark.parametrize("name", ["TOKENIZER", "TOKENIZERS_PARALLELISM", "MONKEY", "KEYS_FILE"])
def test_harmless_environment_stays_readable(name: str) -> None:
    assert Command(("p",), env={name: "x"}).shown_env() == {name: "x"}


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (("p", "--api-key", "k", "--x"), ("p", "--api-key", MASK, "--x")),
        (("p", "--api-key=k"), ("p", "--api-key=" + MASK)),
        (("p", "--admin-api-key", "k"), ("p", "--admin-api-key", MASK)),
        (("p", "--api-keys-file", "f"), ("p", "--api-keys-file", "f")),
    ],
)
def test_secret_flags_are_masked_when_shown(argv: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert Command(argv).shown_argv() == shown
