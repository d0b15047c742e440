"""The embedded base: it loads as any other model does, it is small, and its tokenizer keeps numbers whole."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft import seedling


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(seedling.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(seedling.path(), dtype=torch.float32).eval()


def test_all_files_together_are_at_most_25_megabytes():
    files = [file for file in seedling.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25_000_000


def test_the_architecture_is_llama_and_the_weights_are_safetensors(model):
    config = json.loads((seedling.path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list(seedling.path().glob("*.bin"))
    assert 1_000_000 < model.num_parameters() < 10_000_000


def test_logits_are_finite_over_the_whole_context(model, tokenizer):
    length = model.config.max_position_embeddings
    ids = tokenizer("Anna has 7 apples. " * length, return_tensors="pt")["input_ids"][:, :length]
    with torch.no_grad():
        logits = model(input_ids=ids).logits  # [1, length, vocabulary]
    assert logits.shape == (1, length, len(tokenizer))
    assert torch.isfinite(logits).all()


def test_it_writes_english_words(model, tokenizer):
    inputs = tokenizer("One day Anna went to the", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.startswith("One day Anna went to the ")
    assert len(text.split()) > 10


def test_tokens_that_pretraining_never_saw_can_be_told_apart(model, tokenizer):
    """With equal embeddings, which the head shares, no adapter could choose one of them."""
    ids = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>", "wer", "&", "@"])
    rows = torch.nn.functional.normalize(model.get_input_embeddings().weight[ids], dim=1)  # [6, hidden]
    cosine = rows @ rows.T - 2 * torch.eye(len(ids))
    assert cosine.max() < 0.98


def test_it_knows_most_small_sums(model, tokenizer):
    facts = [(a, b) for a in range(2, 12) for b in range(2, 12)]
    right = 0
    for a, b in facts:
        inputs = tokenizer(f"{a} + {b} =", return_tensors="pt")
        with torch.no_grad():
            right += tokenizer.decode(model(**inputs).logits[0, -1].argmax()).strip() == str(a + b)
    assert right > 0.8 * len(facts)


@pytest.mark.parametrize("number", range(100))
def test_a_number_below_a_hundred_is_one_token(tokenizer, number):
    for text in (str(number), f" {number}"):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize(
    "text", ["7+5=12", "She has 7 + 5 = 12 apples.", "1234567", " 007 and 3.14", "line\n\ttab", "naïve 数字 ½"]
)
def test_every_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_chat_template_marks_roles_and_ends_answers(tokenizer):
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s><|user|>Hello.<|assistant|>Good day.</s>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<s><|user|>Hello.<|assistant|>"


def test_special_tokens_are_distinct_single_tokens(tokenizer):
    names = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
