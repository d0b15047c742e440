"""The arguments of a model's forward for a padded batch.

Positions are left to the model: rows are right-padded, so they start at the first position, and encoders that count from the padding id
(RoBERTa) know their own first position. A decoder reads its answer, shifted right by its start token.

Legend: B rows, M answer tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from graft.data.batches import Batch


def inputs_of(root: Any, batch: Batch) -> dict[str, Any]:
    """Return keyword arguments for the model's forward. Labels are never among them."""
    taken = inspect.signature(root.forward).parameters
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.token_type_ids is not None and "token_type_ids" in taken:
        inputs["token_type_ids"] = batch.token_type_ids
    if batch.answer_ids is not None:
        inputs["decoder_input_ids"] = shifted_right(root, batch.answer_ids)
        inputs["decoder_attention_mask"] = batch.answer_mask
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return inputs


def shifted_right(root: Any, answer_ids_BM: Tensor) -> Tensor:
    """Return what the decoder reads while it writes the answer [B, M]: its start token, then the answer without its last token.

    E.g. the answer [12, 7, 1] with start token 0 becomes [0, 12, 7].
    """
    own = getattr(root, "prepare_decoder_input_ids_from_labels", None)  # mBART starts with the language of the answer
    if own is not None:
        return own(answer_ids_BM)
    shifted_BM = answer_ids_BM.roll(1, 1)
    shifted_BM[:, 0] = root.config.decoder_start_token_id
    return shifted_BM
