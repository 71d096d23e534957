"""A stack machine for pickles that makes data and nothing else: no name is looked up, nothing is called or set.

Python's own unpicklers give a pickle live classes, whose attributes it may set (BUILD) or call (REDUCE), and memory
of any size (PUT 2^31). Here a name is a `Name` and an object a `Record` of what was said about it. Opcodes of protocols
0 and 1, which torch never writes, and extensions are refused.
"""

from __future__ import annotations

import pickle
import struct

from flm_megatron.checkpoint.files.pickle.opcodes import HANDLERS, U16, U32, PickleState, Policy
from flm_megatron.checkpoint.files.pickle.records import PickleError

MEMOIZE, LONG_BINGET, BINGET = pickle.MEMOIZE[0], pickle.LONG_BINGET[0], pickle.BINGET[0]
BININT1, BININT2, STOP = pickle.BININT1[0], pickle.BININT2[0], pickle.STOP[0]


def run_pickle(data: bytes, policy: Policy) -> object:
    """What a pickle says: plain data, `Name`s and `Record`s. `policy(module, name)` may raise on a name.

    Raises PickleError.
    """
    try:
        return _run(PickleState(data, policy))
    except (IndexError, struct.error):
        raise PickleError("it ends too early, or takes what it did not put") from None


def _run(state: PickleState) -> object:
    """Five opcodes make up half of a checkpoint's metadata (17 million opcodes at 245,000 regions): they stand here."""
    data, stack, memo, position = state.data, state.stack, state.memo, 0
    push, remember = stack.append, memo.append
    while True:
        opcode = data[position]
        position += 1
        if opcode == MEMOIZE:
            remember(stack[-1])
        elif opcode == LONG_BINGET:
            push(memo[U32(data, position)[0]])
            position += 4
        elif opcode == BINGET:
            push(memo[data[position]])
            position += 1
        elif opcode == BININT1:
            push(data[position])
            position += 1
        elif opcode == BININT2:
            push(U16(data, position)[0])
            position += 2
        elif opcode == STOP:
            if state.marks or len(stack) != 1:
                raise PickleError("it stops in the middle of an object")
            return stack[0]
        else:
            handler = HANDLERS.get(opcode)
            if handler is None:
                raise PickleError(f"opcode {opcode:#04x} at byte {position - 1} has no use in a checkpoint")
            position = handler(state, position)
