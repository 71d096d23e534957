"""Mutation test: small changes of the source that the unit tests of the changed file have to notice.

    pip install cosmic-ray==8.7.0
    python -m benchmarks.reliability.mutation --each 12 --out survivors.json [--only planner] [--seed 1]

For each file of `TESTS` a few of cosmic-ray's mutants are drawn (an operator, a comparison, a constant, a condition
changed; those inside annotations, asserts and the like left out, for they change nothing) and put into a copy of the
tree, one at a time. The file's own tests run in a process that is forked from one that has torch loaded. Prints
Markdown; survivors go to `--out`. Mutants in `mutation_equivalent.json` change nothing that a test could see, each for
the reason given there.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUARDS = (
    ("if TYPE_CHECKING", "if not TYPE_CHECKING"),
    ("strict=True", "strict=False"),
    ("frozen=True", "frozen=False"),
    ("exist_ok=True", "exist_ok=False"),
)
"""Changes that only a fault elsewhere would show, as with asserts."""
EQUIVALENT = Path(__file__).with_name("mutation_equivalent.json")
SLOWEST_S = 120
PLANNER = [
    "unit/planner/cost/test_memory",
    "unit/planner/cost/test_time",
    "unit/planner/test_run",
    "unit/planner/test_search",
    "unit/planner/cost/test_communication",
    "unit/planner/test_arithmetic",
]
TESTS = {
    "planner/cost/communication": PLANNER,
    "planner/cost/memory": PLANNER,
    "planner/cost/activations": PLANNER,
    "planner/cost/compute": PLANNER,
    "planner/cost/throughput": PLANNER,
    "planner/cost/matmul": PLANNER,
    "planner/layout": PLANNER,
    "planner/goodput": ["unit/planner/test_goodput", "unit/planner/test_arithmetic"],
    "planner/loss_law": ["unit/planner/test_growth_schedule"],
    "planner/growth_schedule": ["unit/planner/test_growth_schedule"],
    "optim/adamw": ["unit/optim/test_adamw", "unit/optim/test_by_entry"],
    "optim/by_entry": ["unit/optim/test_adamw", "unit/optim/test_by_entry"],
    "optim/learning_rate": ["unit/optim/test_learning_rate"],
    "optim/groups": ["unit/optim/test_build"],
    "optim/clipping": ["unit/optim/test_clipping"],
    "config/budget": ["unit/optim/test_learning_rate", "unit/config/test_history", "unit/config/rules/test_rules"],
    "config/history": ["unit/config/test_history", "unit/data/streams/test_history"],
    "config/rules/__init__": [
        "unit/config/rules/test_rules",
        "unit/config/test_loader",
        "unit/training/test_stability",
        "unit/config/rules/test_bounds",
    ],
    "config/rules/layout": ["unit/config/rules/test_rules", "unit/config/rules/test_bounds"],
    "config/rules/model": ["unit/config/rules/test_rules", "unit/config/rules/test_bounds"],
    "config/rules/schedule": [
        "unit/config/rules/test_rules",
        "unit/optim/test_learning_rate",
        "unit/config/rules/test_bounds",
    ],
    "config/rules/pipeline": [
        "unit/config/rules/test_pipeline",
        "unit/config/rules/test_rules",
        "unit/config/rules/test_bounds",
    ],
    "config/overrides": ["unit/config/test_loader"],
    "config/loader": ["unit/config/test_loader", "unit/config/test_presets"],
    "data/streams/blend": ["unit/data/streams/test_blend", "unit/data/streams/test_stream"],
    "data/streams/permutation": ["unit/data/streams/test_stream", "unit/data/streams/test_history"],
    "data/streams/stream": ["unit/data/streams/test_stream", "unit/data/streams/test_history"],
    "data/streams/mixture": ["unit/data/streams/test_history", "unit/data/streams/test_stream"],
    "data/streams/cuts": ["unit/data/streams/test_history"],
    "data/corpus/source_line": ["unit/data/streams/test_history", "unit/data/streams/test_stream"],
    "data/streams/loader": ["unit/data/streams/test_loader"],
    "data/conversations/packing": ["unit/data/conversations/test_samples"],
    "data/conversations/stream": ["unit/data/conversations/test_samples"],
    "checkpoint/regions": ["unit/checkpoint/torch_dist/test_format", "unit/checkpoint/sharding/test_layout"],
    "checkpoint/torch_dist/chunk_index": ["unit/checkpoint/torch_dist/test_format"],
    "checkpoint/sharding/layout": [
        "unit/checkpoint/sharding/test_layout",
        "unit/checkpoint/sharding/test_rank_regions",
    ],
    "checkpoint/logical": ["unit/checkpoint/torch_dist/test_format"],
    "checkpoint/torch_dist/logical_hash": ["unit/checkpoint/torch_dist/test_format"],
    "checkpoint/files/stored_array": [
        "unit/checkpoint/torch_dist/test_format",
        "unit/checkpoint/files/test_block_checksums",
    ],
    "checkpoint/files/block_checksums": ["unit/checkpoint/files/test_block_checksums"],
    "checkpoint/store": ["unit/checkpoint/test_store"],
    "checkpoint/files/manifest": ["unit/checkpoint/torch_dist/test_format", "unit/checkpoint/test_store"],
    "checkpoint/lazy/generator": ["unit/checkpoint/lazy/test_generator"],
    "checkpoint/files/in_order": ["unit/checkpoint/files/test_in_order"],
    "checkpoint/sharding/model_state": ["distributed/checkpoint/torch_dist/test_oracle"],
    "growth/grown/operators": [
        "unit/growth/grown/test_checkpoint",
        "unit/growth/test_plan",
        "unit/growth/test_preserves",
    ],
    "growth/grown/axes": ["unit/growth/grown/test_checkpoint", "unit/growth/test_plan", "unit/growth/test_preserves"],
    "growth/grown/checkpoint": [
        "unit/growth/grown/test_checkpoint",
        "unit/growth/test_preserves",
        "unit/optim/test_by_entry",
    ],
    "growth/plan": ["unit/growth/test_plan", "unit/growth/test_preserves"],
    "growth/layers": ["unit/growth/test_plan"],
    "growth/rules": ["unit/growth/test_plan"],
    "growth/grown/step_offsets": ["unit/growth/grown/test_checkpoint", "distributed/growth/test_training"],
    "growth/grown/folding": ["unit/checkpoint/hugging_face/test_masked_export"],
    "growth/schedule": ["unit/growth/test_plan"],
    "growth/boundary": ["unit/growth/test_plan", "unit/growth/test_manifest"],
    "growth/foreseen": ["unit/growth/test_plan", "unit/cli/test_config", "unit/data/conversations/test_samples"],
    "growth/text": ["unit/growth/test_text"],
    "growth/certificate/certificate": ["distributed/growth/test_engine"],
    "growth/distance": ["unit/growth/test_distance", "distributed/growth/test_engine"],
    "growth/certificate/forward": ["distributed/growth/test_engine"],
    "training/resume/continuation": ["unit/training/resume/test_continuation"],
    "training/resume/changes": ["unit/training/resume/test_continuation"],
    "training/spikes": ["unit/training/test_stability", "unit/training/test_spikes"],
}
"""Source files, below `flm_megatron/`, and their tests: unit tests, distributed ones where one process cannot tell."""


@dataclass(frozen=True)
class Mutant:
    """A changed line of a file."""

    file: str
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> list[str]:
        """What tells it from others, wherever its line stands."""
        return [self.file, self.before.strip(), self.after.strip()]


def mutants(file: str) -> Iterator[Mutant]:
    """All of cosmic-ray's mutants of a file that are not inside an annotation."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / "flm_megatron" / f"{file}.py").read_text()
    meaning = behaviour(source)
    for name in operator_names():
        if "Decorator" in name or "Variable" in name:  # without `dataclass` a module does not load; needs a name
            continue
        operator, occurrence = get_operator(name)(), 0
        while (changed := mutate_code(source, operator, occurrence)) is not None:
            occurrence += 1
            pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
            line, (before, after) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
            guard = after in {before.replace(name, other) for name, other in GUARDS}
            if not guard and behaviour(changed) not in (meaning, None):
                yield Mutant(file, line, before, after, changed)


