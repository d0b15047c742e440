"""A run's YAML: what is read, what is refused and in which words, and that what is written reads back the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from graft.config import RunConfig, SourceConfig, TrainConfig, dump_run, load_run, schema
from graft.errors import GraftError

RUN = """\
# a comment
base: {model: some/base, dtype: bfloat16}
adapter:
  kind: lora
  rank: 16
  sites: attn.q attn.v
data:
  train:
    - a.json
    - path: b.jsonl
      weight: 2
  validation: 120
train: {epochs: 3, lr: 3e-4, warmup: 100}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def refusal(path: Path | dict[str, Any], *changes: str) -> str:
    with pytest.raises(GraftError) as caught:
        load_run(path, changes)
    return str(caught.value).replace(str(path), "run.yaml")


def test_the_example_of_the_readme_is_read_with_its_numbers_as_numbers(run_yaml: Path) -> None:
    run = load_run(run_yaml)
    assert run.base.model == "some/base"
    assert (run.train.lr, run.train.epochs, run.train.warmup) == (3e-4, 3.0, 100)
    assert run.adapter == graft.LoRA(rank=16, sites="attn.q attn.v")
    assert run.data.train == ["a.json", SourceConfig(path="b.jsonl", weight=2.0)]
    assert run.data.validation == 120


def test_a_mapping_and_python_objects_serve_as_well(run_yaml: Path) -> None:
    lora = graft.LoRA(rank=16, sites="attn.q attn.v")
    data = {"train": ["a.json", {"path": "b.jsonl", "weight": 2}], "validation": 120}
    train = {"epochs": 3, "lr": 3e-4, "warmup": 100}
    base = {"model": "some/base", "dtype": "bfloat16"}
    assert load_run({"base": base, "adapter": lora, "data": data, "train": train}) == load_run(run_yaml)


