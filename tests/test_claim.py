"""Who may train in a run folder: one process, told by a lock of the operating system."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, SoftFileLock

from graft.errors import GraftError
from graft.runs import claim as module
from graft.runs.claim import LOCK, claim, file_system, is_claimed

HOLD = """
import sys
from pathlib import Path
from graft.runs.claim import claim
with claim(Path(sys.argv[1]), {}):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in the folder until the block ends."""
    given = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    (tmp_path / "config.yaml").touch()
    status = {"state": "running", "pid": 7, "host": "node-17"}
    with held_by_another(tmp_path) as process:
        assert is_claimed(tmp_path) is True
        for force in (False, True):  # what holds a lock is there, so force means nothing
            with (
                pytest.raises(GraftError, match="is still running: another process .*process 7 on node-17"),
                claim(tmp_path, status, force),
            ):
                pass
        process.kill()
        process.wait()
        assert is_claimed(tmp_path) is False
        with claim(tmp_path, status):
            assert is_claimed(tmp_path) is True
    assert is_claimed(tmp_path) is False


def test_a_claim_that_leads_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claim(tmp_path / "runs" / "a", {}):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with claim(tmp_path / "empty", {}):
        pass
    assert list((tmp_path / "empty").iterdir()) == []
    with claim(tmp_path / "runs" / "a", {}):
        (tmp_path / "runs" / "a" / "config.yaml").touch()
    assert (tmp_path / "runs" / "a" / LOCK).exists() and is_claimed(tmp_path / "runs" / "a") is False
    with claim(tmp_path / "runs" / "a", {}):  # a folder that was deleted in between
        import shutil

        shutil.rmtree(tmp_path / "runs")


def no_locks(number: int) -> Any:
    def acquire(self: FileLock, *given: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number))

    return acquire


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize(
    ("status", "refused"),
    [
        ({"state": "running", "host": "node-17", "pid": 1}, True),
        ({"state": "running", "host": "here", "pid": os.getpid()}, True),
        ({"state": "running", "host": "here", "pid": 2**22 + 1}, False),
        ({"state": "stopped", "host": "node-17", "pid": 1}, False),
        ({}, False),
    ],
)
def test_without_locks_the_status_is_asked_and_the_user_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: dict[str, Any], refused: bool
) -> None:
    monkeypatch.setattr(FileLock, "acquire", no_locks(number))
    monkeypatch.setattr(module.socket, "gethostname", lambda: "here")
    (tmp_path / LOCK).touch()
    assert is_claimed(tmp_path) is None
    if refused:
        with (
            pytest.raises(GraftError, match=r"cannot be told, because its file system has no locks.*--force"),
            claim(tmp_path, status),
        ):
            pass
    with claim(tmp_path, status, force=refused):
        pass


def test_a_lock_that_is_a_mere_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What filelock falls back to where flock is missing: a file that a killed process leaves."""
    monkeypatch.setattr(module, "FileLock", SoftFileLock)
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    (tmp_path / LOCK).touch()
    assert is_claimed(tmp_path) is None
    with claim(tmp_path, {}):
        pass
    with pytest.raises(GraftError, match="--force"), claim(tmp_path, {"state": "running", "host": "node-17"}):
        pass


@pytest.mark.parametrize(("host", "refused"), [("node-17", True), ("here", False)])
def test_a_file_system_of_several_hosts_may_hide_their_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, refused: bool
) -> None:
    monkeypatch.setattr(module, "file_system", lambda folder: "nfs")
    monkeypatch.setattr(module.socket, "gethostname", lambda: "here")
    status = {"state": "running", "host": host, "pid": 1}
    if refused:
        with (
            pytest.raises(GraftError, match=r"locks on this file system \(nfs\) may not reach other hosts"),
            claim(tmp_path, status),
        ):
            pass
    with claim(tmp_path, status, force=refused):
        assert is_claimed(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the file system")
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = (
        f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path}/a\\040b nfs4 rw 0 0\ntmpfs {tmp_path}/a\\040b/c tmpfs rw 0 0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, **more: mounts)
    assert file_system(tmp_path / "a b" / "runs") == "nfs4"
    assert file_system(tmp_path / "a b" / "c" / "runs") is None and file_system(tmp_path / "a") is None
