"""Folders that are damaged, lie, or come from the future: one error that names what is wrong, and the model stays as it was."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graft
from graft.formats.guarding import named_errors
from tests.contract.table import base, ids, logits, randomise, same_base
from tests.formats.fuzzing import WHOLE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def folder(path: Path, spec: Any, format: str = "graft") -> Path:
    """The folder of a randomised adapter, in Graft's own format or another library's."""
    model = base("llama")
    graft.attach(model, {"a": spec})
    randomise(model, "a")
    graft.save(model, "a", path) if format == "graft" else graft.export(model, "a", path, format=format)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return folder(tmp_path / "a", graft.LoRA(rank=2, sites="attn.q attn.v"))


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    parts = [
        graft.LoRA(rank=2, sites="attn.q attn.v"),
        graft.Full(sites="norm"),
        graft.Full(sites="embed", tokens=(3, 5)),
    ]
    return folder(tmp_path / "a", parts, "peft")


def change(path: Path, **fields: Any) -> None:
    """Set fields of a config; those of an own adapter by `adapter`."""
    config = json.loads((path / CONFIG).read_text())
    if "adapter" in fields:
        fields["adapter"] = config["adapter"] | fields["adapter"]
    config |= fields
    (path / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def rewrite(path: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write the weights anew; an own folder loses its checksum."""
    save_file(edit(load_file(path / WEIGHTS)), path / WEIGHTS, metadata={"format": "pt"})
    if "checksum" in json.loads((path / CONFIG).read_text()):
        config = json.loads((path / CONFIG).read_text())
        config.pop("checksum")
        (path / CONFIG).write_text(json.dumps(config))


def refused(path: Path, match: str) -> None:
    model = base("llama")
    with pytest.raises(graft.GraftError, match=match) as error:
        graft.load(model, path)
    assert str(path) in str(error.value)
    assert same_base(model, "llama") and "graft_state" not in model.__dict__


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"format_version": 2}, "version 2 of Graft's format .*install a newer graft"),
        ({"format_version": True}, "'format_version' cannot be True"),
        ({"format_version": 0}, "'format_version' cannot be 0"),
        ({"base": []}, "'base' cannot be"),
        ({"base": {"model": "x"}}, "'base' is no record of a base"),
        ({"name": 5}, "'name' cannot be 5"),
        ({"colour": "red"}, "a field 'colour', which Graft does not write"),
        ({"checksum": "sha256:0"}, "was damaged or replaced"),
        ({"adapter": {"rank": 1_000_000}}, r"misshapen .*instead of \(1000000, "),
        ({"adapter": {"rank": 10**30}}, "rank|read"),
        ({"adapter": {"sites": "attn.zz"}}, "site 'attn.zz' matches nothing"),
    ],
)
def test_an_own_config_that_does_not_hold_is_named(fields: dict[str, Any], match: str, own: Path) -> None:
    change(own, **fields)
    refused(own, match)


def test_a_field_that_is_missing_is_named(own: Path) -> None:
    for name in ("name", "base"):
        change(own, **{name: ...})
        refused(own, f"lacks the field '{name}'")


def test_weights_that_were_exchanged_are_noticed_and_older_folders_load(own: Path) -> None:
    rewritten = {name: tensor * 2 for name, tensor in load_file(own / WEIGHTS).items()}
    save_file(rewritten, own / WEIGHTS, metadata={"format": "pt"})
    refused(own, "remove `checksum`")
    change(own, checksum=...)
    graft.load(base("llama"), own)


@pytest.mark.parametrize("kind", ["dora", "series", "prefix", "vera", "loha", "adalora", "reft", "compacter"])
def test_memory_is_spent_only_on_what_fits(kind: str, tmp_path: Path) -> None:
    """A rank of a million in a few bytes of config."""
    size = {
        "series": "bottleneck",
        "compacter": "bottleneck",
        "prefix": "tokens",
        "adalora": "init_rank",
        "oft": "block_size",
    }
    path = folder(tmp_path / "a", {"kind": kind})
    change(
        path,
        adapter={size.get(kind, "rank"): 2**20, "target_rank": None}
        if kind == "adalora"
        else {size.get(kind, "rank"): 2**20},
    )
    refused(path, ".")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda found: {name: tensor.int() for name, tensor in found.items()},
            "holds integers .int32., but these are floating",
        ),
        (lambda found: {name: tensor > 0 for name, tensor in found.items()}, "holds booleans"),
        (lambda found: {name: tensor.cfloat() for name, tensor in found.items()}, "holds complex numbers"),
        (lambda found: {name: tensor / 0 for name, tensor in found.items()}, "NaN or infinite"),
        (lambda found: {name: tensor.double() * 1e300 for name, tensor in found.items()}, "NaN or infinite"),
        (lambda found: {name: tensor[:1] for name, tensor in found.items()}, "instead of|do not fit|need|misshapen"),
        (without("q_proj"), "missing"),
        (lambda found: found | {"more": torch.ones(2)}, "extra|unexpected"),
    ],
)
@pytest.mark.parametrize("format", ["graft", "peft", "llm-adapters", "adapterhub"])
def test_tensors_that_are_not_those_of_the_adapter_are_named(
    format: str, edit: Any, match: str, tmp_path: Path
) -> None:
    path = folder(tmp_path / "a", graft.LoRA(rank=2, sites="attn.q attn.v"), format)
    file = next(each for each in path.iterdir() if each.name != CONFIG)
    if file.suffix == ".bin":
        torch.save(edit(torch.load(file)), file)
    else:
        file.rename(path / WEIGHTS)
        rewrite(path, edit)
        (path / WEIGHTS).rename(file)
    refused(path, match)


