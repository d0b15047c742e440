"""`python -m graft.evaluation.lm_eval`: lm-eval's own command line with Graft's model and tasks.

Use it in place of `lm_eval` where Graft is on the path but not installed, so that Python has not imported `_graft_lm_eval`.
"""

from __future__ import annotations

import _graft_lm_eval
from graft.errors import require


def main() -> None:
    """Register Graft's model and tasks with lm-eval, then run its command line."""
    require("lm_eval", "eval")
    import lm_eval.tasks.manager as manager
    from lm_eval.__main__ import cli_evaluate

    _graft_lm_eval.add_model()
    _graft_lm_eval.add_tasks(manager)
    cli_evaluate()


if __name__ == "__main__":
    main()
