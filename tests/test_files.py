"""Whole files or none: replacement, crashes between two steps, and full disks."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from graft.errors import GraftError
from graft.utils.files import new_dir, recover_dir, replace_dir_atomic, to_json, write_json_atomic, write_text_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    for value in (1, 2):
        write_json_atomic(tmp_path / "a.json", {"value": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 2}
    assert names(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text_atomic(tmp_path / "a.txt", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GraftError, match=r"cannot write .*a\.txt: the disk is full \(.* MB free\)"):
        write_text_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_an_error_that_is_not_the_users_is_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text_atomic(tmp_path / "absent" / "a.txt", "x")


def test_json_takes_numbers_of_numpy_and_writes_nan_as_text() -> None:
    values = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": math.nan,
        "d": -math.inf,
        "e": Path("x"),
        "f": (1, None, True),
    }
    written = json.loads(to_json(values))
    assert written == {"a": 0.5, "b": 3, "c": "nan", "d": "-inf", "e": "x", "f": [1, None, True]}
    assert math.isnan(float(written["c"])) and float(written["d"]) == -math.inf
    with pytest.raises(TypeError, match="object has no JSON form"):
        to_json({"a": object()})


def test_a_new_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with new_dir(tmp_path / "adapters" / "math") as folder:
            (folder / "file").write_text(text)
            assert not (tmp_path / "adapters" / "math").exists() or text == "two"
    assert (tmp_path / "adapters" / "math" / "file").read_text() == "two"
    assert names(tmp_path / "adapters") == ["math"]


def test_a_folder_that_fails_to_be_filled_leaves_the_old_one(tmp_path: Path) -> None:
    with new_dir(tmp_path / "math") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(RuntimeError, match="in between"), new_dir(tmp_path / "math") as folder:
        (folder / "file").write_text("new")
        raise RuntimeError("in between")
    assert (tmp_path / "math" / "file").read_text() == "old" and names(tmp_path) == ["math"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_inside_a_replacement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    old, new = tmp_path / "math", tmp_path / "new"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    rename, done = os.rename, []

    def crashing(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", crashing)
    with pytest.raises(KeyboardInterrupt):
        replace_dir_atomic(new, old)
    monkeypatch.undo()
    recover_dir(old)
    assert (old / "file").read_text() == "old" and (new / "file").read_text() == "new"
    replace_dir_atomic(new, old)
    assert (old / "file").read_text() == "new" and names(tmp_path) == ["math"]


FULL_DISK = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from graft.errors import GraftError
from graft.utils.files import new_dir, write_text_atomic
from graft.utils.jsonl import JsonLines

disk, refused = Path(sys.argv[1]), []

def attempt(write):
    try:
        write()
    except GraftError as error:
        assert "the disk is full" in str(error), error
        refused.append(str(error))

def save(size):
    with new_dir(disk / "adapter") as folder:
        save_file({"a": np.zeros(size, np.uint8)}, folder / "adapter_model.safetensors")

write_text_atomic(disk / "a.txt", "old")
save(10)
attempt(lambda: write_text_atomic(disk / "a.txt", "x" * 400_000))
attempt(lambda: save(400_000))
assert (disk / "a.txt").read_text() == "old"
assert (disk / "adapter" / "adapter_model.safetensors").stat().st_size < 1000
lines = JsonLines(disk / "metrics.jsonl")
while len(refused) == 2:
    attempt(lambda: lines.append({"text": "y" * 10_000}))
assert lines.path.read_bytes().endswith(b"}\\n") and len(lines.read()) > 5
assert sorted(path.name for path in disk.iterdir()) == ["a.txt", "adapter", "metrics.jsonl"]
print("refused", len(refused))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to make a small disk")
def test_on_a_disk_that_is_really_full_nothing_is_half_written(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=256k tmpfs {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a small disk")
    command = f"{mount} && exec {sys.executable} {script} {disk}"
    answer = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True)
    assert answer.stdout == "refused 3\n", answer.stderr
