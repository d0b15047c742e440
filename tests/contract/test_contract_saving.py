"""Point 4: a saved adapter computes the same in a fresh process, bit for bit, and its file holds exactly what was promised."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.injection.state import state_of
from graft.testing.fresh_process import FreshProcess
from tests.contract.table import ROWS, Row, attached, base, check, ids, logits, row_of, rows, same_base

PICKLED = ("llama-mam", "gptj-prefix")
AGAIN = ("llama-prefix-projection", "bloom-mam", "llama-lora-patterns")
NAMED = ("llama-lora", "bloom-lora-fused", *AGAIN)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FreshProcess:
    """The process that loads the rows that this session tests and those named above."""
    process = FreshProcess(tmp_path_factory.mktemp("saved"), pickled=PICKLED)
    tested = (item.callspec.params.get("row") for item in request.session.items if hasattr(item, "callspec"))
    wanted = {*PICKLED, *NAMED, *(row.id for row in tested if isinstance(row, Row))}
    for row in (row for row in ROWS if row.id in wanted):
        process.add(row)
    return process


@pytest.fixture(scope="module")
def saved(process: FreshProcess) -> Path:
    """The folder with a saved adapter per row."""
    return process.folder()


@rows()
def test_a_fresh_process_computes_the_same_bit_for_bit(row: Row, process: FreshProcess) -> None:
    check("fresh_process_computes_the_same", dataclasses.replace(row, process=process))


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickled_model_computes_the_same_in_a_fresh_process(name: str, process: FreshProcess) -> None:
    here, there = process.outputs(row_of(name), pickled=True)
    assert torch.equal(here, there)


@rows()
def test_the_file_holds_exactly_the_promised_tensors(row: Row) -> None:
    check("file_holds_the_promised_tensors", row)


def test_the_names_in_the_file_are_module_site_and_parameter(saved: Path) -> None:
    assert set(load_file(saved / "llama-mam" / WEIGHTS)) == {
        f"model.layers.{layer}.{rest}"
        for layer in range(2)
        for rest in (
            *(
                "self_attn.prefix.keys",
                "self_attn.prefix.values",
                "mlp.down_proj.mlp.f.down.weight",
                "mlp.down_proj.mlp.f.down.bias",
            ),
            *("mlp.down_proj.mlp.f.up.weight", "mlp.down_proj.mlp.f.up.bias"),
        )
    }
    fused = "transformer.h.0.self_attention.query_key_value"
    assert {f"{fused}.{part}.{each}" for part in "qv" for each in "AB"} <= set(
        load_file(saved / "bloom-lora-fused" / WEIGHTS)
    )


def test_what_is_loaded_can_be_saved_again_to_the_same_file(saved: Path, tmp_path: Path) -> None:
    for name in AGAIN:
        model = base(name.split("-")[0])
        graft.save(graft.load(model, saved / name), "a", tmp_path / name)
        assert (tmp_path / name / WEIGHTS).read_bytes() == (saved / name / WEIGHTS).read_bytes()
        assert (tmp_path / name / CONFIG).read_bytes() == (saved / name / CONFIG).read_bytes()


def test_one_adapter_of_two_is_saved_and_loaded_beside_another(tmp_path: Path) -> None:
    model = attached(ROWS[0], None, torch.float32, "lora", "lora-b")
    expected = {name: logits(model, ids()) for name in ("lora", "lora-b") if graft.set_active(model, name) is None}
    graft.save(model, "lora-b", tmp_path / "b")
    other = attached(ROWS[0], None, torch.float32, "lora")
    graft.load(other, tmp_path / "b")
    assert graft.names(other) == ("lora", "lora-b") and state_of(other).current.rows == "lora"
    for name, wanted in expected.items():
        with graft.use(other, name):
            assert torch.equal(logits(other, ids()), wanted)


@pytest.mark.parametrize(
    "damage", ["missing", "extra", "misshapen", "cut", "no weights", "no config", "other base", "not json"]
)
def test_a_folder_that_does_not_fit_is_refused_and_changes_nothing(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = graft.save(graft.load(base("llama"), saved / "llama-lora"), "a", tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    first, message = next(iter(tensors)), damage
    if damage == "missing":
        del tensors[first]
        message = rf"of 28 tensors, 1 missing \({first}\)"
    elif damage == "extra":
        tensors["model.layers.9.B"] = torch.zeros(1)
        message = r"1 extra \(model.layers.9.B\)"
    elif damage == "misshapen":
        tensors[first] = tensors[first][:-1].contiguous()
        message = "1 misshapen"
    if damage in ("missing", "extra", "misshapen"):
        save_file(tensors, folder / WEIGHTS)
    elif damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])
        message = "damaged or cut short"
    elif damage == "not json":
        (folder / CONFIG).write_text("{")
        message = "is not JSON"
    elif damage == "other base":
        header = json.loads((folder / CONFIG).read_text())
        header["base"]["digest"] = "0" * 16
        (folder / CONFIG).write_text(json.dumps(header))
        message = "has other weights"
    else:
        (folder / (WEIGHTS if damage == "no weights" else CONFIG)).unlink()
        message = "is missing"
    model = base("llama")
    with pytest.raises(graft.GraftError, match=message):
        graft.load(model, folder)
    assert graft.names(model) == () and same_base(model, "llama") and type(model) is type(base("llama"))


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(graft.GraftError, match="not empty and holds no adapter"):
        graft.save(attached(ROWS[0]), "a", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
