"""Liger's Triton kernels in place of torch's operations for norms, rotary positions and SwiGLU, as long as a block of code runs.

Liger's own way changes modules of transformers for the whole process, and gives instances a forward that hides the class's. Here its
functions stand behind class substitution, inside whatever adapters the module hosts, and are gone when the block ends. Which modules they
serve is read off the modules and proved by numbers. Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989).
"""

from graft.kernels.install import Served, serving
from graft.kernels.liger import Kernels, chosen, described, load

__all__ = ["Kernels", "Served", "chosen", "described", "load", "serving"]
