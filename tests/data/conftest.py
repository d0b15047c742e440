"""Two small tokenizers made on the spot: one of GPT-2's kind (bytes, no BOS), one of LLaMA's (BOS, marks the start of a text)."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = ["the cat sat on the mat and the dog ate the bone. How many apples are left? 3 + 4 = 7\n"] * 5
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def gpt_like() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def llama_like() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[c for c in string.printable if c != "\n"],
        max_token_length=4,
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.strip() for line in TEXT], trainer)
    start = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = start
    serialised: dict[str, Any] = json.loads(tokenizer.to_str())  # the 256 bytes are ordinary tokens, not special ones
    serialised["added_tokens"] = [token for token in serialised["added_tokens"] if token["content"] in special]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(serialised)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


MAKERS = {"gpt": gpt_like, "llama": llama_like}


@pytest.fixture(params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MAKERS[request.param]()


@pytest.fixture
def gpt() -> PreTrainedTokenizerFast:
    return gpt_like()


@pytest.fixture
def llama() -> PreTrainedTokenizerFast:
    return llama_like()


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Either tokenizer with a ChatML template whose marks are special tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(params=["tokenizers/gpt2", "tokenizers/neox-20b", "models/stories-260k"])
def real(request: pytest.FixtureRequest, shared: Any) -> Any:
    return AutoTokenizer.from_pretrained(shared / request.param)
