"""The block `jobs`: what a job takes from the top, changes on the command line, and mistakes with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graft
from graft.config import HalvingConfig, JobsConfig, RunConfig, dump_run, load_job, load_run
from graft.errors import GraftError

RUN = """\
base: {model: some/base}
adapter: {kind: lora, rank: 8, alpha: 4}
data:
  train: a.json
  validation: 10
train: {lr: 1e-3, token_budget: 64}
jobs:
  plain:
  wide:
    adapter: {rank: 32}
    train: {lr: 1e-2}
    priority: 2
  other:
    adapter: {kind: series, bottleneck: 5}
    data: {train: {path: b.json}, validation: null}
    eval: {limit: 3}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def refusal(path: Path, *changes: str) -> str:
    with pytest.raises(GraftError) as caught:
        load_run(path, changes)
    return str(caught.value).replace(str(path), "run.yaml")


def test_a_job_takes_from_the_top_field_by_field(run_yaml: Path) -> None:
    run = load_run(run_yaml)
    assert isinstance(run, JobsConfig)
    each = run.each()
    assert list(each) == ["plain", "wide", "other"] and [run.priority(name) for name in each] == [0, 2, 0]
    assert each["plain"].adapter == graft.LoRA(rank=8, alpha=4)
    assert each["wide"].adapter == graft.LoRA(rank=32, alpha=4)
    assert each["other"].adapter == graft.Series(bottleneck=5)
    assert [job.train.lr for job in each.values()] == [1e-3, 1e-2, 1e-3]
    assert {job.train.token_budget for job in each.values()} == {64}
    assert [job.data.validation for job in each.values()] == [10, 10, None]
    assert [job.eval.limit for job in each.values()] == [None, None, 3]


def test_a_job_is_the_run_that_it_would_be_alone(run_yaml: Path) -> None:
    alone = {
        "base": {"model": "some/base"}, "adapter": {"kind": "lora", "rank": 32, "alpha": 4},
        "data": {"train": "a.json", "validation": 10}, "train": {"lr": 1e-2, "token_budget": 64},
    }  # fmt: skip
    assert load_run(run_yaml).each()["wide"] == load_run(alone)
    assert load_run(alone).each() == {"lora": load_run(alone)}


def test_changes_reach_into_jobs_and_a_change_at_the_top_reaches_all_that_say_nothing(run_yaml: Path) -> None:
    each = load_run(run_yaml, ["jobs.plain.train.lr=1", "jobs.wide.adapter.rank=2", "train.seed=7"]).each()
    assert (each["plain"].train.lr, each["wide"].adapter.rank, each["wide"].adapter.alpha) == (1.0, 2, 4)
    assert {job.train.seed for job in each.values()} == {7}
    other = load_run(run_yaml, ["jobs.wide.adapter.kind=parallel", "jobs.wide.adapter.bottleneck=3"]).each()["wide"]
    assert other.adapter == graft.Parallel(bottleneck=3)
    new = load_run(run_yaml, ["jobs.new={adapter: {rank: 1}}"]).each()
    assert new["new"].adapter.rank == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("jobs.wied.train.lr=1", ["there is no job 'wied'", "Did you mean 'wide'?", "plain, wide, other"]),
        ("jobs.wide.train.layout=flat", ["jobs.wide.train.layout is shared by all jobs", "train.layout"]),
        ("jobs.wide.train.lrr=1", ["unknown key 'jobs.wide.train.lrr'", "Did you mean 'lr'?"]),
        ("base.dropout=true", ["base.dropout needs a single job"]),
    ],
)
def test_changes_that_are_refused(run_yaml: Path, change: str, words: list[str]) -> None:
    message = refusal(run_yaml, change)
    assert all(word in message for word in words), message


def test_a_change_that_no_job_would_feel_is_refused(run_yaml: Path) -> None:
    own = ["jobs.plain.data.train=c.json", "jobs.wide.data.train=c.json"]
    assert "'data.train' has no effect, because every job sets its own" in refusal(run_yaml, *own, "data.train=d.json")
    load_run(run_yaml, [own[0], "data.train=d.json"])


