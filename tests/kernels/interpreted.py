"""What Triton's interpreter lacks of CUDA's library. Imported only where triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rsqrt(x):  # noqa: ANN001, ANN201
    return tl.rsqrt(x)