def behaviour(source: str) -> str | None:
    """A module without its annotations, which are never evaluated, and its asserts, which are no behaviour; none where
    it is no Python."""
    try:
        return ast.dump(_Behaviour().visit(ast.parse(source)))
    except SyntaxError:
        return None


class _Behaviour(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        """An argument without its annotation."""
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A function without what it returns."""
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """A value without its annotation."""
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Nothing."""
        return ast.Pass()


def noticed(tree: Path, mutant: Mutant, tests: list[str]) -> bool:
    """Whether the tests fail on the mutant (a test without end fails too)."""
    path = tree / "flm_megatron" / f"{mutant.file}.py"
    original = path.read_text()
    path.write_text(mutant.source)
    try:
        return not passes(tree, tests)
    finally:
        path.write_text(original)


def passes(tree: Path, tests: list[str]) -> bool:
    """Run test files of the copied tree in a forked process."""
    child = os.fork()
    if child == 0:
        run_tests(tree, tests)
    deadline = time.monotonic() + SLOWEST_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run_tests(tree: Path, tests: list[str]) -> None:
    """In the child: never returns."""
    import pytest

    os.setpgid(0, 0)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.environ["PYTHONPATH"] = str(tree)  # for the processes that tests start
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *map(test_file, tests)])))


