"""The loop of a study: propose points, choose a joint run, train it, record its trials; until nothing is left to do.

Several processes may run it on one folder. Each takes joint runs of its own; a joint run whose process is gone is gone on with by the next
process that looks. The lock of a joint run is the operating system's, so it ends with its process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.config import RunConfig
from graft.study.definition import Study
from graft.study.grouping import group_of
from graft.study.memory import MemoryPredictor, check_adapters, obstacle
from graft.study.packing import next_pack
from graft.study.points import check, points_of
from graft.study.running import BASE, Pack, run_pack, unusual
from graft.study.searching import ask
from graft.study.store import FILE, Store, Trial
from graft.utils.files import to_json

Say = Callable[[str], None]


class Runner:
    """Runs one study in a folder."""

    def __init__(self, study: Study, out: Path, say: Say = lambda text: None, quiet: bool = True) -> None:
        self.study, self.out, self.say, self.quiet = study, out, say, quiet
        self.predictor = MemoryPredictor()
        self.store: Store = None  # type: ignore[assignment]  # until `begin`

    def begin(self, known_as: Mapping[str, Any] | None) -> None:
        """Check everything that can be checked beforehand, and open the storage."""
        configs = check(self.study)
        check_adapters(self.predictor, configs)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "packs").mkdir(exist_ok=True)
        self.store = Store.open(self.out / FILE, known_as)
        search = self.study.config.search
        if search is None:
            with self.store.transaction():
                for settings in points_of(self.study):
                    self.store.add_point(settings, self.study.config.seeds)

    def config_of(self, trial: Trial) -> RunConfig:
        return self.study.config_of(trial.settings, trial.seed)

    def run(self, after: Callable[[], Any] = lambda: None, most: int | None = None) -> None:
        """Run joint runs until every trial is over; `after` is called after each. most: joint runs at most.

        Raises `Stopped` if the user stops it; the study then goes on with --resume.
        """
        done = 0
        while most is None or done < most:
            taken = self._take()
            if taken is None:
                return
            pack, trials, lock = taken
            try:
                self._run(pack, trials)
            finally:
                lock.release()
            done += 1
            after()

    def _take(self) -> tuple[int, list[Trial], FileLock] | None:
        """Take a joint run whose process is gone, else the next one of the trials that wait; None if nothing is left to take."""
        with self.store.transaction():
            for pack in self.store.running_packs():
                lock = self._lock(pack)
                if lock is not None:
                    return pack, self.store.trials(pack=pack), lock
            if self.study.config.search is not None:
                ask(self.study, self.store, self._infeasible)
            waiting = self._feasible(self.store.trials("waiting"))
            chosen = next_pack(waiting, self.config_of, self.study.config, self.predictor)
            if not chosen:
                return None
            pack = self.store.add_pack(chosen)
            lock = self._lock(pack)
            assert lock is not None, "nobody else knows of this joint run yet"
            return pack, chosen, lock

    def _lock(self, pack: int) -> FileLock | None:
        """Take the lock of a joint run; None if another process has it."""
        lock = FileLock(self.out / "packs" / f"{pack:04d}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def _infeasible(self, settings: Mapping[str, Any]) -> str | None:
        """Why a point cannot be tried; None if it can."""
        config = self.study.config_of(settings, self.study.config.seeds[0])
        return obstacle(self.predictor, config, self.study.config.memory)

    def _feasible(self, waiting: list[Trial]) -> list[Trial]:
        """Note the trials that would not fit into memory, and return the others."""
        found = []
        for trial in waiting:
            reason = self._infeasible(trial.settings)
            if reason is None:
                found.append(trial)
            else:
                self.store.refuse(trial, reason)
                self.say(f"trial {trial.id} is not tried: {reason}")
        return found

    def _run(self, number: int, trials: list[Trial]) -> None:
        configs = {trial.job: self.config_of(trial) for trial in trials}
        alone = None
        first = next(iter(configs.values()))
        if not group_of(first):
            alone = next(iter(first.each()))
        pack = Pack(self.out / "packs" / f"{number:04d}", configs, alone)
        self.say(f"joint run {number}: {len(trials)} of {sum(self.store.counts().values())} trials")
        try:
            found = run_pack(pack, self.study.config, self._history(), self.store.fact("base") is None, self.quiet)
        except Exception as error:
            if unusual(error):
                raise
            if len(trials) > 1:
                self.say(f"joint run {number} cannot run ({error}): its trials run one by one")
                self.store.separate(number)
                return
            said = str(error) or type(error).__name__
            self.say(f"trial {trials[0].id} failed: {said}")
            self.store.finish(number, {trials[0].id: ("failed", None, said)})
            return
        base = found.pop(BASE, None)
        for job, config in configs.items():
            if (result := found[job][1]) is not None and (count := self.predictor.trained(config)) is not None:
                result["parameters"] = count
        with self.store.transaction():
            if base is not None:
                self.store.set_fact("base", to_json(base[1]))
            self.store.finish(number, {trial.id: found[trial.job] for trial in trials})
        for trial in trials:
            if found[trial.job][0] == "failed":
                self.say(f"trial {trial.id} failed: {found[trial.job][2]}")

    def _history(self) -> dict[str, list[float]]:
        """For the pruner median: the validation losses of earlier trials, by step."""
        if self.study.config.pruner.kind != "median":
            return {}
        found: dict[str, list[float]] = {}
        for trial in self.store.trials("done"):
            for step, loss in (trial.result or {}).get("validations", ()):
                found.setdefault(str(step), []).append(loss)
        return found
