"""How much what an adapter adds to a token says about which sequence the token is in (MixPHM): a bound of mutual information.

With f_t, what the adapter adds to token t, and e_r, the mean of the last hidden states of sequence r,

    loss = mean_t [ softplus(-f_t . e_own) + mean_{r != own} softplus(f_t . e_r) ] - 2 log 2

Its negative is the Jensen-Shannon bound: 0 where the products say nothing, up to 2 log 2 where each token knows its sequence.

Jiang et al. 2023, "MixPHM" (arXiv 2303.01239).

Legend: R sequences, T tokens of all of them, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.errors import GraftError


def information(added: Sequence[Tensor], ends_RD: Tensor) -> Tensor:
    """Return the loss of each sequence [R], in float32 or wider; the loss is their mean. One sequence alone has nothing to differ from: 0.

    added: what the adapter adds to the real tokens of each sequence, [L, D].
    """
    if len(added) != len(ends_RD) or added[0].shape[-1] != ends_RD.shape[-1]:
        raise GraftError(
            f"information compares tokens of {len(added)} sequences, {added[0].shape[-1]} features wide, with the last hidden states of "
            f"{len(ends_RD)} sequences, {ends_RD.shape[-1]} wide: adapt a sublayer, without virtual tokens before the sequence"
        )
    exact = torch.promote_types(ends_RD.dtype, torch.float32)
    rows = len(added)
    if rows == 1:
        return ends_RD.new_zeros(1, dtype=exact)
    scores_TR = torch.cat(list(added)).to(exact) @ ends_RD.to(exact).T
    lengths = torch.tensor([len(each) for each in added], device=ends_RD.device)
    row_T = torch.arange(rows, device=ends_RD.device).repeat_interleave(lengths)
    own_TR = F.one_hot(row_T, rows).bool()
    terms_TR = torch.where(own_TR, F.softplus(-scores_TR), F.softplus(scores_TR) / (rows - 1))
    of_tokens_T = terms_TR.sum(1) - 2 * math.log(2)
    # all tokens weigh the same, so a row has the share of its tokens
    return ends_RD.new_zeros(rows, dtype=exact).index_add(0, row_T, of_tokens_T) * (rows / len(row_T))
