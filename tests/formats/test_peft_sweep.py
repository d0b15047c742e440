"""Random configs of PEFT, on several families: Graft computes what PEFT computes from the folder, or refuses it by name."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import graft
from tests.formats.peft_folders import Make, llama, loaded, logits, off, saved, small

BASES: dict[str, tuple[Make, list[str], list[str], dict[str, Any]]] = {
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
              ["lm_head", "embed_tokens", "norm", "layers.1.mlp", "v_proj"], {}),
    "llama-tied": (lambda: llama(True), ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
                   ["lm_head", "embed_tokens", "norm"], {}),
    "gpt2": (small(GPT2Config, GPT2LMHeadModel, n_embd=32, n_layer=2, n_head=4, n_positions=64),
             ["c_attn", "c_proj", "c_fc", "attn.c_proj", "wte"], ["ln_f", "wte", "h.0.mlp"], {}),
    "opt": (small(OPTConfig, OPTForCausalLM, ffn_dim=48, word_embed_proj_dim=32), ["q_proj", "v_proj", "fc1", "fc2", "out_proj"],
            ["final_layer_norm", "fc1"], {}),
    "bert": (small(BertConfig, BertForSequenceClassification), ["query", "value", "dense", "attention.output.dense", "word_embeddings"],
             ["pooler", "LayerNorm", "classifier"], {"task_type": "SEQ_CLS"}),
    "roberta": (small(RobertaConfig, RobertaForSequenceClassification), ["query", "key", "intermediate.dense", "dense"],
                ["classifier", "LayerNorm"], {"task_type": "SEQ_CLS"}),
    "distilbert": (small(DistilBertConfig, DistilBertForSequenceClassification, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
                   ["q_lin", "v_lin", "lin1", "ffn.lin2"], ["pre_classifier"], {"task_type": "SEQ_CLS"}),
    "t5": (small(T5Config, T5ForConditionalGeneration, d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=48, decoder_start_token_id=0),
           ["q", "v", "k", "wi", "wo", "SelfAttention.o"], ["final_layer_norm", "lm_head"], {"task_type": "SEQ_2_SEQ_LM"}),
    "bart": (small(BartConfig, BartForConditionalGeneration, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                   decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48),
             ["q_proj", "v_proj", "fc1", "out_proj", "encoder_attn.k_proj"], ["layernorm_embedding", "fc2"], {"task_type": "SEQ_2_SEQ_LM"}),
}  # fmt: skip


def targets(rng: random.Random, names: list[str], paths: list[str]) -> Any:
    return rng.choice([
        rng.sample(names, rng.randint(1, min(3, len(names)))),
        rng.sample(names, rng.randint(1, min(3, len(names)))),
        "all-linear",
        rf".*\.({'|'.join(rng.sample(names, min(2, len(names))))})",
        rf".*[.](0|layer[.]1)[.].*{rng.choice(names)}",
        rng.sample(paths, min(4, len(paths))),
    ])  # fmt: skip


def patterns(rng: random.Random, names: list[str], paths: list[str], values: list[Any]) -> dict[str, Any]:
    keys = [
        rng.choice(names),
        rf".*\.1\..*{rng.choice(names)}",
        "^" + rng.choice(paths).replace(".", r"\."),
        rng.choice(paths),
    ]
    return {key: rng.choice(values) for key in rng.sample(keys, rng.randint(1, 3))}


def lora(rng: random.Random, names: list[str], paths: list[str], whole: list[str]) -> dict[str, Any]:
    """Draw unusual settings of a LoRA."""
    found: dict[str, Any] = {
        "r": rng.choice([1, 2, 4]),
        "lora_alpha": rng.choice([1, 8, 3.5]),
        "target_modules": targets(rng, names, paths),
    }
    listed = isinstance(found["target_modules"], list)
    draws: dict[str, tuple[float, Any]] = {
        "exclude_modules": (0.2, rng.choice([[rng.choice(names)], r".*\.0\..*", rng.sample(paths, 2)])),
        "rank_pattern": (0.3, patterns(rng, names, paths, [1, 2, 3])),
        "alpha_pattern": (0.3, patterns(rng, names, paths, [2, 16, 0.5])),
        "bias": (0.3, rng.choice(["all", "lora_only"])),
        "use_rslora": (0.3, True),
        "use_dora": (0.2, True),
        "lora_bias": (0.15, True),
        "modules_to_save": (0.35, rng.sample(whole, rng.randint(1, min(2, len(whole))))),
        "trainable_token_indices": (0.15, rng.sample(range(60), 3)),
        "ensure_weight_tying": (0.15, True),
        "fan_in_fan_out": (0.2, True),
        "init_lora_weights": (0.3, rng.choice([False, "gaussian", "pissa", "olora", "orthogonal"])),
        "lora_dropout": (0.2, 0.1),
    }  # fmt: skip
    found |= {name: value for name, (share, value) in draws.items() if rng.random() < share}
    if listed and rng.random() < 0.3:
        found["layers_to_transform"] = rng.choice([[0], [1], 1, [0, 1], []])
        if rng.random() < 0.5:
            found["layers_pattern"] = rng.choice(
                ["layers", "layer", "h", ["h", "layers", "block"], ["blocks", "layer"], ""]
            )
    return found


def other(rng: random.Random, names: list[str], paths: list[str], whole: list[str]) -> Any:
    """Draw a config of another kind."""
    more: dict[str, Any] = {"target_modules": targets(rng, names, paths)}
    if rng.random() < 0.3:
        more["modules_to_save"] = [rng.choice(whole)]
    kind = rng.choice(["IA3Config", "LoHaConfig", "LoKrConfig", "VeraConfig", "MissConfig", "HiraConfig", "ShiraConfig", "OFTConfig",
                       "AdaLoraConfig", "LNTuningConfig"])  # fmt: skip
    if kind == "IA3Config":
        more["feedforward_modules"] = (
            rng.sample(more["target_modules"], 1) if isinstance(more["target_modules"], list) else []
        )
    if kind in ("VeraConfig", "MissConfig", "OFTConfig"):
        more["bias"] = rng.choice(
            [
                "none",
                "none",
                "all",
                {"VeraConfig": "vera_only", "MissConfig": "MiSS_only", "OFTConfig": "oft_only"}[kind],
            ]
        )
    if kind in ("LoHaConfig", "LoKrConfig"):
        more |= {
            "r": 2,
            "alpha": 5,
            "rank_pattern": patterns(rng, names, paths, [1, 3]),
            "alpha_pattern": patterns(rng, names, paths, [2, 0.5]),
        }
    if kind in ("VeraConfig", "MissConfig", "HiraConfig", "ShiraConfig"):
        more["r"] = rng.choice([2, 4])
    if kind == "MissConfig":
        more["init_weights"] = rng.choice([True, False, "bat"])
    if kind == "OFTConfig":
        more |= {
            "oft_block_size": 4,
            "coft": rng.random() < 0.3,
            "block_share": rng.random() < 0.3,
            "use_cayley_neumann": rng.random() < 0.5,
        }
    if kind == "AdaLoraConfig":
        more |= {"init_r": 4, "total_step": 10, "lora_alpha": rng.choice([1, 16])}
    if kind == "LNTuningConfig":
        more = {"target_modules": [name for name in whole if "norm" in name.lower() or name == "ln_f"] or names}
    if kind in ("LoHaConfig", "LoKrConfig", "MissConfig", "HiraConfig", "OFTConfig") and rng.random() < 0.3:
        more["exclude_modules"] = [rng.choice(names)]
    return getattr(peft, kind), more


def one(seed: int, folder: Path) -> str:
    """Try one random config. Return "same", "refused: why", "PEFT: why it refuses", or "FAULT: ..."."""
    rng = random.Random(seed)
    base = rng.choice(list(BASES))
    make, names, whole, common = BASES[base]
    paths = [
        path
        for path, module in make().named_modules()
        if path.endswith(tuple(f".{name}" for name in names)) and any(True for _ in module.parameters())
    ]
    kind, settings = (
        (peft.LoraConfig, lora(rng, names, paths, whole)) if rng.random() < 0.6 else other(rng, names, paths, whole)
    )
    said = f"seed {seed}, {base}, {kind.__name__}({settings})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(seed)
            saved(make(), kind(**common, **settings), folder, 0.05)
            want = logits(peft.PeftModel.from_pretrained(make(), folder).eval())
            assert want.isfinite().all()
        except Exception as error:
            return f"PEFT: {type(error).__name__}"
        try:
            found = off(loaded(make(), folder), want)
        except graft.GraftError as error:
            return f"refused: {error} [{said}]"
        except Exception as error:
            return f"FAULT: {type(error).__name__}: {error} [{said}]"
    return "same" if found < 1e-5 else f"FAULT: logits differ by {found:.1e} [{said}]"


def sweep(seeds: range, folder: Path) -> list[str]:
    found = [one(seed, folder / str(seed)) for seed in seeds]
    faults = [each for each in found if each.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    return found


def test_forty_random_configs_compute_the_same_or_are_refused_by_name(tmp_path: Path) -> None:
    found = sweep(range(40), tmp_path)
    assert found.count("same") >= 15


@pytest.mark.slow
def test_many_random_configs_compute_the_same_or_are_refused_by_name(tmp_path: Path) -> None:
    found = sweep(range(40, 640), tmp_path)
    assert found.count("same") >= 250
