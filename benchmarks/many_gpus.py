"""Predicted, not measured: what many GPUs give for bases of 8 and 70 billion parameters, by sizes and a stated model.

    python benchmarks/many_gpus.py

The model. A pass over T tokens of a frozen base of P parameters takes 4 P T operations (2 forward, 2 for the gradients of inputs) at
`FLOPS`; adapters are left out, they add about their share of P. A GPU sends and receives at `LINKS` bytes per second, that of the slowest
link. What ranks exchange:

    ddp         once per step the gradients of the adapters in float32; a ring sends 2 (N - 1) / N of them
    fsdp2       that, and in every pass the base twice (forward and backward), (N - 1) / N of it
    pipeline    hidden states in bfloat16 forward, and their gradients back, and what ddp sends; N ranks idle for (N - 1) / (M + N - 1) of a
                step of M micro-batches, one of each job

`benchmarks/world.py` measures what ddp sends: it has to be the bytes of the adapters' gradients. Speed is that of N GPUs over N times that
of one with room for the base; the lower bound is without any overlap of exchange and computation, the upper one with all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS = 400e12
"""Assumed: about 40% of the 989 TFLOP/s that NVIDIA names for bfloat16 on H100 and H200."""
LINKS = {8: 450e9, 64: 50e9}
"""By the number of GPUs: NVLink 4 in a machine, and 400 Gbit/s for each GPU between machines, as NVIDIA names them."""
TOKENS = 8192
"""Of a micro-batch; each GPU has one in a step, a pipeline one for each job."""
RANK, STATE = 16, 16
"""Of LoRAs on all linear layers; bytes of each of their parameters: master, gradient and two moments in float32."""
BITS = {"bfloat16": 16.0, "nf4": 4.127}


@dataclass(frozen=True)
class Shape:
    """A LLaMA."""

    name: str
    hidden: int
    layers: int
    inner: int
    key_values: int
    vocabulary: int = 128256

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Input and output features of the linear layers of a block."""
        hidden, small, inner = self.hidden, self.key_values, self.inner
        return [(hidden, hidden), (hidden, small), (hidden, small), (hidden, hidden), *[(hidden, inner)] * 2, (inner, hidden)]  # fmt: skip

    @property
    def linear(self) -> int:
        """Parameters of the linear layers of the blocks."""
        return self.layers * sum(each * other for each, other in self.matrices)

    @property
    def tables(self) -> int:
        """Parameters of embedding and head, which stay in bfloat16."""
        return 2 * self.vocabulary * self.hidden

    @property
    def adapter(self) -> int:
        """Parameters of a LoRA on all linear layers."""
        return self.layers * RANK * sum(each + other for each, other in self.matrices)

    def num_bytes(self, stored: str) -> float:
        """Bytes of the base."""
        return self.linear * BITS[stored] / 8 + self.tables * 2


BASES = (Shape("8B", 4096, 32, 14336, 1024), Shape("70B", 8192, 80, 28672, 1024))
CASES = [
    ("8B", "bfloat16", "ddp", 8), ("8B", "bfloat16", "ddp", 64), ("8B", "bfloat16", "fsdp2", 8),
    ("70B", "nf4", "ddp", 8), ("70B", "nf4", "ddp", 64), ("70B", "bfloat16", "fsdp2", 8), ("70B", "nf4", "fsdp2", 8),
    ("70B", "bfloat16", "fsdp2", 64), ("70B", "bfloat16", "pipeline", 8), ("70B", "bfloat16", "pipeline", 8, 24),
]  # fmt: skip


def predicted(base: Shape, stored: str, mode: str, gpus: int, jobs: int) -> dict[str, float]:
    """Bytes of base and adapters on a GPU, bytes that it receives in a step, and both bounds of its speed."""
    part = (gpus - 1) / gpus
    seconds = 4 * (base.linear + base.tables / 2) * TOKENS / FLOPS
    sent, busy = 2 * part * base.adapter * 4 * jobs, 1.0
    if mode == "fsdp2":
        sent += 2 * part * base.num_bytes(stored)
    if mode == "pipeline":
        sent += 2 * jobs * TOKENS * base.hidden * 2
        seconds *= jobs / gpus
        busy = jobs / (jobs + gpus - 1)
    exchange = sent / LINKS[gpus]
    return {
        "base": base.num_bytes(stored) / (1 if mode == "ddp" else gpus),
        "adapters": base.adapter * STATE * jobs,
        "sent": sent,
        "least": seconds / (seconds / busy + exchange),
        "most": seconds / max(seconds / busy, exchange),
    }


def table() -> list[str]:
    """The lines of a table in Markdown."""
    lines = [
        "| base | mode | GPUs | jobs | base on each | adapters on each | received in a step | of the speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, stored, mode, gpus, *more in CASES:
        base = next(each for each in BASES if each.name == name)
        jobs = more[0] if more else 8 if mode == "pipeline" else 1
        found = predicted(base, stored, mode, gpus, jobs)
        held, adapters, sent = (f"{found[key] / 1e9:.1f} GB" for key in ("base", "adapters", "sent"))
        low, high = (f"{100 * found[key]:.0f}" for key in ("least", "most"))
        lines.append(
            f"| {name} in {stored} | {mode} | {gpus} | {jobs} | {held} | {adapters} | {sent} | {low} to {high} % |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