def test_file(name: str) -> str:
    """Where tests lie that are named by their path below `tests/`."""
    return f"tests/{name}.py"


def preload() -> None:
    """Load what is slow to import and not ours, once."""
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401
    import psutil  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.nn.functional  # noqa: F401
    import yaml  # noqa: F401


def survivors(tree: Path, file: str, tests: list[str], each: int, seed: int) -> tuple[int, list[Mutant]]:
    """How many mutants of a file were tried, and those that no test noticed."""
    found = sorted(mutants(file), key=lambda mutant: (mutant.line, mutant.after))
    drawn = random.Random(f"{seed}/{file}").sample(found, min(each, len(found)))
    return len(drawn), [mutant for mutant in drawn if not noticed(tree, mutant, tests)]


def again(tree: Path, file: Path) -> None:
    """Try the survivors of an earlier run once more, and say which are noticed by now."""
    wanted = [Mutant(**entry, source="") for entry in json.loads(file.read_text())]
    caught = 0
    for old in wanted:
        found = [mutant for mutant in mutants(old.file) if mutant.key == old.key]
        seen = bool(found) and noticed(tree, found[0], TESTS[old.file])
        caught += seen
        print(
            f"{'noticed' if seen else 'not noticed' if found else 'gone':12} {old.file}: {old.after.strip()}",
            flush=True,
        )
    print(f"{caught} of {len(wanted)} are noticed now")


def main() -> None:
    """Try the files, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=12, help="mutants of each file")
    parser.add_argument("--only", default="", help="files that begin with this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("survivors.json"), help="JSON file for the survivors")
    parser.add_argument("--again", type=Path, help="try the survivors in this file once more, and nothing else")
    options = parser.parse_args()
    equivalent = [entry["key"] for entry in json.loads(EQUIVALENT.read_text())] if EQUIVALENT.exists() else []
    preload()
    totals, left = [0, 0, 0], []
    print("| file | mutants | noticed | change nothing | not noticed |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        if options.again:
            return again(tree, options.again)
        for file, tests in TESTS.items():
            if not file.startswith(options.only):
                continue
            if not passes(tree, tests):
                raise SystemExit(f"the tests of {file} fail without a mutant")
            tried, alive = survivors(tree, file, tests, options.each, options.seed)
            same = [mutant for mutant in alive if mutant.key in equivalent]
            left += [mutant for mutant in alive if mutant not in same]
            row = (tried, tried - len(alive), len(same))
            totals = [total + value for total, value in zip(totals, row, strict=True)]
            print(f"| {file} | {tried} | {row[1]} | {row[2]} | {tried - row[1] - row[2]} |", flush=True)
            kept = [{name: value for name, value in asdict(m).items() if name != "source"} for m in left]
            options.out.write_text(json.dumps(kept, indent=1))
    tried, caught, same_count = totals
    share = 100 * caught / max(1, tried - same_count)
    print(f"\n{tried} mutants, {same_count} of them change nothing; {caught} noticed: {share:.1f} % of the others")


if __name__ == "__main__":
    main()
