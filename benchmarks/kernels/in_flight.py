"""How many bytes a thread has on their way from memory at a time, read off the machine code of an NVIDIA GPU.

Instructions are issued in order. A load is on its way until an instruction names the register that it fills; loads
return in order, so that this one and all before it have then arrived. In a kernel with loops the innermost loop that
loads most bytes counts, taken twice in a row (what it loads for its next turn is on its way then too); in one without,
all of it. Loads count wherever they are served from, so that weights and masks, which caches hold, count as well.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LABEL = re.compile(r"(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)\s*(.*?)\s*;")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes of a load by the suffix of its name; 4 without one."""


class Instruction(NamedTuple):
    """Its name with all suffixes, and its operands as they are written."""

    name: str
    operands: str

    def loaded_bytes(self) -> int:
        """Bytes that each thread loads from global memory with it."""
        if not self.name.startswith("LDG"):
            return 0
        return next((WIDTHS[suffix] for suffix in self.name.split(".") if suffix in WIDTHS), 4)

    def registers(self) -> list[int]:
        """Numbers of the registers it names, in order."""
        return [int(number) for number in re.findall(r"\bR(\d+)", self.operands)]


def bytes_in_flight(assembly: str) -> int:
    """Most bytes that a thread of the kernel has on their way at a time; `assembly` is what `nvdisasm -c` prints."""
    instructions, labels = _parse(assembly)
    bodies = [instructions[first:end] for first, end in _innermost_loops(instructions, labels)]
    loads, body = max(((_loaded(body), body) for body in bodies), key=lambda pair: pair[0], default=(0, []))
    return _most_on_their_way(body + body if loads else instructions)


def widest_load(assembly: str) -> int:
    """Bytes of the widest load from global memory of a thread."""
    return max(instruction.loaded_bytes() for instruction in _parse(assembly)[0])


def _parse(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and which of them each label stands before."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(Instruction(found[1], found[2]))
    return instructions, labels


def _innermost_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and one past the last instruction of each loop that holds no other, from branches backwards.

    The endless loop behind the end of every kernel, a branch to itself, is none.
    """
    loops = []
    for at, instruction in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", instruction.operands) if instruction.name.startswith("BRA") else None
        if target and labels[target[0]] < at:
            loops.append((labels[target[0]], at + 1))
    return [
        outer
        for outer in loops
        if not any(inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1] for inner in loops)
    ]


def _loaded(instructions: list[Instruction]) -> int:
    return sum(instruction.loaded_bytes() for instruction in instructions)


def _most_on_their_way(instructions: list[Instruction]) -> int:
    on_their_way: list[tuple[range, int]] = []
    most = 0
    for instruction in instructions:
        loaded = instruction.loaded_bytes()
        registers = instruction.registers()
        awaited = registers[1:] if loaded else registers
        for index in reversed(range(len(on_their_way))):
            if any(register in on_their_way[index][0] for register in awaited):
                del on_their_way[: index + 1]
                break
        if loaded:
            on_their_way.append((range(registers[0], registers[0] + max(loaded // 4, 1)), loaded))
            most = max(most, sum(size for _, size in on_their_way))
    return most
