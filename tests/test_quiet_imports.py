"""What other libraries say when they are imported does not reach the screen of those who train from Python."""

import subprocess
import sys


def test_a_schedule_imports_bitsandbytes_without_a_word() -> None:
    code = """if True:
        import sys, torch
        from graft.config.train import TrainConfig
        from graft.training.updates.schedules import build_schedule
        weight = torch.zeros(1, requires_grad=True)
        build_schedule(torch.optim.SGD([weight], lr=0.1), TrainConfig(steps=4), 4)
        assert "bitsandbytes" in sys.modules and "kernels" not in sys.modules
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "" and "kernel" not in said.stderr
