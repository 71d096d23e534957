"""What each opcode of a pickle does here: put data on a stack, or build data from its top, and no more."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable

from flm_megatron.checkpoint.files.pickle.records import STORAGE, Name, PickleError, Record, hashable

LONGEST_INTEGER = 1024  # bytes
PROTOCOL = 5
Policy = Callable[[str, str], None]
Handler = Callable[["PickleState", int], int]
"""Does one opcode whose operand begins at a position of the data; returns the position after it."""

U16 = struct.Struct("<H").unpack_from
U32 = struct.Struct("<I").unpack_from
_I32 = struct.Struct("<i").unpack_from
_F64 = struct.Struct(">d").unpack_from


class PickleState:
    """A pickle being read: its data, the stack, the places of marks in it, what was remembered."""

    def __init__(self, data: bytes, policy: Policy) -> None:
        self.data, self.policy = data, policy
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []

    def take(self, position: int, size: int) -> bytes:
        """The next `size` bytes."""
        found = self.data[position : position + size]
        if len(found) != size:
            raise PickleError(f"{size} bytes are announced at byte {position}, {len(found)} follow")
        return found

    def marked(self) -> list[object]:
        """What was pushed after the last mark, taken off the stack."""
        start = self.marks.pop()
        if start > len(self.stack):
            raise PickleError("it takes more than it put after a mark")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def name(self, module: object, name: object) -> None:
        """Push a global, unless the policy raises on it."""
        if type(module) is not str or type(name) is not str:
            raise PickleError("a name is not text")
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 says it
        self.policy(module, name)
        self.stack.append(Name(f"{module}.{name}"))

    def make(self, maker: object, arguments: object) -> None:
        """Push the record of an object."""
        if type(maker) is not Name or type(arguments) is not tuple:
            raise PickleError("it makes an object of something that is not a name")
        self.stack.append(Record(maker.path, arguments))


def _frame(state: PickleState, position: int) -> int:
    return position + 8


def _protocol(state: PickleState, position: int) -> int:
    if state.data[position] > PROTOCOL:
        raise PickleError(f"protocol {state.data[position]} is not known")
    return position + 1


def _mark(state: PickleState, position: int) -> int:
    state.marks.append(len(state.stack))
    return position


def _pop(state: PickleState, position: int) -> int:
    if state.marks and state.marks[-1] == len(state.stack):
        state.marks.pop()
    else:
        state.stack.pop()
    return position


def _pop_mark(state: PickleState, position: int) -> int:
    state.marked()
    return position


def _duplicate(state: PickleState, position: int) -> int:
    state.stack.append(state.stack[-1])
    return position


def _put(state: PickleState, place: int) -> None:
    """Remember the top of the stack. Picklers number what they remember from 0 on; another number is refused."""
    if place < len(state.memo):
        state.memo[place] = state.stack[-1]
    elif place == len(state.memo):
        state.memo.append(state.stack[-1])
    else:
        raise PickleError(f"it remembers an object as number {place} after {len(state.memo)} others")


def _short_put(state: PickleState, position: int) -> int:
    _put(state, state.data[position])
    return position + 1


def _long_put(state: PickleState, position: int) -> int:
    _put(state, U32(state.data, position)[0])
    return position + 4


def _constant(value: object) -> Handler:
    def handler(state: PickleState, position: int) -> int:
        """Push the value."""
        state.stack.append(value)
        return position

    return handler


def _new(kind: type) -> Handler:
    def handler(state: PickleState, position: int) -> int:
        """Push an empty container."""
        state.stack.append(kind())
        return position

    return handler


def _integer(state: PickleState, position: int) -> int:
    state.stack.append(_I32(state.data, position)[0])
    return position + 4


def _float(state: PickleState, position: int) -> int:
    state.stack.append(_F64(state.data, position)[0])
    return position + 8


def _long(state: PickleState, position: int, size: int) -> int:
    if size > LONGEST_INTEGER:
        raise PickleError(f"an integer of {size} bytes")
    state.stack.append(int.from_bytes(state.take(position, size), "little", signed=True))
    return position + size


def _long1(state: PickleState, position: int) -> int:
    return _long(state, position + 1, state.data[position])


def _long4(state: PickleState, position: int) -> int:
    return _long(state, position + 4, U32(state.data, position)[0])


def _sized(width: int, decode: Callable[[bytes], object]) -> Handler:
    """Text or bytes behind a length of `width` bytes."""

    def handler(state: PickleState, position: int) -> int:
        """Push what it says."""
        size = int.from_bytes(state.take(position, width), "little")
        state.stack.append(decode(state.take(position + width, size)))
        return position + width + size

    return handler


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old_text(data: bytes) -> str:
    return data.decode("ascii")


def _tuple_of(size: int) -> Handler:
    def handler(state: PickleState, position: int) -> int:
        """Make a tuple of the top of the stack."""
        stack = state.stack
        if len(stack) < size:
            raise PickleError("it takes more than it put")
        stack[-size:] = [tuple(stack[-size:])]
        return position

    return handler


def _tuple(state: PickleState, position: int) -> int:
    state.stack.append(tuple(state.marked()))
    return position


def _list(state: PickleState, position: int) -> int:
    state.stack.append(state.marked())
    return position


def _frozen_set(state: PickleState, position: int) -> int:
    state.stack.append(frozenset(map(hashable, state.marked())))
    return position


def _dictionary(state: PickleState, position: int) -> int:
    items = state.marked()
    state.stack.append({})
    _set_all(state, items)
    return position


def _set_item(state: PickleState, position: int) -> int:
    value, key = state.stack.pop(), state.stack.pop()
    _set_all(state, [key, value])
    return position


def _set_items(state: PickleState, position: int) -> int:
    _set_all(state, state.marked())
    return position


def _set_all(state: PickleState, items: list[object]) -> None:
    """Put keys and values, by turns, into the mapping at the top of the stack."""
    target = state.stack[-1]
    if len(items) % 2:
        raise PickleError("a key has no value")
    pairs = zip(items[::2], items[1::2], strict=True)
    if type(target) is dict:
        for key, value in pairs:
            target[key if type(key) is str else hashable(key)] = value
    elif type(target) is Record:
        target.items.extend(pairs)
    else:
        raise PickleError("it puts keys into something that is no mapping")


def _append(state: PickleState, position: int) -> int:
    _extend(state, [state.stack.pop()])
    return position


def _appends(state: PickleState, position: int) -> int:
    _extend(state, state.marked())
    return position


def _extend(state: PickleState, items: list[object]) -> None:
    target = state.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is Record:
        target.items.extend(items)
    else:
        raise PickleError("it appends to something that is no list")


def _add_items(state: PickleState, position: int) -> int:
    items, target = state.marked(), state.stack[-1]
    if type(target) is not set:
        raise PickleError("it adds to something that is no set")
    target.update(map(hashable, items))
    return position


def _global(state: PickleState, position: int) -> int:
    middle = state.data.index(b"\n", position)
    end = state.data.index(b"\n", middle + 1)
    state.name(_text(state.data[position:middle]), _text(state.data[middle + 1 : end]))
    return end + 1


def _stack_global(state: PickleState, position: int) -> int:
    name, module = state.stack.pop(), state.stack.pop()
    state.name(module, name)
    return position


def _make(state: PickleState, position: int) -> int:
    arguments, maker = state.stack.pop(), state.stack.pop()
    state.make(maker, arguments)
    return position


def _make_with_keywords(state: PickleState, position: int) -> int:
    keywords, arguments, maker = state.stack.pop(), state.stack.pop(), state.stack.pop()
    if keywords != {}:
        raise PickleError("an object made with keywords")
    state.make(maker, arguments)
    return position


def _build(state: PickleState, position: int) -> int:
    fields, target = state.stack.pop(), state.stack[-1]
    if type(target) is not Record or target.state is not None:
        raise PickleError("it gives a state to something that has none or has one already")
    target.state = fields
    return position


def _persistent(state: PickleState, position: int) -> int:
    state.stack.append(Record(STORAGE, (state.stack.pop(),)))
    return position


HANDLERS: dict[int, Handler] = {
    code[0]: handler
    for code, handler in (
        (pickle.PROTO, _protocol),
        (pickle.FRAME, _frame),
        (pickle.MARK, _mark),
        (pickle.POP, _pop),
        (pickle.POP_MARK, _pop_mark),
        (pickle.DUP, _duplicate),
        (pickle.BINPUT, _short_put),
        (pickle.LONG_BINPUT, _long_put),
        (pickle.NONE, _constant(None)),
        (pickle.NEWTRUE, _constant(True)),
        (pickle.NEWFALSE, _constant(False)),
        (pickle.BININT, _integer),
        (pickle.LONG1, _long1),
        (pickle.LONG4, _long4),
        (pickle.BINFLOAT, _float),
        (pickle.SHORT_BINUNICODE, _sized(1, _text)),
        (pickle.BINUNICODE, _sized(4, _text)),
        (pickle.BINUNICODE8, _sized(8, _text)),
        (pickle.SHORT_BINBYTES, _sized(1, bytes)),
        (pickle.BINBYTES, _sized(4, bytes)),
        (pickle.BINBYTES8, _sized(8, bytes)),
        (pickle.BYTEARRAY8, _sized(8, bytes)),
        (pickle.SHORT_BINSTRING, _sized(1, _old_text)),
        (pickle.BINSTRING, _sized(4, _old_text)),
        (pickle.EMPTY_TUPLE, _constant(())),
        (pickle.TUPLE1, _tuple_of(1)),
        (pickle.TUPLE2, _tuple_of(2)),
        (pickle.TUPLE3, _tuple_of(3)),
        (pickle.TUPLE, _tuple),
        (pickle.EMPTY_LIST, _new(list)),
        (pickle.LIST, _list),
        (pickle.APPEND, _append),
        (pickle.APPENDS, _appends),
        (pickle.EMPTY_DICT, _new(dict)),
        (pickle.DICT, _dictionary),
        (pickle.SETITEM, _set_item),
        (pickle.SETITEMS, _set_items),
        (pickle.EMPTY_SET, _new(set)),
        (pickle.ADDITEMS, _add_items),
        (pickle.FROZENSET, _frozen_set),
        (pickle.GLOBAL, _global),
        (pickle.STACK_GLOBAL, _stack_global),
        (pickle.REDUCE, _make),
        (pickle.NEWOBJ, _make),
        (pickle.NEWOBJ_EX, _make_with_keywords),
        (pickle.BUILD, _build),
        (pickle.BINPERSID, _persistent),
    )
}