@pytest.mark.parametrize(
    ("written", "wrong", "words"),
    [
        ("    train: {lr: 1e-2}", "    train: {lrr: 1}", ["run.yaml:11:", "'jobs.wide.train.lrr'", "Did you mean 'lr'?"]),
        ("    train: {lr: 1e-2}", "    train: {lr: x}", ["run.yaml:11: jobs.wide.train.lr must be a number; given: 'x'"]),
        ("    train: {lr: 1e-2}", "    trian: {lr: 1}", ["run.yaml:11:", "'jobs.wide.trian'", "Did you mean 'train'?"]),
        ("{rank: 32}", "{rnak: 32}", ["run.yaml:10:", "'rnak'", "Did you mean 'rank'?"]),
        ("bottleneck: 5", "bottelneck: 5", ["run.yaml:14:", "Did you mean 'bottleneck'?"]),
        ("train: {lr: 1e-3,", "train: {lrr: 1e-3,", ["run.yaml:6: unknown key 'train.lrr'"]),
        ("  train: a.json\n", "", ["run.yaml:3: missing key 'data.train' of job 'plain'", "of job 'wide'"]),
        ("  plain:\n", "  plain: 5\n", ["run.yaml:8: jobs.plain must be a mapping; given: 5"]),
        ("  plain:", "  base:", ["run.yaml:7:", "'base' cannot name a job"]),
        ("  plain:", "  a.b:", ["'a.b' cannot name a job"]),
        ("  plain:", "  wide--reference:", ["'wide--reference' cannot name a job", "does not end with '--reference'"]),
        ("jobs:\n", "scheduler: {togehter: 2}\njobs:\n", ["unknown key 'scheduler.togehter'", "'together'"]),
        ("jobs:\n", "scheduler: {halving: {rungs: [3, 2]}}\njobs:\n", ["scheduler.halving.rungs must be rising"]),
        ("    priority: 2", "    train: {patience: 2}", ["run.yaml:12:", "not valid YAML", "duplicate key"]),
        ("validation: null", "validation: null, seed: -1", ["run.yaml:15: jobs.other.data.seed must be"]),
        ("    eval: {limit: 3}", "    train: {patience: 3}", ["run.yaml:13: train.patience has no effect"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_once_with_the_line_where_it_stands(
    run_yaml: Path, written: str, wrong: str, words: list[str]
) -> None:
    assert RUN.count(written) == 1
    run_yaml.write_text(RUN.replace(written, wrong))
    message = refusal(run_yaml)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == len(set(message.splitlines()))


def test_a_misspelt_jobs_is_recognised(run_yaml: Path) -> None:
    run_yaml.write_text(RUN.replace("jobs:", "jbos:"))
    assert "Did you mean 'jobs'?" in refusal(run_yaml)


def test_what_is_written_reads_back_to_the_same_jobs(run_yaml: Path, tmp_path: Path) -> None:
    changes = ["scheduler.halving={rungs: [2, 4], keep: 0.25}", "scheduler.together=2"]
    run = load_run(run_yaml, changes)
    dump_run(run, tmp_path / "again.yaml")
    again = load_run(tmp_path / "again.yaml")
    assert again.each() == run.each() and again.scheduler == run.scheduler
    assert again.scheduler.halving == HalvingConfig(rungs=(2, 4), keep=0.25)
    dump_run(again, tmp_path / "third.yaml")
    assert (tmp_path / "third.yaml").read_text() == (tmp_path / "again.yaml").read_text()
    assert "weight_decay: null" in (tmp_path / "again.yaml").read_text()


def test_a_job_of_its_own_takes_from_the_run_and_its_mistakes_have_lines(run_yaml: Path, tmp_path: Path) -> None:
    run, path = load_run(run_yaml), tmp_path / "late.yaml"
    path.write_text("adapter: {rank: 3}\ntrain:\n  lr: 0.5\npriority: 4\n")
    job = load_job(path, "late", run)
    assert (job.adapter, job.train, job.priority) == ({"rank": 3}, {"lr": 0.5}, 4)
    path.write_text("adapter: {rank: 3}\ntrain:\n  lrr: 0.5\n")
    with pytest.raises(GraftError, match=r"late.yaml:3: unknown key 'train.lrr'. Did you mean 'lr'"):
        load_job(path, "late", run)
    path.write_text("base: {model: x}\n")
    with pytest.raises(GraftError, match=r"late.yaml:1: unknown key 'base'. Allowed: adapter, data"):
        load_job(path, "late", run)


def test_a_job_can_join_a_run_of_one(tmp_path: Path) -> None:
    alone: dict[str, Any] = {"base": {"model": "b"}, "adapter": {"kind": "lora"}, "data": {"train": "a.json"}}
    run = load_run(alone)
    assert isinstance(run, RunConfig) and load_job({"adapter": {"rank": 2}}, "late", run).adapter == {"rank": 2}
    with pytest.raises(GraftError, match="'base' cannot name a job"):
        load_job({}, "base", run)
