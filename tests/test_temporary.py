"""Temporary names: what killed processes left goes with the next write to the same place, and what lives is never touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graft.utils.files import new_dir, write_text_atomic
from graft.utils.temporary import remove_if_left, temporary

HOLD = """
import sys
from pathlib import Path
from graft.utils.temporary import temporary
with temporary(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as path:
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("what", ["file", "folder"])
def test_leftovers_go_and_living_work_stays(tmp_path: Path, what: str) -> None:
    given = [sys.executable, "-c", HOLD, str(tmp_path / "it"), what]
    with subprocess.Popen(given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        living = Path(process.stdout.readline().strip())
        old = tmp_path / ".it.4711.tmp"  # of a process id, as earlier versions wrote them
        old.mkdir() if what == "folder" else old.write_text("half")
        if what == "folder":
            with new_dir(tmp_path / "it") as fresh:
                (fresh / "a").write_text("whole")
        else:
            write_text_atomic(tmp_path / "it", "whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "it"])
        process.kill()
    assert living.exists()
    with temporary(tmp_path / "it", folder=what == "folder"):
        assert not living.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_name_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes it between its making and its locking."""
    plain, made = os.open, []

    def raced(path: Path, *given: int, **more: int) -> int:
        if not made:
            made.append(path)
            remove_if_left(path)
            assert not Path(path).exists()
        return plain(path, *given, **more)

    monkeypatch.setattr(os, "open", raced)
    with temporary(tmp_path / "it", folder=True) as path:
        assert path.exists() and path != made[0]


def test_other_peoples_names_stay(tmp_path: Path) -> None:
    for name in (".it.tmp", "it.1.tmp", ".other.1.tmp", ".it.1.tmp.txt"):
        (tmp_path / name).touch()
    write_text_atomic(tmp_path / "it", "whole")
    assert len(list(tmp_path.iterdir())) == 5
    shutil.rmtree(tmp_path)
    remove_if_left(tmp_path / "absent")


def test_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text_atomic(tmp_path / "file", "x")
        with new_dir(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