@pytest.mark.parametrize(
    ("written", "wrong", "words"),
    [
        ("  rank: 16", "  rnak: 16", ["run.yaml:5:", "'rnak'", "Did you mean 'rank'?", "alpha"]),
        ("  kind: lora", "  kind: lroa", ["run.yaml:4:", "'lroa'", "Did you mean 'lora'?"]),
        ("  rank: 16", "  rank: 0", ["run.yaml:5:", "adapter.rank", "0"]),
        ("  rank: 16", "  rank: many", ["run.yaml:5:", "adapter.rank must be a whole number", "'many'"]),
        ("      weight: 2", "      wieght: 2", ["run.yaml:11:", "'data.train.1.wieght'", "'weight'"]),
        ("      weight: 2", "      weight: 0", ["run.yaml:11:", "data.train.1.weight must be greater than 0"]),
        ("    - a.json", "    - 3", ["run.yaml:9:", "data.train.0 must be a path, or a mapping", "given: 3"]),
        ("validation: 120", "validaton: 120", ["run.yaml:12:", "'data.validaton'", "Did you mean 'validation'?"]),
        ("validation: 120", "validation: 1.5", ["run.yaml:12:", "data.validation must be less than 1"]),
        ("validation: 120", "validation: true", ["run.yaml:12:", "a number of samples", "given: True"]),
        ("lr: 3e-4", "lr: fast", ["run.yaml:13:", "train.lr must be a number", "'fast'"]),
        ("lr: 3e-4", "lr: '3e-4'", ["run.yaml:13:", "train.lr must be a number", "'3e-4'"]),
        ("warmup: 100", "warmup: 1.5", ["run.yaml:13:", "train.warmup", "fraction of all steps below 1"]),
        ("epochs: 3", "epocs: 3", ["run.yaml:13:", "'train.epocs'", "Did you mean 'epochs'?"]),
        ("dtype: bfloat16", "dtype: float16", ["run.yaml:2:", "base.dtype", "'bfloat16'", "given: 'float16'"]),
        ("dtype: bfloat16", "device: tpu", ["run.yaml:2:", "base.device must be auto, cpu, mps, cuda or cuda:N"]),
        ("train: {epochs", "trian: {epochs", ["run.yaml:13:", "'trian'", "Did you mean 'train'?"]),
        ("base: {model: some/base, dtype: bfloat16}", "base: 5", ["run.yaml:2:", "base must be a mapping", "given: 5"]),
        ("model: some/base, ", "", ["run.yaml:2:", "missing key 'base.model'"]),
        ("train: {epochs", "train: {betas: [0.9, 2], epochs", ["run.yaml:13:", "train.betas must be two numbers"]),
        ("train: {epochs", "train: {betas: [0.9], epochs", ["run.yaml:13:", "train.betas must hold"]),
        ("train: {epochs", "train: {schedule: constant, epochs", ["run.yaml:13:", "'constant' has no warm-up"]),
        ("  validation: 120\ntrain: {", "train: {patience: 2, ", ["train.patience has no effect", "data.validation"]),
        ("train: {epochs", "train: {activations: {0: 3}, epochs", ["run.yaml:13:", "train.activations must say keep", "'0' has 3"]),
        ("train: {epochs", "train: {activations: {0: keep, '0': keep}, epochs", ["each range of layers once"]),
        ("train: {epochs", "distributed: {timeout: 1e9}\ntrain: {epochs", ["run.yaml:13:", "timeout must be less than"]),
        ("train: {epochs", "distributed: {timeout: 1e-9}\ntrain: {epochs", ["run.yaml:13:", "timeout must be greater"]),
        ("train: {epochs", "distributed: {mode: pipeline, stages: []}\ntrain: {epochs", ["distributed.stages must hold"]),
        ("train: {epochs", "train: [epochs", ["run.yaml:13:", "not valid YAML"]),
        ("  rank: 16", "  rank: 16\n  rank: 8", ["run.yaml:6:", "not valid YAML", "duplicate key"]),
        ("  rank: 16", "  rank: !big 16", ["run.yaml", "not valid YAML", "!big"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_its_value_and_what_is_allowed(
    run_yaml: Path, written: str, wrong: str, words: list[str]
) -> None:
    assert RUN.count(written) == 1
    run_yaml.write_text(RUN.replace(written, wrong))
    message = refusal(run_yaml)
    assert all(word in message for word in words), message


def test_every_mistake_is_listed_at_once(run_yaml: Path) -> None:
    run_yaml.write_text(RUN.replace("rank: 16", "rank: 0").replace("lr: 3e-4", "lr: x").replace("weight: 2", "w: 2"))
    assert [line.split(": ")[0] for line in sorted(refusal(run_yaml).splitlines())] == [
        "run.yaml:11",
        "run.yaml:13",
        "run.yaml:5",
    ]


def test_a_mistake_inside_a_list_of_adapters_is_found_in_its_line(run_yaml: Path) -> None:
    adapters = "adapter:\n  - kind: lora\n  - kind: series\n    bottlneck: 8\n"
    run_yaml.write_text(RUN.replace("adapter:\n  kind: lora\n  rank: 16\n  sites: attn.q attn.v\n", adapters))
    message = refusal(run_yaml)
    assert "run.yaml:6:" in message and "Did you mean 'bottleneck'?" in message


@pytest.mark.parametrize(("text", "held"), [("", "is empty"), ("- a\n", "of type list"), ("5\n", "of type int")])
def test_a_file_that_is_no_mapping_is_refused(run_yaml: Path, text: str, held: str) -> None:
    run_yaml.write_text(text)
    assert held in refusal(run_yaml)


def test_a_missing_file_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "there is no file" in refusal(tmp_path / "absent.yaml")
    assert "cannot read" in refusal(tmp_path)
    assert "cannot read" in refusal(tmp_path / "binary.yaml")


def test_changes_are_typed_as_yaml_and_reach_lists_and_shorthands(run_yaml: Path) -> None:
    run = load_run(
        run_yaml,
        [
            "adapter.sites=[attn.k, mlp]",
            "data.train.0.limit=5",
            "train.clip=",
            "base.revision='1'",
            "data.system=Say: no #1",
        ],
    )
    assert run.adapter == graft.LoRA(rank=16, sites=("attn.k", "mlp"))
    assert run.data.train == [SourceConfig(path="a.json", limit=5), SourceConfig(path="b.jsonl", weight=2.0)]
    assert run.train.clip is None
    assert run.base.revision == "1"
    assert run.data.system == "Say: no #1"


def test_a_name_that_stands_for_an_adapter_can_be_given_fields() -> None:
    rest = {"base": {"model": "m"}, "data": {"train": "a"}}
    assert load_run({**rest, "adapter": "lora"}, ["adapter.rank=4"]).adapter == graft.LoRA(rank=4)
    assert (
        load_run({**rest, "adapter": ["lora", "series"]}, ["adapter.1.bottleneck=4"]).adapter
        == load_run({**rest, "adapter": ["lora", {"kind": "series", "bottleneck": 4}]}).adapter
    )


def test_a_change_can_build_a_run_from_nothing() -> None:
    run = load_run(
        {}, ["base.model=b", "adapter=llm-adapters/lora", "adapter.rank=4", "data.train=a.json", "data.train.limit=2"]
    )
    assert run.data.train == SourceConfig(path="a.json", limit=2)
    assert run.model_dump()["adapter"] == {"preset": "llm-adapters/lora", "rank": 4}


def test_changing_the_kind_drops_the_fields_of_the_old_kind_wherever_it_stands(run_yaml: Path) -> None:
    assert load_run(run_yaml, ["adapter.kind=series"]).adapter == graft.Series()
    assert load_run(run_yaml, ["adapter.bottleneck=8", "adapter.kind=series"]).adapter == graft.Series(bottleneck=8)
    assert load_run(run_yaml, ["adapter.kind=lora"]) == load_run(run_yaml)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("adapter.rnak=8", ["'adapter.rnak=8':", "Did you mean 'rank'?"]),
        ("tarin.lr=1", ["'tarin.lr=1':", "unknown key 'tarin'", "Did you mean 'train'?"]),
        ("train.lr=fast", ["'train.lr=fast':", "train.lr must be a number"]),
        ("train.lr.peak=1", ["'train.lr.peak=1':", "train.lr holds 0.0003, which has no keys"]),
        ("data.train.7=c.json", ["entries 0 to 1", "'7'"]),
        ("data.train.first=c.json", ["entries 0 to 1", "'first'"]),
        ("train.lr", ["'train.lr'", "key.sub=value"]),
        ("=3", ["'=3'", "key.sub=value"]),
        ("train.betas=[1", ["'train.betas=[1'", "not YAML"]),
    ],
)
def test_a_mistake_in_a_change_names_the_change(run_yaml: Path, change: str, words: list[str]) -> None:
    message = refusal(run_yaml, change)
    assert all(word in message for word in words), message


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1)
TRICKY = st.sampled_from(
    ["no", "null", "1e-4", "12", "~", "true", "a: b", "- a", "#x", " x ", "a\nb", "é 日本", "'", '"']
)
SOURCES = st.builds(SourceConfig, path=TEXTS, weight=st.floats(0.01, 9), limit=st.none() | st.integers(1, 2**63 - 1))


@settings(max_examples=40, deadline=None)
@given(
    model=TEXTS | TRICKY,
    system=st.none() | TEXTS | TRICKY,
    lr=st.floats(min_value=1e-30, max_value=1e30),
    sources=st.lists(TEXTS | SOURCES, min_size=1),
    validation=st.none() | st.integers(0, 10**9) | st.floats(0, 0.99) | TEXTS,
)
def test_a_written_run_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    model: str,
    system: str | None,
    lr: float,
    sources: list[str | SourceConfig],
    validation: int | float | str | None,
) -> None:
    run = load_run(
        {
            "base": {"model": model},
            "adapter": {"kind": "lora", "rank_pattern": {"attn.q": 4}},
            "data": {"train": sources, "system": system, "validation": validation},
            "train": {"lr": lr, "betas": [0.5, 0.75]},
        }
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    dump_run(run, path)
    assert load_run(path) == run


@pytest.mark.parametrize(
    "adapter",
    [
        "llm-adapters/parallel",
        {"preset": "llm-adapters/series", "bottleneck": 8},
        {"kind": "prefix"},
        [{"kind": "lora", "sites": ["attn.q", "attn.v"]}, {"kind": "series"}],
    ],
)
def test_every_way_to_write_an_adapter_reads_back_equal(tmp_path: Path, adapter: Any) -> None:
    run = load_run({"base": {"model": "m"}, "adapter": adapter, "data": {"train": "a"}})
    dump_run(run, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == run


def test_a_run_cannot_be_changed_after_it_was_read(run_yaml: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_run(run_yaml).train.lr = 1.0


def _sections(model: Any = RunConfig) -> list[Any]:
    parts = [field.annotation for field in model.model_fields.values()]
    return [model, SourceConfig, *(part for part in parts if isinstance(part, type) and hasattr(part, "model_fields"))]


@pytest.mark.parametrize("section", _sections(), ids=lambda section: section.__name__)
def test_every_field_is_documented_and_every_section_is_strict(section: Any) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []
    assert section.model_config["extra"] == "forbid" and section.model_config["frozen"]


def test_the_schema_names_every_kind_and_every_field() -> None:
    made = schema()
    assert set(graft.kinds()) < set(made["$defs"])
    assert set(made["properties"]) == {*RunConfig.model_fields, "jobs"}
    assert set(made["$defs"]["TrainConfig"]["properties"]) == set(TrainConfig.model_fields)
    references = [value["$ref"] for value in _mappings(made) if "$ref" in value]
    assert {reference.removeprefix("#/$defs/") for reference in references} <= set(made["$defs"])


def _mappings(value: Any) -> list[dict[str, Any]]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] * isinstance(value, dict) + [found for item in inner for found in _mappings(item)]


@pytest.mark.parametrize("name", schema()["$defs"]["TrainConfig"]["properties"]["schedule"]["enum"])
def test_every_schedule_is_one_that_transformers_makes_of_steps_alone(name: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = None if name == "constant" else 2
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    assert scheduler.get_last_lr() == [1.0 if name == "constant" else 0.0]


BOMB = "k0: &k0 [x, x]\n" + "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 20))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "100,000 values"),
        ("a: " + "[" * 5000, "more than 40 mappings and lists inside one another"),
        ("a: " + "{b: " * 5000, "more than 40 mappings and lists inside one another"),
        ("\n".join("  " * n + "a:" for n in range(100)), "more than 40 mappings and lists inside one another"),
        ("train: {seed: 9223372036854775808}", "between -2^63 and 2^63"),
        ("train: {seed: " + "9" * 5000 + "}", "not valid YAML"),
        ("a: &a\n  <<: *a", "not valid YAML"),
        ("base: {revision: 2001-12-12}", "date; given: '2001-12-12'"),
        ("base: {revision: 2001-99-99}", "not valid YAML"),
        ("base: {revision: !!binary abc=}", "bytes"),
        ("base: {revision: !!bool 7}", "not valid YAML"),
        ("? [a]\n: b", "a key must be text or a whole number"),
        ("{true: b}", "a key must be text or a whole number"),
        ("base: \x07", "not valid YAML"),
        ('base: {model: "\\ud83d"}', "characters that UTF-8 has"),
    ],
    ids=range(15),
)  # fmt: skip
def test_hostile_yaml_ends_at_once_with_a_word(run_yaml: Path, text: str, words: str) -> None:
    start = time.monotonic()
    run_yaml.write_text(text)
    assert words in refusal(run_yaml)
    assert time.monotonic() - start < 5


def test_only_files_of_a_sane_size_are_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_text("#" * 2_000_001)
    for place, words in {
        tmp_path / "pipe": "not a regular file",
        tmp_path / "large.yaml": "the limit is 2 MB",
        "/dev/zero": "not a regular file",
        "x" * 5000: "File name too long",
        "a\0b": "null byte",
    }.items():
        assert words in refusal(Path(place))


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"kind": "lora", "rank": "16"}, "adapter.rank must be a whole number; given: '16'"),
        ({"kind": "lora", "rank": True}, "adapter.rank must be a whole number; given: True"),
        ({"kind": "lora", "rank": 8.0}, "adapter.rank must be a whole number; given: 8.0"),
        ({"kind": "lora", "alpha": "16"}, "adapter.alpha must be a number"),
        ({"kind": "lora", "alpha": float("nan")}, "adapter.alpha must be a finite number"),
        ({"kind": "lora", "rslora": 1}, "adapter.rslora must be true or false"),
        ({"kind": "lora", "sites": 3}, "adapter.sites must be text or a list"),
        ({"kind": "lora", "rank_pattern": {"(": 4}}, "is not a regular expression"),
        ({"kind": ["lora"]}, "unknown adapter kind"),
        ({"preset": {"a": 1}}, "unknown preset"),
        ({1: 2}, "an adapter needs `kind`"),
        ({"kind": "gate", "of": {"kind": "lora", "rank": "x"}}, "adapter.of.rank must be a whole number"),
        ({"kind": "gate", "of": {"kind": "mixture", "of": {"kind": "lora", "rnak": 2}}}, "has no field 'rnak'"),
        ({"kind": "sum", "of": ["lora", {"kind": "lora", "rank": 0}]}, "adapter.of.1.rank must be greater"),
        ({"kind": "gate", "of": []}, "adapter.of must hold at least 1"),
        ({"preset": "llm-adapters/lora", "rank": "x"}, "rank must be a whole number"),
        ({"kind": "stack", "adapters": "lora"}, "must be a list of adapters"),
        ([{"kind": "lora", "rank": "x"}], "rank must be a whole number"),
    ],
)
def test_fields_of_adapters_convert_no_types(adapter: Any, words: str) -> None:
    assert words in refusal({"base": {"model": "m"}, "data": {"train": "a"}, "adapter": adapter})


