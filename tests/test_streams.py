"""Output that outlasts its reader."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from graft.utils.streams import outlasting

TALKS = """
import os, sys
from graft.utils.streams import outlasting
with outlasting():
    for number in range(20000):
        print("a line on each of them", number)
        print("a line on each of them", number, file=sys.stderr)
    sys.stderr.flush()
    open(sys.argv[1], "w").write("ended")
os.write(2, b"what writes below Python fails no more")
"""


@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_process_goes_on_when_its_reader_is_gone(tmp_path: Path, which: str) -> None:
    other = {"stdout": "stderr", "stderr": "stdout"}[which]
    streams = {which: subprocess.PIPE, other: subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", TALKS, str(tmp_path / "said")], **streams) as process:  # type: ignore[call-overload]
        pipe = getattr(process, which)
        pipe.read(100)
        pipe.close()
        assert process.wait(60) == 0
    assert (tmp_path / "said").read_text() == "ended"


def test_the_command_line_ends_quietly_when_its_reader_is_gone() -> None:
    given = f"set -o pipefail; {sys.executable} -m graft show schema | head -c 10"
    ended = subprocess.run(["bash", "-c", given], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr, len(ended.stdout)) == (0, "", 10)


def test_other_errors_of_a_stream_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk below stdout is not a reader that has gone: the output would be lost in silence."""
    with (
        suppress(OSError),
        open("/dev/full", "w") as full,
    ):  # what is still buffered cannot be written when it is closed
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space"), outlasting():
            print("x" * 10_000)
        monkeypatch.undo()


def test_nothing_is_changed_afterwards_and_streams_keep_their_nature() -> None:
    before = sys.stdout, sys.stderr
    with outlasting():
        assert sys.stdout is not before[0] and sys.stdout.isatty() == before[0].isatty()
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before


def test_a_process_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pythonw has none."""
    monkeypatch.setattr(sys, "stdout", None)
    with outlasting():
        print("nowhere")
    assert os.path.exists(os.devnull)
