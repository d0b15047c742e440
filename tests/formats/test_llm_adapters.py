"""Reading LLM-Adapters' checkpoints, on small ones written here; the expected numbers are the library's formulas on the plain base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

import graft
from graft.formats import peft
from graft.formats.llm_adapters import reading as llm_adapters
from tests.small import small_model

Hook = Callable[[nn.Module, Tensor, Tensor], Tensor]
BOTTLENECK = {"peft_type": "BOTTLENECK", "bottleneck_size": 3, "non_linearity": "tanh", "scaling": 0.5, "bias": "none"}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_dropout": 0.05, "bias": "none", "enable_lora": None}
ABOUT = {"base_model_name_or_path": "b", "inference_mode": True, "task_type": "CAUSAL_LM", "num_attention_heads": 4, "num_layers": 2,
         "num_transformer_submodules": 1, "token_dim": 32, "num_virtual_tokens": 3}  # fmt: skip
PREFIX = {**ABOUT, "peft_type": "PREFIX_TUNING", "encoder_hidden_size": 32, "prefix_projection": False}
PROMPTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path")),
    "P_TUNING": dict.fromkeys(
        ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
    ),
}


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], safetensors: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if safetensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    return folder


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_random.generator) * 0.3  # pyright: ignore


_random.generator = torch.Generator().manual_seed(5)  # pyright: ignore


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def _inputs() -> dict[str, Tensor]:
    ids = torch.arange(3, 19).view(2, 8) * 7 % 250
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _logits(model: nn.Module, **more: Any) -> Tensor:
    inputs = {**_inputs(), **more}
    with torch.no_grad():
        return model(**inputs).logits[_inputs()["attention_mask"].bool()]


@contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Hook]) -> Iterator[None]:
    """An independent reference: the formula as a forward hook (module, x, h) -> h."""
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, h, hook=hook: hook(module, args[0], h))
        for path, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(model: nn.Module, folder: Path, hooks: dict[str, Hook]) -> None:
    with _hooked(model, hooks):
        expected = _logits(model)
    base = _logits(model)
    graft.load(model, folder, name="theirs")
    assert (_logits(model) - expected).abs().max() < 1e-5
    assert (expected - base).abs().max() > 1e-2
    with graft.use(model, None):
        assert torch.equal(_logits(model), base)


def _bottleneck(
    down: Tensor, up: Tensor, scale: Any = 0.5, act: Callable[[Tensor], Tensor] = torch.tanh
) -> Callable[[Tensor], Tensor]:
    return lambda u: scale * (act(u @ down.T) @ up.T)


def test_lora_by_a_list_of_endings(tmp_path: Path) -> None:
    model = small_model("llama")
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
    weights = {path: (_random(2, 32), _random(model.get_submodule(path).out_features, 2)) for path in paths}
    tensors = {
        f"{path}.lora_{side}.weight": w for path, pair in weights.items() for side, w in zip("AB", pair, strict=True)
    }
    folder = _write(tmp_path / "a", {**LORA, "target_modules": ["q_proj", "v_proj"]}, _named(tensors))
    hooks: dict[str, Hook] = {
        path: lambda m, x, h, a=a, b=b: h + 1.5 * x @ a.T @ b.T for path, (a, b) in weights.items()
    }
    _check(model, folder, hooks)
    config, _ = llm_adapters.read(folder, small_model("llama"))
    assert (config.kind, config.sites, config.dropout) == ("lora", "attn.q attn.v", 0.05)  # pyright: ignore


def test_lora_by_a_regular_expression_over_some_layers_reads_safetensors_too(tmp_path: Path) -> None:
    model = small_model("llama")
    a, b = _random(2, 32), _random(48, 2)
    path = "model.layers.1.mlp.up_proj"
    fields = {**LORA, "target_modules": r".*layers\.1\.mlp\.up_proj"}
    folder = _write(
        tmp_path / "a", fields, _named({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}), safetensors=True
    )
    _check(model, folder, {path: lambda m, x, h: h + 1.5 * x @ a.T @ b.T})
    assert llm_adapters.read(folder, small_model("llama"))[0].sites == "mlp.up@1"


def test_the_merged_form_of_lora_writes_the_first_and_the_last_third_of_a_fused_projection(tmp_path: Path) -> None:
    model, tensors, hooks = small_model("bloom"), {}, {}
    for layer in (0, 1):
        path = f"transformer.h.{layer}.self_attention.query_key_value"
        a, b = _random(4, 32), _random(64, 2, 1)
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}

        def grouped(module: nn.Module, x: Tensor, h: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            low = torch.nn.functional.conv1d((x @ a.T).transpose(1, 2), b, groups=2).transpose(1, 2)
            return h + 1.5 * torch.cat([low[..., :32], torch.zeros_like(h[..., :32]), low[..., 32:]], -1)

        hooks[path] = grouped
    fields = {**LORA, "target_modules": ["query_key_value"], "enable_lora": [True, False, True]}
    _check(model, _write(tmp_path / "a", fields, _named(tensors)), hooks)


@pytest.mark.parametrize("scaling", [0.5, "learned"])
def test_adapterh_sits_before_the_layers_into_the_mlp_and_after_the_one_out(tmp_path: Path, scaling: Any) -> None:
    model, tensors, hooks = small_model("gptj"), {}, {}
    for layer in (0, 1):
        into, out = f"transformer.h.{layer}.mlp.fc_in", f"transformer.h.{layer}.mlp.fc_out"
        for path in (into, out):
            down, up, scale = (
                _random(3, 32),
                _random(32, 3),
                _random(1) if scaling == "learned" else torch.tensor([0.5]),
            )
            tensors |= {f"{path}.adapter_down.weight": down, f"{path}.adapter_up.weight": up}
            tensors |= {f"{path}.adapter_scaling": scale} if scaling == "learned" else {}
            f = _bottleneck(down, up, scale)
            before: Hook = lambda m, x, h, f=f: torch.nn.functional.linear(x + f(x), m.weight, m.bias)  # noqa: E731  # pyright: ignore
            after: Hook = lambda m, x, h, f=f: h + f(h)  # noqa: E731
            hooks[path] = before if path is into else after
    fields = {**BOTTLENECK, "scaling": scaling, "target_modules": ["fc_in", "fc_out"]}
    folder = _write(tmp_path / "a", fields, _named(tensors))
    _check(model, folder, hooks)
    parts = llm_adapters.read(folder, small_model("gptj"))[0].parts()
    assert [(part.position, part.sites) for part in parts] == [("before", "mlp.up"), ("after", "mlp.down")]  # pyright: ignore


def test_the_parallel_adapter_leads_from_the_layers_input_to_its_output(tmp_path: Path) -> None:
    model, tensors, hooks = small_model("bloom"), {}, {}
    for layer in (0, 1):
        path = f"transformer.h.{layer}.mlp.dense_4h_to_h"
        down, up = _random(3, 128), _random(32, 3)
        tensors |= {f"{path}.adapter_down.weight": down, f"{path}.adapter_up.weight": up}
        f = _bottleneck(down, up)
        hooks[path] = lambda m, x, h, f=f: h + f(x)
    fields = {**BOTTLENECK, "use_parallel_adapter": True, "target_modules": ["dense_4h_to_h"]}
    _check(model, _write(tmp_path / "a", fields, _named(tensors)), hooks)


def test_changed_biases_are_whole_in_the_file_and_only_where_the_base_has_one(tmp_path: Path) -> None:
    model, tensors, hooks = small_model("gptj"), {}, {}
    for layer in (0, 1):
        for name, has_bias, width in (("attn.q_proj", False, 32), ("mlp.fc_in", True, 128)):
            path = f"transformer.h.{layer}.{name}"
            a, b, bias = _random(2, 32), _random(width, 2), _random(width)
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b} | (
                {f"{path}.bias": bias} if has_bias else {}
            )
            new = bias if has_bias else None
            hooks[path] = lambda m, x, h, a=a, b=b, new=new: (
                torch.nn.functional.linear(x, m.weight, new) + 1.5 * x @ a.T @ b.T
            )
    fields = {**LORA, "bias": "lora_only", "target_modules": ["q_proj", "fc_in"]}
    _check(model, _write(tmp_path / "a", fields, _named(tensors)), hooks)


def _with_head() -> dict[str, Tensor]:
    paths = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    sides = {"down": (3, 32), "up": (32, 3)}
    tensors = {f"{path}.adapter_{side}.weight": _random(*shape) for path in paths for side, shape in sides.items()}
    return {**tensors, "lm_head.weight": _random(258, 32)}


def test_a_saved_head_replaces_the_bases_own(tmp_path: Path) -> None:
    model = small_model("llama", tie_word_embeddings=False)
    tensors = _with_head()
    hooks: dict[str, Hook] = {"lm_head": lambda m, x, h: x @ tensors["lm_head.weight"].T}
    for path in (f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)):
        f = _bottleneck(tensors[f"{path}.adapter_down.weight"], tensors[f"{path}.adapter_up.weight"])
        hooks[path] = lambda m, x, h, f=f: h + f(h)
    fields = {**BOTTLENECK, "target_modules": ["down_proj"], "modules_to_save": ["lm_head"]}
    _check(model, _write(tmp_path / "a", fields, _named(tensors)), hooks)


def test_what_was_imported_is_saved_and_loaded_as_one_of_ours(tmp_path: Path) -> None:
    model, again = (small_model("llama", tie_word_embeddings=False) for _ in range(2))
    fields = {**BOTTLENECK, "target_modules": ["down_proj"], "modules_to_save": ["lm_head"]}
    graft.load(model, _write(tmp_path / "a", fields, _named(_with_head())))
    assert graft.names(model) == ("default",)
    graft.save(model, "default", tmp_path / "ours")
    graft.load(again, tmp_path / "ours")
    assert torch.equal(_logits(again), _logits(model))


def test_a_saved_head_on_a_tied_base_is_refused(tmp_path: Path) -> None:
    model = small_model("llama", tie_word_embeddings=True)
    fields = {**BOTTLENECK, "target_modules": ["down_proj"], "modules_to_save": ["lm_head"]}
    with pytest.raises(graft.GraftError, match="the input embedding shares its weight"):
        graft.load(model, _write(tmp_path / "a", fields, _named(_with_head())))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_prefix_lies_as_keys_and_values_in_turn_before_position_zero(tmp_path: Path, family: str) -> None:
    changes = {"num_key_value_heads": 4} if family == "llama" else {}
    model, flat = small_model(family, **changes), _random(3, 2 * 2 * 32)
    folder = _write(tmp_path / "a", PREFIX, {"prompt_embeddings": flat})
    slots = flat.view(3, 4, 4, 8).permute(1, 2, 0, 3)[:, None].expand(-1, 2, -1, -1, -1)
    cache = DynamicCache([(slots[0], slots[1]), (slots[2], slots[3])])
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), _inputs()["attention_mask"]], 1)
    expected = _logits(
        model, attention_mask=mask, past_key_values=cache, position_ids=torch.arange(3, 11)[None].expand(2, -1)
    )
    graft.load(model, folder, name="theirs")
    assert (_logits(model) - expected).abs().max() < 1e-5


def test_blooms_prefix_has_its_keys_in_the_first_half_in_an_order_of_its_own(tmp_path: Path) -> None:
    model, flat = small_model("bloom"), _random(3, 2 * 2 * 32)
    folder = _write(tmp_path / "a", PREFIX, {"prompt_embeddings": flat})
    memory = flat.view(3, 4, 4, 8).transpose(0, 1)  # slots, virtual tokens, heads, head size
    cache = DynamicCache([
        (
            memory[layer].reshape(4, 8, 3).transpose(1, 2)[None].expand(2, -1, -1, -1),
            memory[2 + layer].transpose(0, 1)[None].expand(2, -1, -1, -1),
        )
        for layer in (0, 1)
    ])  # fmt: skip
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), _inputs()["attention_mask"]], 1)
    expected = _logits(model, attention_mask=mask, past_key_values=cache)
    graft.load(model, folder, name="theirs")
    assert (_logits(model) - expected).abs().max() < 1e-5


def test_a_prefix_for_another_number_of_heads_names_both_shapes(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", PREFIX, {"prompt_embeddings": _random(3, 128)})
    with pytest.raises(graft.GraftError, match=r"\(3, 128\).*need \(3, 64\)"):
        graft.load(small_model("llama"), folder)


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_in_the_embedding_are_a_prompt(tmp_path: Path, kind: str) -> None:
    stored, config = _random(3, 32), {**ABOUT, **PROMPTS[kind], "peft_type": kind}
    folder = _write(tmp_path / "a", config, {"prompt_embeddings": stored})
    assert llm_adapters.detect(folder)
    model = graft.load(small_model("llama"), folder)
    ((name, vectors),) = graft.parameters(model, "default")
    assert name == "model.embed_tokens.embedding.vectors" and torch.equal(vectors, stored)
    folder = _write(tmp_path / "b", config, {"prompt_embeddings": _random(3, 64)})
    with pytest.raises(graft.GraftError, match=r"\(3, 64\).*need \(3, 32\)"):
        graft.load(small_model("llama"), folder)


def test_missing_and_unexpected_tensors_are_listed_and_nothing_stays_attached(tmp_path: Path) -> None:
    model = small_model("llama")
    path = "model.layers.0.mlp.up_proj"
    tensors = _named({f"{path}.lora_A.weight": _random(2, 32), "model.norm.bias": _random(32)})
    folder = _write(tmp_path / "a", {**LORA, "target_modules": r".*layers\.0\.mlp\.up_proj"}, tensors)
    with pytest.raises(graft.GraftError, match=rf"1 missing: {path}.lora_B.weight; 1 unexpected: model.norm.bias"):
        graft.load(model, folder)
    assert graft.names(model) == ()


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = small_model("llama")
    path = "model.layers.0.mlp.up_proj"
    tensors = _named({f"{path}.lora_A.weight": _random(2, 31), f"{path}.lora_B.weight": _random(48, 2)})
    folder = _write(tmp_path / "a", {**LORA, "target_modules": r".*layers\.0\.mlp\.up_proj"}, tensors)
    with pytest.raises(graft.GraftError, match=r"\(2, 31\) instead of \(2, 32\)"):
        graft.load(model, folder)
    assert graft.names(model) == ()


def test_targets_that_the_base_has_not_are_an_error(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", {**LORA, "target_modules": ["query_key_value"]}, {})
    with pytest.raises(graft.GraftError, match="names no linear layer"):
        graft.load(small_model("llama"), folder)


def test_a_series_adapter_where_llm_adapters_has_none_is_an_error(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", {**BOTTLENECK, "target_modules": ["q_proj"]}, {})
    with pytest.raises(graft.GraftError, match="defines no series adapter at 'model.layers.0.self_attn.q_proj'"):
        graft.load(small_model("llama"), folder)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", PREFIX, {"prompt_embeddings": _random(3, 64)})
    path = folder / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(graft.GraftError, match="damaged or cut short"):
        graft.load(small_model("llama"), folder)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", PREFIX, {"prompt_embeddings": nn.Linear(2, 2)})  # pyright: ignore
    with pytest.raises(graft.GraftError, match="holds no plain tensors"):
        graft.load(small_model("llama"), folder)


def test_a_config_of_peft_is_not_taken_for_one_of_llm_adapters(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", {**LORA, "auto_mapping": None, "revision": None, "target_modules": ["q_proj"]}, {})
    assert not llm_adapters.detect(folder)
    assert peft.detect(folder)
