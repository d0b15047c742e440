"""The frame of the command line: verbs, errors and exit codes, as another process sees them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import graft
from graft import cli
from graft.cli import VERBS, build, main
from graft.errors import GraftError, MissingExtra


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "graft", *arguments], capture_output=True, text=True, cwd=folder)


def test_every_module_of_the_room_is_a_verb_or_shared_by_verbs() -> None:
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    loaded = {name: __import__(f"graft.cli.{name}", fromlist=["x"]) for name in modules}
    helpers = {name for name, module in loaded.items() if not hasattr(module, "command") and not hasattr(module, "app")}
    assert modules - helpers <= set(VERBS)
    built = build()
    found = [each.name for each in (*built.registered_commands, *built.registered_groups)]
    assert sorted(map(str, found)) == sorted(verb for verb in VERBS if verb in modules)


def test_every_verb_and_every_option_has_a_help_text() -> None:
    import typer

    group = typer.main.get_command(build())
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        for each in getattr(command, "commands", {name: command}).values():
            assert "Example: graft " in each.help, f"{name} {each.name}"
            options = [option for parameter in each.params for option in parameter.opts]
            assert "--json" in options, f"{name} {each.name}"
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def verbs() -> list[str]:
    import typer

    group = typer.main.get_command(build())
    found = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found += [f"{name} {each}" for each in below] if below else [name]
    return found


@pytest.mark.parametrize("verb", verbs())
@pytest.mark.parametrize("word", [["absent.yaml"], ["--no-such-option"]], ids=["file", "option"])
def test_every_verb_reports_a_mistake_as_json(
    verb: str, word: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), *word, "--json"])
    out = capsys.readouterr().out
    assert end.value.code == 2 and json.loads(out)["error"]["exit_code"] == 2 and json.loads(out)["error"]["message"]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_verb_says_so_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graft.cli.env.environment", stop)
    with pytest.raises(SystemExit) as end:
        main(["env", "--json"])
    assert end.value.code == 130
    assert json.loads(capsys.readouterr().out) == {"error": {"message": "interrupted", "exit_code": 130}}


def test_version_and_a_call_without_a_verb() -> None:
    assert run("--version").stdout == f"graft {graft.__version__}\n"
    assert "show" in run().stdout


def test_an_unknown_verb_is_the_users_mistake() -> None:
    answer = run("tarin")
    assert answer.returncode == 2 and "tarin" in answer.stderr and not answer.stdout


def test_a_wrong_input_is_a_message_and_exit_2(tmp_path: Path) -> None:
    answer = run("show", str(tmp_path / "absent"))
    assert answer.returncode == 2 and not answer.stdout
    assert answer.stderr.startswith("error: there is no folder") and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (GraftError("rank must be at least 1; given: 0"), 2, "error: rank must be at least 1; given: 0"),
        (MissingExtra("wandb", "track"), 2, "pip install 'graft-llm[track]'"),
    ],
)
def test_errors_of_the_user_end_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int, words: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("graft.cli.env.environment", fail)
    with pytest.raises(SystemExit) as end:
        main(["env"])
    assert end.value.code == code and words in capsys.readouterr().err


def test_our_own_errors_end_with_1_and_a_traceback(tmp_path: Path) -> None:
    code = (
        "import graft.cli.env as env, graft.cli as cli\n"
        "def fail(): raise RuntimeError('our fault')\n"
        "env.environment = fail\ncli.main(['env'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 1 and "Traceback" in answer.stderr and "our fault" in answer.stderr


HOSTILE = "\x1b]0;TITLE\x07 \x1b[31m \u009b2J \u202e [bold]\r\x08"


def test_no_control_character_of_data_reaches_the_terminal(tmp_path: Path) -> None:
    from rich.text import Text

    from graft.utils.terminal import console, shown, visible

    stream = io.StringIO()
    shown(stream).write(HOSTILE.replace("\x1b[31m", ""))
    with contextlib.redirect_stdout(shown(stream)):
        console().print(Text(HOSTILE), HOSTILE.replace("[", "\\["), {"a": HOSTILE})
        print(visible(HOSTILE))
    assert not set(stream.getvalue()) & {"\x1b", "\x07", "\u009b", "\u202e", "\r", "\x08"}
    assert r"\x1b]0;TITLE" in stream.getvalue() and r"\u202e" in stream.getvalue()


def test_a_stream_that_was_a_file_may_be_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that another one starts by a fork, and gives a pipe for its output."""
    with (tmp_path / "out").open("w") as stream:
        reader, writer = os.pipe()
        os.dup2(writer, stream.fileno())
        os.close(writer)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as end:
            main(["--version"])
    assert (end.value.code, os.read(reader, 100).decode().strip()) == (0, f"graft {graft.__version__}")
    os.close(reader)


def test_errors_and_tables_show_hostile_names_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from graft.cli.common import print_facts, print_table

    def fail() -> None:
        print_table(["[red]a", HOSTILE], [["[bold]b[/]", HOSTILE]], title="[x]")
        print_facts({"[dim]n": HOSTILE})
        raise GraftError(f"no file {HOSTILE}")

    monkeypatch.setattr("graft.cli.env.environment", fail)
    with pytest.raises(SystemExit):
        main(["env"])
    said = capsys.readouterr()
    assert all(word in said.out for word in ("[red]a", "[bold]b[/]", "[x]", "[dim]n"))
    assert "\x1b]" not in said.out + said.err and "\u202e" not in said.out + said.err
    assert r"\x1b]0;TITLE" in said.err


def test_with_json_an_error_is_json_and_nothing_else_is_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatter() -> None:
        print("a library talks")
        raise GraftError("no \u009b")

    for arguments, code, words in (
        (["env", "--json"], 2, "no \u009b"),
        (["tarin", "--json"], 2, "No such command 'tarin'"),
        (["env", "--jsn", "--json"], 2, "No such option"),
        (["train", "absent.yaml", "--json"], 2, "there is no file absent.yaml"),
    ):
        monkeypatch.setattr("graft.cli.env.environment", chatter)
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr()
        error = json.loads(said.out)["error"]
        assert end.value.code == error["exit_code"] == code and words in error["message"]
        assert "\u009b" not in said.out


def test_an_error_of_the_file_system_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("graft.cli.env.environment", lambda: Path("/proc/1/mem-absent").read_text())
    with pytest.raises(SystemExit) as end:
        main(["env"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: /proc/1/mem-absent: No such file or directory\n"


def test_other_libraries_are_quiet_unless_v(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatter() -> None:
        warnings.warn_explicit("old", FutureWarning, "lib.py", 1)
        logging.getLogger("some.library").warning("Failed to load")
        warnings.warn_explicit("left out", UserWarning, str(Path(graft.__file__).parent / "x.py"), 1)
        raise GraftError("end")

    monkeypatch.setattr("graft.cli.env.environment", chatter)
    monkeypatch.setattr(logging.getLogger("some.library"), "propagate", False)
    for arguments, loud in ((["env"], False), (["env", "-v"], True), (["--verbose", "env"], True)):
        with pytest.raises(SystemExit):
            main(arguments)
        said = capsys.readouterr().err
        assert ("Failed to load" in said, "Traceback" in said) == (loud, loud) and "FutureWarning" not in said
        assert "note: left out" in said and "error: end" in said
