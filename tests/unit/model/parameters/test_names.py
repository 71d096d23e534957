"""Names of parameters stand in the table alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import flm_megatron
from flm_megatron.config.schema import ModelConfig
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.model.parameters.names import layer_number, logical_name, module_names

SOURCE = Path(flm_megatron.__file__).parent
TABLE = SOURCE / "model" / "parameters"
NAMES = re.compile(
    r"\bdecoder\.|\b(word_embeddings|position_embeddings|output_layer)\.|\blinear_(qkv|proj|fc1|fc2)\b|\blayer_norm_(weight|bias)\b"
)


def strings(path: Path) -> Iterator[str]:
    """String constants of a source file that are not documentation."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_nothing_but_the_table_spells_names_of_parameters() -> None:
    others = (path for path in SOURCE.rglob("*.py") if TABLE not in path.parents)
    found = {str(path.relative_to(SOURCE)): s for path in others for s in strings(path) if NAMES.search(s)}
    assert not found


def test_names_in_a_module_tree_are_those_of_the_table() -> None:
    specs = parameter_specs(ModelConfig(vocab_size=64, normalization="layernorm", bias=True))
    for name, spec in specs.items():
        layer = 11 if spec.stacked else None
        for wrapped in (f"module.module.{module_name}" for module_name in module_names(spec, layer)):
            assert logical_name(wrapped, specs) == name
            assert layer_number(wrapped) == layer
