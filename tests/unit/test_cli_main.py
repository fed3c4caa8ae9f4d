"""The dispatcher: help, unknown verbs, errors in one message, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynctl import errors
from dynctl.cli import invoke
from dynctl.cli.exits import EXIT_CODES
from dynctl.cli.main import GROUPS, INTERNAL, VERBS, dispatch, help_text, main
from dynctl.cli.render import age, paint, program, table
from dynctl.cli.terminal import wants_colour
from dynctl.deploy.home import Home
from dynctl.errors import DynctlError, PortInUse
from dynctl.native import load


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DYNCTL_DEBUG", raising=False)


def kinds(root: type[DynctlError]) -> list[str]:
    return [root.kind] + [kind for child in root.__subclasses__() for kind in kinds(child)]


def test_every_verb_is_in_one_group_and_in_the_help() -> None:
    grouped = [verb for _, verbs in GROUPS for verb in verbs]
    assert sorted([*grouped, *INTERNAL]) == sorted(VERBS)
    text = help_text(colour=False)
    assert all((f"  {verb} " in text) != (verb in INTERNAL) for verb in VERBS)
    assert "\033" not in text
    assert "\033[1m" in help_text(colour=True)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_is_there_and_has_help_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["help", verb]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: dynctl {verb}" in shown
    assert "--json" in shown


def test_every_exit_code_is_of_an_error_there_is() -> None:
    assert set(EXIT_CODES) <= set(kinds(errors.DynctlError))


def test_an_error_kind_without_an_exit_code_is_one_that_no_verb_ends_with() -> None:
    """A connection that was refused ended with 1 instead of 8 as long as its kind was missing."""
    code_1 = {
        "error": "the root: a fault of dynctl's own, or trouble with a file",
        "codec": "a file that cannot be read as what it should be",
        "superseded": "sidecars and frontends have it, as their own exit code",
        "profile": "trouble with a file: a profile or a trace",
    }
    tree = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, DynctlError)
    ]
    assert {each.kind for each in tree} - set(EXIT_CODES) == set(code_1)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(args) == 0
    assert "Usage: dynctl VERB" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dynctl ")
    assert dispatch(["version", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"version", "python", "hot_path"}
    assert told["hot_path"] == {"compiled": load.compiled is not None, "why_not": load.missing}


def test_a_misspelt_verb_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["statsu"]) == 2
    assert "did you mean 'status'?" in capsys.readouterr().err
    assert dispatch(["--frobnicate", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "usage"
    assert "no such option: --frobnicate" in error["message"]


@pytest.mark.parametrize("verb", ["up", "down"])
def test_a_timeout_is_written_as_in_recipes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("90", "90s", "5m", "1h30m"):
        assert dispatch([verb, "no-such-thing", "--timeout", text]) in (2, 3)
        assert "no-such-thing" in capsys.readouterr().err
    for text in ("-1", "nan", "inf", "5 minutes", ""):
        assert dispatch([verb, "no-such-thing", f"--timeout={text}"]) == 2
        assert 'a duration such as "200ms"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["ps", "--bogus"], ["up"], ["version", "x"], ["down", "--timeout", "soon"], ["down", "a", "b"]]
)
def test_a_wrong_command_line_is_one_message(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"dynctl {args[0]} --help" in said.err


def raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def verb() -> None:
        """Fails."""
        raise error

    monkeypatch.setattr(invoke, "load", lambda target: verb)


def test_a_failure_is_one_message_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(PortInUse("port 8000 is taken", where="r.yaml:3", hint="choose another"), monkeypatch)
    assert dispatch(["ls"]) == 7
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: r.yaml:3: port 8000 is taken (choose another)\n")


def test_a_failure_for_scripts_is_one_object_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(PortInUse("port 8000 is taken", where="r.yaml:3", hint="choose another"), monkeypatch)
    assert invoke.invoke("ls", "x:y", "", ["--json"]) == 2  # the option is not of this verb: still JSON
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "usage"
    assert invoke.report(PortInUse("taken", where="r.yaml:3"), as_json=True) == 7
    assert json.loads(capsys.readouterr().out) == {
        "error": {"type": "port_in_use", "message": "taken", "where": "r.yaml:3"}
    }


def test_a_fault_of_our_own_is_one_message_with_the_way_to_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(ZeroDivisionError("division by zero"), monkeypatch)
    assert dispatch(["ls"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in err
    assert "Traceback" not in err
    monkeypatch.setenv("DYNCTL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        dispatch(["ls"])


def test_trouble_with_a_file_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(FileNotFoundError(2, "No such file or directory", "/x/y"), monkeypatch)
    assert dispatch(["ls"]) == 1
    assert capsys.readouterr().err == "error: /x/y: No such file or directory\n"
    monkeypatch.setenv("DYNCTL_DEBUG", "1")
    assert dispatch(["ls"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where_a_failure_came_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNCTL_DEBUG", "1")
    raises(DynctlError("no"), monkeypatch)
    assert dispatch(["ls"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    raises(KeyboardInterrupt(), monkeypatch)
    with pytest.raises(SystemExit) as left:
        main(["ls"])
    assert left.value.code == 130


def test_an_exit_code_of_the_verb_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invoke, "load", lambda target: lambda: 42)
    with pytest.raises(SystemExit) as left:
        main(["ls"])
    assert left.value.code == 42


def test_a_reader_that_goes_away_is_no_error() -> None:
    line = f"{sys.executable} -m dynctl.cli.main completion bash | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")


@pytest.mark.parametrize("verb", ["ls --json", "schema", "up --help"])
def test_a_reader_that_was_never_there_ends_with_the_documented_code(verb: str) -> None:
    closed = f"exec 3> >(exec true); wait $!; {sys.executable} -m dynctl.cli.main {verb} >&3; echo $? >&2"
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "141\n"


def test_the_way_back_is_what_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dynctl").write_text("#!/bin/sh\n")
        (tmp_path / folder / "dynctl").chmod(0o755)
    called = str(tmp_path / "here" / "dynctl")
    monkeypatch.setattr(sys, "argv", [called, "up"])
    for path, said in (
        ("", called),
        (str(tmp_path / "elsewhere"), called),
        (str(tmp_path / "here"), "dynctl"),
    ):
        monkeypatch.setenv("PATH", path)
        assert program() == said
    monkeypatch.setattr(sys, "argv", ["/x/dynctl/cli/main.py", "up"])
    assert program() == "dynctl"


def test_colour_only_where_it_is_wanted() -> None:
    assert wants_colour(True, {})
    assert not wants_colour(False, {})
    assert not wants_colour(True, {"NO_COLOR": "1"})
    assert not wants_colour(True, {"TERM": "dumb"})
    assert paint("x", "good") == "x"


def test_colour_is_put_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("x", "good") == "\033[32mx\033[0m"


def test_tables_are_aligned() -> None:
    assert table(("A", "STATE"), [["xx", "ready"], ["y", ""]], state_column=1) == "A   STATE\nxx  ready\ny"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (5.9, "5s"), (65, "1m05s"), (3700, "1h01m"), (90000, "1d01h")],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_without_deployments_every_verb_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("ps", "status", "logs", "events", "down"):
        assert dispatch([verb]) == 2
        assert "no deployment runs (dynctl up starts one)" in capsys.readouterr().err
        assert dispatch([verb, "nope", *(["decode"] if verb == "logs" else [])]) == 2
        assert "no deployment 'nope'" in capsys.readouterr().err
    assert dispatch(["ls"]) == 0
    assert dispatch(["ls", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_down_works_on_a_run_whose_state_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    home = Home(Path(os.environ["DYNCTL_HOME"]))
    home.prepare()
    home.point("torn", home.create_run("torn-1", {"state.json": "{"}))
    assert dispatch(["down", "torn", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["processes_ended"] == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)
    assert "timeout" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, timeout=30, check=True)
    assert dispatch(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script.rstrip("\n")}


def test_completion_in_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path(os.environ["DYNCTL_HOME"])
    (home / "deployments").mkdir(parents=True)
    (home / "deployments" / "quick").symlink_to("../runs/quick-1")
    dispatch(["completion", "bash"])
    script = capsys.readouterr().out

    def complete(*words: str) -> list[str]:
        listed = " ".join(f"'{word}'" for word in words)
        ask = f"COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _dynctl"
        line = ask + "; printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.split()

    assert complete("dynctl", "sta") == ["status"]
    assert complete("dynctl", "ps", "q") == ["quick"]
    assert complete("dynctl", "up", "--det") == ["--detach"]
    assert complete("dynctl", "logs", "dec") == ["decode"]
    assert complete("dynctl", "completion", "z") == ["zsh"]


def test_completion_for_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
