"""lm-eval (github.com/EleutherAI/lm-evaluation-harness) with grafted models.

    lm_eval --model graft --model_args base=MODEL,adapter=FOLDER --tasks gsm8k

A grafted model is an ordinary transformers model, so the harness's own class for these asks it, with lm-eval's prompts,
batches and scores. `lm_eval_tasks` holds the sets that lm-eval lacks, under the protocol of LLM-Adapters: graft_addsub,
graft_multiarith, graft_singleeq, graft_svamp, graft_mawps (and graft_gsm8k, to compare); `--metadata data=FOLDER` says where
their files are.

The package `_graft_lm_eval`, which Python imports when it starts, makes the model and the tasks known to lm-eval. Where it is not
installed (a checkout on the path), `python -m graft.evaluation.lm_eval.model` in place of `lm_eval` does. `lm_eval_harness` asks several
contestants and keeps the results.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

import _graft_lm_eval
from graft.attaching.active import set_active
from graft.config.base import BaseConfig
from graft.errors import require
from graft.generation.loaded import load_candidates

require("lm_eval", "eval")

from lm_eval.models.huggingface import HFLM as _HFLM  # noqa: E402  (behind the check that it is installed)

HFLM: Any = _HFLM  # its metaclass and decorators hide its parameters from type checkers


class GraftLM(HFLM):
    """A base with at most one adapter.

    base: folder or hub name. adapter: a folder of any format that `graft.load` reads; none is the bare base. device, dtype: as
    in a run's `base`. Further arguments are those of lm-eval's `hf` model (batch_size, max_length, ...).
    """

    def __init__(
        self,
        base: str,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        given = {"device": _present(device), "dtype": dtype}
        config = BaseConfig.model_validate({"model": base, **{k: v for k, v in given.items() if v is not None}})
        loaded = load_candidates(None, config, [adapter] if adapter else [])
        if loaded.adapters:
            set_active(loaded.base.model, loaded.adapters[0].adapter)
        super().__init__(pretrained=loaded.base.model, tokenizer=loaded.base.tokenizer, **options)


def _present(device: str | None) -> str | None:
    """lm-eval says cuda:0 where its user said nothing. As its own models do, take what there is, and say so."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("there is no GPU here: the device '%s' is replaced by 'auto'", device)
        return None
    return device


_graft_lm_eval.add_model()
