"""lm-eval (github.com/EleutherAI/lm-evaluation-harness) with grafted models.

lm-eval finds models that are registered in its process and looks nowhere else, so its command is started through this module:

    python -m graft.interop.lm_eval run --model graft --model_args base=MODEL,adapter=FOLDER --tasks gsm8k

A grafted model is an ordinary transformers model, so the harness's own class for these asks it, with lm-eval's prompts,
batches and scores. `lm_eval_tasks` holds the sets that lm-eval lacks, under the protocol of LLM-Adapters: graft_addsub,
graft_multiarith, graft_singleeq, graft_svamp, graft_mawps (and graft_gsm8k, to compare); `--metadata '{"data": FOLDER}'`
says where their files are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graft
from graft.config.schema import BaseConfig
from graft.errors import GraftError, require
from graft.evaluation.contestants import Bench, Contestant, assemble

require("lm_eval", "eval")

from lm_eval.api.registry import register_model  # noqa: E402  (behind the check that it is installed)
from lm_eval.models.huggingface import HFLM as _HFLM  # noqa: E402

HFLM: Any = _HFLM  # its metaclass and decorators hide its parameters from type checkers

TASKS = Path(__file__).parent / "lm_eval_tasks"
"""What lm-eval takes as its include path."""


@register_model("graft")
class GraftLM(HFLM):
    """A base with at most one adapter.

    base: folder or hub name. adapter: a folder of any format that `graft.load` reads; none is the bare base. device, dtype: as
    in a run's `base`. Further arguments are those of lm-eval's `hf` model (batch_size, max_length, ...).
    """

    def __init__(
        self,
        base: str | Bench,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        contestant: Contestant | None = None,
        **options: Any,
    ) -> None:
        given = {"device": device, "dtype": dtype}
        if isinstance(base, Bench):
            bench, chosen = base, contestant or base.contestants[0]
        else:
            config = BaseConfig.model_validate({"model": base, **{k: v for k, v in given.items() if v is not None}})
            bench = assemble(None, config, [adapter] if adapter else [])
            chosen = bench.contestants[-1]
        if chosen.adapter is not None:
            graft.set_active(bench.base.model, chosen.adapter)
        elif bench.adapters:
            graft.set_active(bench.base.model, None)
        bench.base.model.eval()
        super().__init__(pretrained=bench.base.model, tokenizer=bench.base.tokenizer, **options)


def harness(
    bench: Bench,
    tasks: Sequence[str],
    data: str | Path | None = None,
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """lm-eval's results for every contestant: name -> task -> metric -> value.

    data: folder of the files of the graft_* tasks. Raises `GraftError` for a task that lm-eval does not know.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {} if data is None else {"data": str(data)}
    manager = TaskManager(include_path=str(TASKS), metadata=metadata)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise GraftError(f"lm-eval has no task '{unknown[0]}' (python -m graft.interop.lm_eval ls tasks lists them)")
    make: Any = GraftLM  # registering hides its parameters from type checkers
    found: dict[str, Any] = {}
    for contestant in bench.contestants:
        model = make(bench, contestant=contestant, batch_size=batch_size)
        answer: Any = simple_evaluate(
            model=model, tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=False,
            metadata=metadata, bootstrap_iters=1000,
        )  # fmt: skip
        assert answer is not None  # None is for the other processes of a distributed evaluation
        found[contestant.name] = answer["results"]
    return found


def main() -> None:
    """lm-eval's own command line, with the model `graft` and the tasks of this package."""
    import sys

    from lm_eval.__main__ import cli_evaluate

    if "--include_path" not in sys.argv and any(word in sys.argv for word in ("run", "ls", "validate")):
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    main()