def test_a_config_in_python_is_refused_in_our_own_words() -> None:
    with pytest.raises(GraftError, match="kind 'lora': there is no field 'rnak'. Did you mean 'rank'"):
        graft.LoRA(rnak=8)  # type: ignore[call-arg]
    with pytest.raises(GraftError, match="kind 'lora': rank must be greater than or equal to 1; given: 0"):
        graft.LoRA(rank=0)
    assert graft.LoRA(sites=["attn.q"]).sites == ("attn.q",)  # type: ignore[arg-type]


def test_a_key_without_its_block_is_found_in_it(run_yaml: Path) -> None:
    assert "Did you mean 'train.lr'?" in refusal(run_yaml, "lr=3")
    assert "Did you mean 'data.seed' or 'train.seed'?" in refusal(run_yaml, "seed=3")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize("field", ["train.lr", "train.epochs", "train.clip", "train.eps", "scheduler.memory"])
def test_numbers_are_finite(run_yaml: Path, field: str, value: str) -> None:
    assert "finite" in refusal(run_yaml, f"{field}={value}") or "greater" in refusal(run_yaml, f"{field}={value}")


@pytest.mark.parametrize("field", ["base.model", "data.train", "data.template", "train.init_from", "eval.data"])
@pytest.mark.parametrize("value", ["x" * 300, '"a\\0b"', "/" + "a/" * 3000])
def test_names_that_no_file_can_have_are_refused(run_yaml: Path, field: str, value: str) -> None:
    assert "must be a name or path" in refusal(run_yaml, f"{field}={value}")


def test_the_schema_takes_the_name_of_a_kind_and_of_a_preset() -> None:
    named = schema()["properties"]["adapter"]["anyOf"][0]["enum"]
    assert {"lora", "llm-adapters/lora"} <= set(named) and "stack" not in named
