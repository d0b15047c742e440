"""What does not go with training the base itself, by `full` or `qft`, is a named error."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.config import load_run
from graft.errors import GraftError
from graft.training.start import train
from tests.training.conftest import tiny
from tests.training.test_full import RUN, job_of
from tests.training.test_qft import RUN as QFT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["adapter={kind: lora}"], "train.method full trains the base itself, so an adapter has no use: remove the key `adapter`"),
        (["train.method=adapter"], "missing key 'adapter': name a kind, such as lora, or train the base itself"),
        (["train.method=mezo"], "missing key 'adapter': name a kind, such as lora, or set train.method.parts to all"),
        (["base.quantize=nf4"], "train.method full trains the base's own weights, which base.quantize: nf4 makes too coarse"),
        (["base.reversible=meft1"], "leaves an ordinary model, which base.reversible would not be"),
        (["train.compile=true"], "train.compile does not go with train.method full"),
        (["train.init_from=x"], "init_from is an adapter to start from, but method full trains the base"),
        (["data.task=preference", "train.objective=dpo"], "objective dpo compares with the base, which method full itself trains"),
        (["train.method={kind: mezo, parts: all}", "data.task=preference", "train.objective=kto"], "kto compares with the base"),
        (["train.method=adapter", "adapter=lora", "train.accumulate_in=float32"], "accumulate_in has no effect with method adapter"),
        (["train.method={kind: full, parts: ''}"], "train.method.parts must name parts of the base"),
        (["train.method={kind: full, part: all}"], "unknown key 'train.method.part'. Did you mean 'parts'"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_full_training_is_named(changes: list[str], said: str) -> None:
    with pytest.raises(GraftError) as raised:
        load_run(RUN, changes)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.accumulate_in=float32"], "train.accumulate_in: float32 has no effect on a base in float32"),
        (
            ["train.method={kind: full, rounding: stochastic}"],
            "rounding: stochastic has no effect on a base in float32",
        ),
    ],
)
def test_what_has_no_effect_in_float32_is_named(
    changes: list[str], said: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    with pytest.raises(GraftError, match=said):
        train(load_run(RUN, changes), tmp_path / "out", quiet=True)


def test_jobs_share_a_frozen_base() -> None:
    for job in ({"train": {"method": "full"}}, {"train": {"method": {"kind": "mezo", "parts": "all"}}}):
        with pytest.raises(
            GraftError, match="of job 'b' trains the base itself, which jobs share: write it as a run of its"
        ):
            load_run({**RUN, "train": {}, "adapter": {"kind": "lora"}, "jobs": {"a": {}, "b": job}})


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ("attn.z", "site 'attn.z' matches nothing"),
        ("attn.q", "'attn.q' is a slice of a fused projection, which trains as a whole"),
    ],
)
def test_parts_that_are_not_there_are_named(parts: str, said: str) -> None:
    with pytest.raises(GraftError, match=said):
        job_of(tiny("gpt2"), {"kind": "full", "parts": parts})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.optimizer=adamw"], "method qft updates by Lion with a state of its own in 8 bits, not by adamw"),
        (["train.optimizer=lion-8bit"], "not by lion-8bit: set optimizer to lion, or remove it"),
        (["train.method={kind: qft, update: in_backward}"], "so their norm cannot be clipped: set clip to null, or update to after"),
        (["train.accumulate_in=float32"], "accumulate_in has no effect with method qft"),
        (["train.method={kind: qft, outliers: 0.9}"], "train.method.outliers"),
        (["train.compile=true"], "train.compile does not go with train.method qft"),
        (["adapter=lora"], "train.method qft trains the base itself, so an adapter has no use"),
        (["base.quantize=int8"], "train.method qft trains the base's own weights, which base.quantize: int8"),
        (["data.task=preference", "train.objective=ipo"], "objective ipo compares with the base, which method qft itself trains"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_qft_is_named(changes: list[str], said: str) -> None:
    with pytest.raises(GraftError) as raised:
        load_run(QFT, changes)
    assert said in str(raised.value)
