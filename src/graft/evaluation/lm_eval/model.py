"""The model `graft` of lm-eval (github.com/EleutherAI/lm-evaluation-harness): a base with at most one adapter.

    lm_eval --model graft --model_args base=MODEL,adapter=FOLDER --tasks gsm8k

A model with adapters is an ordinary transformers model, so lm-eval's own class for these runs it, with lm-eval's prompts,
batches and scores. The folder `tasks` holds benchmarks that lm-eval lacks, under the protocol of LLM-Adapters: graft_addsub,
graft_multiarith, graft_singleeq, graft_svamp and graft_mawps (and graft_gsm8k for comparison). `--metadata data=FOLDER` names
the folder of their files.

The package `_graft_lm_eval`, which Python imports when it starts, registers the model and the tasks with lm-eval. In a
checkout that is not installed, run `python -m graft.evaluation.lm_eval` in place of `lm_eval`. To evaluate several candidates
and keep the results, use `harness`.
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

from lm_eval.models.huggingface import HFLM as _HFLM  # noqa: E402  (after the check that it is installed)

HFLM: Any = _HFLM  # its metaclass and decorators hide its parameters from type checkers


class GraftLM(HFLM):
    """A base with at most one adapter.

    base: folder or hub name. adapter: a folder in any format that `graft.load` reads; None is the bare base. device, dtype: as
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
    """Replace a GPU that does not exist by None, with a warning, as lm-eval's own models do.

    lm-eval passes cuda:0 if the user named no device.
    """
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("there is no GPU: the device '%s' is replaced by 'auto'", device)
        return None
    return device


_graft_lm_eval.add_model()
