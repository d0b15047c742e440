"""Run a command that ends with the process that started it, however that ends: python -m graft.federation.flower.guard COMMAND..."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

SECONDS = 10.0
"""How long a command may take to end by itself."""


def main() -> int:
    parent, asked = os.getppid(), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
    process = subprocess.Popen(sys.argv[1:], start_new_session=True)
    while process.poll() is None and not asked and os.getppid() == parent:
        time.sleep(0.2)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
