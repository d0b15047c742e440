"""A thousand broken adapter folders of four formats: no traceback, no hang, no memory, no code, and no other numbers without a word."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

import graft
from tests.contract.table import base, ids, logits
from tests.formats.fuzzing import fuzz, whole_folders

SECONDS, MEGABYTES = 20, 600


class Hang(BaseException):
    """A folder took too long. Not an Exception, so that nothing on the way catches it."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return whole_folders(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def right(whole: dict[str, Path]) -> dict[str, Tensor]:
    """What each whole folder computes."""
    return {name: logits(graft.load(base("llama"), folder, name="a"), ids()) for name, folder in whole.items()}


def campaign(seeds: range, whole: dict[str, Path], right: dict[str, Tensor], root: Path) -> Counter[str]:
    """Load the folder of every seed; count how it ended, and list what should not be."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    before, memory = signal.signal(signal.SIGALRM, _hang), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for seed in seeds:
            case = fuzz(seed, whole, root)
            ended, begun = _ending(case.folder, right[case.whole]), time.monotonic()
            ended = "open" if ended == "other numbers" and case.open else ended
            found[ended.partition(":")[0]] += 1
            if ended.partition(":")[0] not in ("named", "same", "open") or time.monotonic() - begun > SECONDS:
                wrong.append(f"seed {seed}, {case.whole}, {case.done}: {ended}")
            shutil.rmtree(case.folder)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not wrong, "\n".join(wrong)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < MEGABYTES
    assert "GRAFT_FUZZ_RAN" not in os.environ
    return found


def _ending(folder: Path, right: Tensor) -> str:
    model = base("llama")
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graft.load(model, folder, name="a")
            got = logits(model, ids())
    except graft.GraftError as error:
        if str(folder) not in str(error):
            return f"unnamed: {error}"
        return "named" if "graft_state" not in model.__dict__ else "changed: the model keeps something"
    except Hang:
        return "hang"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "same" if torch.equal(got, right) or (got - right).abs().max() < 1e-5 else "other numbers"


def test_broken_folders_are_refused_by_name(whole: dict[str, Path], right: dict[str, Tensor], tmp_path: Path) -> None:
    assert campaign(range(80), whole, right, tmp_path)["named"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 3000, 500))
def test_a_thousand_more(start: int, whole: dict[str, Path], right: dict[str, Tensor], tmp_path: Path) -> None:
    print(dict(campaign(range(start, start + 500), whole, right, tmp_path)))
