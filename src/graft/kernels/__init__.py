"""Liger's Triton kernels instead of torch's operations for norms, rotary positions and SwiGLU, while a block of code runs.

Liger itself patches modules of transformers for the whole process, and gives instances a forward that hides the class's. Here its functions
run through class substitution, inside whatever adapters the module hosts, and are gone when the block ends. Which modules a kernel can
serve is found by running the modules' own forward and comparing numbers. Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989).
"""

from graft.kernels.install import Served, serving
from graft.kernels.liger import Kernels, chosen, described, load

__all__ = ["Kernels", "Served", "chosen", "described", "load", "serving"]
