"""What `import flm_megatron` offers: every name is there, loaded when it is used, typed, and nothing else is."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typing_extensions import assert_type

import flm_megatron as flm
from flm_megatron.config import schema

FUNCTIONS = sorted(name for name in flm.__all__ if name[0].islower())


if TYPE_CHECKING:  # for mypy, which `make lint` runs over the tests

    def types_of_results(run: flm.RunConfig, checkpoint: flm.LogicalCheckpoint) -> None:
        """What type checkers take results for."""
        assert_type(flm.load_run("run.yaml", {"seed": 1}), flm.RunConfig)
        assert_type(flm.plan(run, gpu="h100", gpus=8).total, flm.Cost)
        assert_type(flm.search_layouts(run, gpu="h100", gpus=8), dict[str, flm.SearchResult])
        assert_type(flm.grow(checkpoint, run, "big", "out").plan, flm.GrowthPlan)
        assert_type(flm.train(run), int)


@pytest.mark.parametrize("name", flm.__all__)
def test_every_public_name_is_there_and_the_same_each_time(name: str) -> None:
    assert getattr(flm, name) is getattr(flm, name)
    assert name in dir(flm)


def test_names_are_those_that_type_checkers_see() -> None:
    source = Path(str(flm.__file__)).read_text(encoding="utf-8")
    hidden = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = [node for node in hidden.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert {*seen, "__version__"} == set(flm.__all__)
    assert seen == {name: f"flm_megatron.{module}" for name, module in flm._MODULE_OF.items()}


def test_every_section_of_the_run_file_is_public() -> None:
    assert set(schema.__all__) <= set(flm.__all__)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        flm.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="nothing"):
        from flm_megatron import nothing  # type: ignore[attr-defined]  # noqa: F401


def test_modules_of_the_package_are_still_imported_by_name() -> None:
    from flm_megatron import kernels

    assert inspect.ismodule(kernels)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_give_and_raise(name: str) -> None:
    signature = inspect.signature(getattr(flm, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    assert "Raises:" in inspect.getdoc(getattr(flm, name))  # type: ignore[operator]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_a_default_is_given_by_name(name: str) -> None:
    parameters = inspect.signature(getattr(flm, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is not p.empty]
    assert positional == (["overrides"] if name == "load_run" else [])


def test_loading_a_run_and_planning_it_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "stages: [{name: a, tokens: 1e6, model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 96, "
        "num_attention_heads: 4, vocab_size: 500}}]"
    )
    code = "import sys, flm_megatron as flm; flm.plan(flm.load_run('run.yaml'), gpu='h100', gpus=1); "
    code += "assert 'yaml' in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
