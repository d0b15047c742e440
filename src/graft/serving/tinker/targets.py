"""Log-probabilities of tokens of a client's choice at each place of a prompt, and tokens drawn there, as the wire has them.

Row i belongs to the prompt's token i + 1. A cell of -1 asks for nothing and gets 0. A sparse table has the cells that it lists, and its
answer the same cells.

Legend: L tokens of the prompt, K cells of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from graft.errors import GraftError
from graft.generation.sampling import PromptScores
from graft.serving.tinker.tensors import FLOAT32, INT64, as_float32, as_int64
from graft.utils.strict import Strict

MOST_CELLS = 2**20
"""Most cells of a table of a prompt."""


class TargetTable(Strict):
    """Tokens [L - 1, K], dense or as compressed sparse rows."""

    data: list[int]
    dtype: Literal["int64"] = "int64"
    shape: list[int] = Field(min_length=2, max_length=2)
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None

    def rows(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of each row; of a sparse table, those that it lists. length: tokens of the prompt. Raises `GraftError`."""
        count, width = self.shape
        if count != length - 1 or width < 1 or count * width > MOST_CELLS:
            raise GraftError(
                f"target_prompt_logprobs has to be [{length - 1}, K] for a prompt of {length} tokens, with at most {MOST_CELLS:,} cells; "
                f"given: {self.shape}"
            )
        starts, columns = self.sparse_crow_indices, self.sparse_col_indices
        if starts is None and columns is None:
            if len(self.data) != count * width:
                raise GraftError(f"target_prompt_logprobs has {len(self.data)} values, but shape {self.shape}")
            starts = list(range(0, len(self.data) + 1, width))
        elif not _fits(starts, columns, len(self.data), count, width):
            raise GraftError(f"target_prompt_logprobs: the sparse indices do not fit shape {self.shape}")
        assert starts is not None
        found = tuple(tuple(self.data[first:last]) for first, last in zip(starts[:-1], starts[1:], strict=True))
        if not any(token >= 0 for row in found for token in row):
            raise GraftError("target_prompt_logprobs names no token")
        return found

    def fill(self, message: Any, scores: PromptScores) -> None:
        """Write the answer: the same shape and layout."""
        values = as_float32([score for row in scores.targets for score in row])
        message.dtype = FLOAT32
        message.shape.extend(self.shape)
        if self.sparse_crow_indices is None:
            message.dense = values
            return
        message.sparse_csr.values = values
        message.sparse_csr.crow_indices = as_int64(self.sparse_crow_indices)
        message.sparse_csr.col_indices = as_int64(self.sparse_col_indices or [])


def _fits(starts: Sequence[int] | None, columns: Sequence[int] | None, values: int, count: int, width: int) -> bool:
    if starts is None or columns is None or len(starts) != count + 1 or not values == len(columns) == starts[-1]:
        return False
    rises = all(first <= last for first, last in zip(starts[:-1], starts[1:], strict=True))
    return starts[0] == 0 and rises and all(0 <= column < width for column in columns)


def fill_draws(message: Any, scores: PromptScores, width: int) -> None:
    """Write the tokens that were drawn at each place of the prompt, and their log-probabilities."""
    cells = [cell for row in scores.draws for cell in row]
    for tensor, dtype, values in (
        (message.tokens, INT64, as_int64([token for token, _ in cells])),
        (message.logprobs, FLOAT32, as_float32([score for _, score in cells])),
    ):
        tensor.dense, tensor.dtype = values, dtype
        tensor.shape.extend([len(scores.draws), width])
