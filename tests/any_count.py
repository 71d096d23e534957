"""How many annotations of the program contain `Any`, and how many there may be: `python -m tests.any_count`.

`make lint` runs it. A library that gives no type is the one reason for `Any`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "flm_megatron"
LIMIT = 60


def all_annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """What is said of arguments, results, variables and fields, and what an alias stands for."""
    for node in ast.walk(tree):
        found = getattr(node, "returns", None) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
        if isinstance(node, ast.arg | ast.AnnAssign):
            found = node.annotation
        if isinstance(node, ast.Assign):
            found = node.value
        if found is not None:
            yield found


def contains_any(annotation: ast.expr) -> bool:
    """Whether `Any` stands anywhere in it."""
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation))


def main() -> int:
    """Print the count; the exit status is 1 if it is over the limit."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    found = [(path, annotation) for path, tree in trees.items() for annotation in all_annotations(tree)]
    wide = [(path, annotation) for path, annotation in found if contains_any(annotation)]
    print(f"annotations with Any: {len(wide)} of {len(found):,} (at most {LIMIT})")
    if len(wide) <= LIMIT:
        return 0
    for path, annotation in wide:
        print(f"{path.relative_to(SOURCE.parent)}:{annotation.lineno}: {ast.unparse(annotation)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
