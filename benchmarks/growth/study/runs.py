"""Trains the study's runs: trunks at a constant learning rate, and a branch that decays for every budget."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.growth.study.arms import ARMS
from benchmarks.growth.study.sizes import BATCH, SEQUENCE, STEP_TOKENS, UNIT, Sizes
from flm_megatron.config.schema import ModelConfig
from flm_megatron.json_text import JsonObject
from flm_megatron.training.metrics.events import StepEvent, ValidationEvent, read_events

DECAY = 0.2
"""Share of a budget's FLOPs over which the learning rate falls to zero."""
WARMUP = 60
"""Steps of warm-up at the beginning and after a growth, but no more than a fifth of the stage."""
EARLY = 0.05, 0.1
"""The stretch of the large stage whose training loss may tell early whether a growth pays."""
SCRATCH = "scratch"
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """The end of one run: `budget` and `grown_at` in tokens of the large model per parameter of it.

    `grown_at` counts the FLOPs spent before the growth (0 from scratch); `early` is the mean training loss over EARLY
    of the large stage of the trunk.
    """

    arm: str
    seed: int
    grown_at: float
    budget: float
    flops: float
    small_tokens: int
    large_tokens: int
    loss: float
    early: float


@dataclass(frozen=True)
class Study:
    """Folder, data, sizes and budgets of a study."""

    out: Path
    data: Path
    sizes: Sizes
    budgets: tuple[float, ...]
    validation_samples: int

    def scratch(self, seed: int, budgets: tuple[float, ...]) -> None:
        """From scratch, judged at each budget."""
        self._chain(SCRATCH, seed, 0.0, budgets)

    def grown(self, arm: str, seed: int, grown_at: float) -> None:
        """One arm, grown at one point, judged at each budget that is large enough."""
        self._chain(arm, seed, grown_at, tuple(b for b in self.budgets if (1 - DECAY) * b > grown_at))

    def results(self) -> list[Result]:
        """All results so far."""
        path = self.out / RESULTS
        lines = path.read_text().splitlines() if path.exists() else []
        return [Result(**json.loads(line)) for line in lines]

    def _chain(self, arm: str, seed: int, grown_at: float, budgets: tuple[float, ...]) -> None:
        """The trunk, then the branches; the largest budget is the end of the trunk itself."""
        had = {r.budget for r in self.results() if (r.arm, r.seed, r.grown_at) == (arm, seed, grown_at)}
        if not set(budgets) - had:
            return
        folder = run_folder(self.out, arm, grown_at, seed)
        folder.mkdir(parents=True, exist_ok=True)
        run_file = folder / "study.yaml"
        run_file.write_text(json.dumps(self.document(arm, seed, grown_at, max(budgets), folder), indent=1))
        if arm != SCRATCH:
            self._small_stage(arm, seed, grown_at, folder, run_file)
        flm("train", str(run_file))
        for budget in sorted(budgets):
            if budget in had:
                continue
            where = folder
            if budget != max(budgets):
                start = self._small_tokens(arm, grown_at) + self._before(grown_at, budget) * STEP_TOKENS
                fraction = self._fraction(arm, grown_at, budget)
                flm(
                    *("train", str(run_file), "--branch", f"decay@{start}"),
                    *("--stages.0.schedule.wsd_decay_fraction", repr(fraction)),
                )
                where = folder / "branches" / f"decay@{start}"
            self._keep(self._result(arm, seed, grown_at, budget, folder, where))
        for checkpoints in folder.rglob("checkpoints"):
            shutil.rmtree(checkpoints)

    def _small_stage(self, arm: str, seed: int, grown_at: float, folder: Path, run_file: Path) -> None:
        """Train the small stage, or take it from an arm that grows out of the same model at the same point."""
        small = ARMS[arm].small
        shared = self.out / f"small-{small}-{grown_at:g}-{seed}"
        with LOCKS.setdefault(shared, threading.Lock()):
            if not shared.exists():
                flm("train", str(run_file), "--stage", "small")
                copy_whole(folder, shared)
        if not (folder / "checkpoints").exists():
            shutil.copy(shared / "metrics.jsonl", folder)
            copy_whole(shared / "checkpoints", folder / "checkpoints")

    def document(self, arm: str, seed: int, grown_at: float, budget: float, folder: Path) -> JsonObject:
        """The run file of a trunk."""
        stages = []
        large_steps = self._before(grown_at, budget) + self.sizes.steps(budget, DECAY)
        if arm != SCRATCH:
            stages.append(self._stage("small", ARMS[arm].small, self._small_tokens(arm, grown_at)))
        stages.append(self._stage("large", "large", large_steps * STEP_TOKENS))
        stages[0]["schedule"] |= {"wsd_decay_fraction": self._fraction(arm, grown_at, budget)}
        if arm != SCRATCH:
            least = min(b for b in self.budgets if (1 - DECAY) * b > grown_at)
            opening = max(1, round(ARMS[arm].mask_share * self._before(grown_at, least)))
            stages[1]["growth"] = {"mask_steps": opening, "certify_samples": 0, **ARMS[arm].growth}
            stages[1]["schedule"] |= {"boundary": "rewarm"}
        return run_head(f"{arm} {seed}", seed, self.data, folder) | {
            "stages": stages,
            "checkpoint": {"interval_steps": UNIT, "keep_every_steps": UNIT},
        }

    def _stage(self, name: str, size: str, tokens: int) -> JsonObject:
        tuned, warmup = self.sizes.tuned(size), min(WARMUP * STEP_TOKENS, tokens // 5)
        return {
            "name": name,
            "model": model_fields(self.sizes.model(size)),
            "tokens": tokens,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "optimizer": {"lr": tuned["lr"], "min_lr": 0.0, "weight_decay": tuned["weight_decay"]},
            "schedule": {"kind": "wsd", "warmup_tokens": warmup},
            "validation": {"samples": self.validation_samples},
        }

    def _small_tokens(self, arm: str, grown_at: float) -> int:
        """Tokens of the small stage: those whose FLOPs are `grown_at`'s."""
        if arm == SCRATCH:
            return 0
        ratio = self.sizes.flops("large") / self.sizes.flops(ARMS[arm].small)
        return round(self.sizes.steps(grown_at) * ratio) * STEP_TOKENS

    def _before(self, grown_at: float, budget: float) -> int:
        """Steps of the large stage before the decay."""
        return self.sizes.steps(budget, 1 - DECAY) - self.sizes.steps(grown_at)

    def _fraction(self, arm: str, grown_at: float, budget: float) -> float:
        """The decay's share of the run's tokens."""
        decay = self.sizes.steps(budget, DECAY) * STEP_TOKENS
        return decay / (self._small_tokens(arm, grown_at) + self._before(grown_at, budget) * STEP_TOKENS + decay)

    def _result(self, arm: str, seed: int, grown_at: float, budget: float, trunk: Path, where: Path) -> Result:
        end = read_events(where, ValidationEvent)[-1]
        small = self._small_tokens(arm, grown_at)
        large = end.tokens - small
        spent = large * self.sizes.flops("large")
        if arm != SCRATCH:
            spent += small * self.sizes.flops(ARMS[arm].small)
        steps = [s for s in read_events(trunk, StepEvent) if s.stage == "large"]
        total = max(s.step for s in steps)
        early = fmean(s.loss for s in steps if EARLY[0] * total < s.step <= EARLY[1] * total)
        return Result(arm, seed, grown_at, budget, spent, small, large, end.loss, early)

    def _keep(self, result: Result) -> None:
        with (self.out / RESULTS).open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def copy_whole(source: Path, target: Path) -> None:
    """Copy a folder, which is not there under its name before it is whole."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)


def run_head(name: str, seed: int, data: Path, output: Path) -> JsonObject:
    """What the run files of all runs begin with; JSON is YAML."""
    return {
        "name": name,
        "output": str(output),
        "seed": seed,
        "tokenizer": f"{data}/tokenizer.model",
        "data": {
            "sequence_length": SEQUENCE,
            "train": [{"path": f"{data}/train"}],
            "validation": [{"path": f"{data}/validation"}],
        },
        "logging": {"interval_steps": 100, "tensorboard": False},
    }


def model_fields(model: ModelConfig) -> JsonObject:
    """A model as a run file has it."""
    return {name: value for name, value in asdict(model).items() if value is not None}


def run_folder(out: Path, arm: str, grown_at: float, seed: int) -> Path:
    """The output folder of a trunk."""
    return out / f"{''.join(c if c.isalnum() else '-' for c in arm)}-{grown_at:g}-{seed}"


LOCKS: dict[Path, threading.Lock] = {}


def flm(*arguments: str) -> None:
    """Run a command of the program on one thread; its output goes to the end of a log beside the run file."""
    log = Path(arguments[1]).with_name("study.log")
    with log.open("a") as file:
        subprocess.run(
            [sys.executable, "-m", "flm_megatron.cli.main", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
        )
