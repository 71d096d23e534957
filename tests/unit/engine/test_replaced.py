"""Operations put into a module of the engine, and its own back for a while."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from flm_megatron.engine import replaced


@pytest.fixture
def module() -> Iterator[ModuleType]:
    """A module with one name, forgotten afterwards."""
    made = ModuleType("made")
    made.there = "theirs"  # type: ignore[attr-defined]
    yield made
    for key in [key for key in replaced._shipped if key[0] is made]:
        del replaced._shipped[key]


def test_names_are_replaced_and_come_back_while_a_block_runs(module: ModuleType) -> None:
    replaced.replace(module, there="ours", added="ours")
    replaced.replace(module, there="ours again")
    assert (module.there, module.added) == ("ours again", "ours")
    with pytest.raises(KeyError), replaced.as_shipped():
        assert module.there == "theirs" and not hasattr(module, "added")
        raise KeyError
    assert (module.there, module.added) == ("ours again", "ours")


def test_what_is_replaced_inside_the_block_does_not_stay(module: ModuleType) -> None:
    replaced.replace(module, there="ours")
    with replaced.as_shipped():
        replaced.replace(module, there="other")
    assert module.there == "ours"
