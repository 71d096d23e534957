"""Bytes on their way, counted by hand in small pieces of machine code."""

from __future__ import annotations

from benchmarks.kernels.in_flight import bytes_in_flight, widest_load


def assembly(*lines: str) -> str:
    """As nvdisasm prints it: labels at the margin, instructions behind their addresses."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{index * 16:04x}*/                   {line} ;"
        for index, line in enumerate(lines)
    )


def test_loads_are_on_their_way_until_they_are_used() -> None:
    code = assembly(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P0 LDG.E.64 R8, desc[UR4][R2.64+0x10]",
        "FADD R12, R4, R4",  # the first has come, the second is on its way
        "LDG.E R10, desc[UR4][R2.64+0x20]",
        "FADD R12, R8, R10",
    )
    assert bytes_in_flight(code) == 24
    assert widest_load(code) == 16


def test_an_address_that_was_loaded_is_waited_for() -> None:
    code = assembly("LDG.E.64 R2, desc[UR4][R6.64]", "LDG.E.U16 R4, desc[UR4][R2.64]", "FADD R5, R4, R4")
    assert bytes_in_flight(code) == 8


def test_loads_come_in_order() -> None:
    code = assembly(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "LDG.E.128 R8, desc[UR4][R2.64]",
        "FADD R12, R8, R9",  # both have come
        "LDG.E.128 R16, desc[UR4][R2.64]",
        "FADD R12, R4, R16",
    )
    assert bytes_in_flight(code) == 32


def test_a_loop_counts_by_itself_and_with_what_it_loads_for_its_next_turn() -> None:
    code = assembly(
        "LDG.E.128 R20, desc[UR4][R2.64]",
        "LDG.E.128 R24, desc[UR4][R2.64]",
        "LDG.E.128 R28, desc[UR4][R2.64]",
        ".L_x_1:",
        "LDG.E.64 R8, desc[UR4][R2.64]",
        "FADD R12, R10, R11",  # what the turn before has loaded
        "LDG.E.64 R10, desc[UR4][R2.64]",
        "FADD R12, R8, R9",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
        ".L_x_2:",
        "BRA `(.L_x_2)",
    )
    assert bytes_in_flight(code) == 16
    assert bytes_in_flight(code.replace("@P0 BRA `(.L_x_1)", "EXIT")) == 64