def test_lower_precision_is_no_other_kind_of_number(own: Path) -> None:
    rewrite(own, lambda found: {name: tensor.bfloat16() for name, tensor in found.items()})
    graft.load(base("llama"), own)


@pytest.mark.parametrize("part", ["input_layernorm", "model.norm", "trainable_tokens_delta", "lora_A"])
def test_every_tensor_that_a_peft_config_promises_has_to_be_there(part: str, peft: Path) -> None:
    graft.load(base("llama"), peft)
    rewrite(peft, without(part))
    refused(peft, rf"missing: .*{part}")


def test_biases_that_a_peft_config_promises_have_to_be_there(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], bias="all"))
    model.save_pretrained(str(tmp_path / "a"))
    graft.load(base("gpt2"), tmp_path / "a", name="all")
    rewrite(tmp_path / "a", without("h.1.ln_1.bias"))
    with pytest.raises(graft.GraftError, match=r"missing: transformer\.h\.1\.ln_1\.bias"):
        graft.load(base("gpt2"), tmp_path / "a")


@pytest.mark.parametrize("name", [name for name in WHOLE if not name.startswith("own")])
def test_every_tensor_of_a_foreign_folder_has_the_shape_that_it_needs(name: str, tmp_path: Path) -> None:
    """One of a kind of tensors is empty, or a number alone."""
    format, spec = WHOLE[name]
    path = folder(tmp_path / "a", spec, format)
    file = next(each for each in path.iterdir() if each.suffix in (".bin", ".safetensors"))
    found: dict[str, Tensor] = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    acting = [each for each in found if ".units.1." not in each]  # that unit of AdapterHub acts nowhere
    for tensor in {re.sub(r"\d", "#", each): each for each in acting}.values():
        for other in (found[tensor][:0], torch.ones(())):
            changed = {key: each.clone() for key, each in found.items()} | {tensor: other}
            save_file(changed, file) if file.suffix == ".safetensors" else torch.save(changed, file)
            refused(path, ".")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of the file ran')",)


@pytest.mark.parametrize(
    "content",
    [
        Evil(), {"x": Evil()}, [1, 2], {1: torch.ones(1)}, {"x": 5}, {"x": torch.ones(1).expand(10**9)},
        {"x": torch.eye(3).to_sparse()}, {"x": torch.ones(3, device="meta")},
    ],
    ids=["code", "code inside", "list", "number as name", "number", "repeats one number", "sparse", "meta"],
)  # fmt: skip
def test_a_pickle_of_anything_but_plain_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", graft.LoRA(rank=2, sites="attn.q"), "llm-adapters")
    for protocol in (2, 5):
        try:
            torch.save(content, path / "adapter_model.bin", pickle_protocol=protocol)
        except Exception:  # what torch does not save is pickled plainly
            (path / "adapter_model.bin").write_bytes(pickle.dumps(content))
        refused(path, "plain tensors")


@pytest.mark.parametrize("format", ["graft", "peft", "llm-adapters", "adapterhub"])
def test_files_that_were_cut_short_are_named(format: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", graft.LoRA(rank=2, sites="attn.q attn.v"), format)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            if json_is_whole(file):  # the last byte of a config is the end of a line
                continue
            refused(path, "damaged|not JSON|cannot be read")
        file.write_bytes(whole)


def json_is_whole(file: Path) -> bool:
    try:
        return file.suffix == ".json" and bool(json.loads(file.read_text()))
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"peft_type": "LORA", "r": NaN}', "NaN is not a number"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "1e999 is too large"),
        ('{"peft_type": "LORA", "r": 2, "r": 3}', "the field 'r' is there twice"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "not a mapping"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_a_config_that_is_no_json_of_fields_is_named(text: str, match: str, peft: Path) -> None:
    (peft / CONFIG).write_text(text)
    refused(peft, match)


def test_slow_patterns_of_a_file_end_with_a_word(peft: Path) -> None:
    change(peft, target_modules=r"(?:(?:.|.)+)+(?<=Q)")
    refused(peft, "write a simpler one")


def test_whatever_is_raised_becomes_an_error_that_names_the_folder() -> None:
    for wrong in (KeyError("x"), IndexError("y"), RecursionError(), OSError("z"), torch.OutOfMemoryError("m")):
        with pytest.raises(graft.GraftError, match="somewhere cannot be read"), named_errors("somewhere"):
            raise wrong
    with pytest.raises(graft.GraftError, match="somewhere: no such kind"), named_errors("somewhere"):
        raise graft.GraftError("no such kind")
    with pytest.raises(KeyboardInterrupt), named_errors("somewhere"):
        raise KeyboardInterrupt


def test_one_of_several_adapters_that_fails_leaves_none(tmp_path: Path) -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=2, sites="attn.q"), "b": graft.LoRA(rank=2, sites="attn.v")})
    model.save_pretrained(tmp_path / "both")
    fresh = graft.load(base("llama"), tmp_path / "both")
    assert torch.equal(logits(fresh, ids()), logits(model, ids()))
    whole = load_file(tmp_path / "both" / "model.safetensors")
    change(tmp_path / "both", checksum=...)
    for broken in (without(".graft.b.linear.A")(whole), whole | {"model.graft.c.linear.A": torch.ones(2)}):
        save_file(broken, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
        refused(tmp_path / "both", "missing|none of its adapters")


def test_no_file_makes_a_base_of_any_size(own: Path) -> None:
    change(own, base=json.loads((own / CONFIG).read_text())["base"] | {"shape": {"vocab_size": 10**9}})
    with pytest.raises(graft.GraftError, match="resized to 1000000000, which no added tokens explain"):
        graft.load(base("llama"), own, resize=True)
