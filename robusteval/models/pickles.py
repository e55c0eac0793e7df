"""What a pickle of PyTorch asks for, found without building or calling anything.

torch follows only some instructions where weights alone are asked for, and calls only some names.
Of these, what is let through here is what the state dict of a network and of an optimiser needs:
every name that is called is in a table, with what it may be given. The rest either fills the memory
(``bytearray(2**34)``), reaches out of a tensor's bytes, or takes a time that grows with the square.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.serialization import StorageType

from robusteval.errors import Refused, UsageError
from robusteval.models.built import escape
from robusteval.models.bystanders import BYSTANDERS
from robusteval.runs.reading import check_amount, raise_limit

MOST_INSTRUCTIONS = 1_000_000  # in a pickle; seconds to walk
MOST_TENSORS = 25_000  # the largest networks have some thousand
MOST_ODD_KEYS = 1000  # of dicts and sets: they can be chosen to have one hash
CODECS = ("latin1", "latin-1", "utf-8")
SMALL = 2**60  # whole numbers below have each a hash of their own

# opcode: values taken from the stack, whether one is put there
_STACK = {
    "NONE": (0, True),
    "EMPTY_SET": (0, True),
    "NEWTRUE": (0, True),
    "NEWFALSE": (0, True),
    "PROTO": (0, False),
    "STOP": (0, False),
}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TENSORS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}
_PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
}
_TYPED = "torch._tensor._rebuild_from_type_v2"  # calls its first argument
_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_DICTS = {"dict", "collections.OrderedDict", "collections.Counter"}
_PLAIN = {
    *("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex"),
    *("builtins.bytearray", "_codecs.encode", "torch.Size", "torch.device"),
    "torch.serialization._get_layout",
}
_CALLED = _TENSORS | _PARAMETERS | {_TYPED} | _PLAIN


class Name(NamedTuple):
    """What a pickle asks to import: module and name, with a dot between."""

    text: str


class Made(NamedTuple):
    """What a call gave, by the name of what was called."""

    text: str


IGNORED = Made("nothing")  # stands for a bystander


class Storage(NamedTuple):
    """Numbers that a pickle asks for: their key in the file, how many, bytes of each."""

    key: str
    numbers: int
    width: int


def check_pickle(raw: bytes | bytearray, skip: int, file: str) -> list[Storage]:
    """The storages that the pickle behind `skip` others asks for; nothing is imported or called.

    Raises
    ------
    UsageError
        The pickle is damaged.
    Refused
        It holds tensors that reach out of their storages, calls that do nothing but take memory,
        or more instructions than a state dict needs.
    """
    stream = io.BytesIO(raw)
    try:
        for _ in range(skip):
            for _instruction in limit_length(pickletools.genops(stream), file):
                pass
        return _Walk(file).list_storages(pickletools.genops(stream))
    except Refused:
        raise
    except Exception:  # pickletools raises whatever the bytes lead it into, and so do stacks
        raise build_damage(file) from None


def limit_length(
    instructions: Iterable[tuple[Any, Any, Any]], file: str
) -> Iterator[tuple[Any, Any, Any]]:
    """The instructions of a pickle; Refused if there are more than a state dict needs."""
    most = raise_limit(MOST_INSTRUCTIONS)
    for number, instruction in enumerate(instructions):
        if number > most:
            subject = f"{file} was not opened, as no state dict is that long: its pickle"
            check_amount(subject, number, MOST_INSTRUCTIONS, "instructions", Refused)
        yield instruction


class _UnknownError(ValueError):
    """An instruction that torch does not follow when only weights are asked for."""


class _Rules:
    """What a pickle may name and call, and how often."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.odd_keys = self.tensors = 0

    def read_name(self, argument: str) -> Name:
        """What is to be imported; refused unless a state dict needs it."""
        text = argument.replace(" ", ".")
        text = f"builtins.{text[12:]}" if text.startswith("__builtin__.") else text
        module, _, short = text.rpartition(".")
        known = text in _CALLED or text in _TYPES or text in BYSTANDERS
        if module in ("torch", "torch.storage", "torch.cuda"):
            kind = getattr(torch, short, None)
            known = known or short.endswith("Storage") or isinstance(kind, torch.dtype)
        if not known:
            raise build_code_refusal(self.file, escape(text))
        return Name(text)

    def check_call(self, called: Any, given: Any) -> Made:
        """What a call gives; refused unless it is one that a state dict needs."""
        text = called.text if isinstance(called, Name) else ""
        if text in BYSTANDERS and isinstance(given, tuple):
            return IGNORED
        if text not in _CALLED or not isinstance(given, tuple):
            raise self.build_call_refusal(text or "what is no name")
        if text == _TYPED:
            function, kind, arguments, *_ = given
            if getattr(function, "text", "") not in _TENSORS or kind.text not in _TYPES:
                raise self.build_call_refusal(text)
            return self.check_call(function, arguments)
        if text in _TENSORS:
            if not isinstance(given[0], Storage):
                raise self.build_call_refusal(text)
            self.tensors += 1
            subject = f"{self.file} was not opened, as no network needs so many: it"
            check_amount(subject, self.tensors, MOST_TENSORS, "tensors", Refused)
            self._check_bounds(*given)
            return Made("torch.Tensor")
        if text in _PARAMETERS:
            if given[0] != Made("torch.Tensor"):
                raise self.build_call_refusal(text)
            return Made("torch.Tensor")
        if not self._is_plain_call(text, given):
            raise self.build_call_refusal(text)
        return Made(text)

    def _is_plain_call(self, text: str, given: Sequence[Any]) -> bool:
        """Whether a plain type is given what it is kept with."""
        if text in ("collections.OrderedDict", "collections.Counter", "builtins.set"):
            items = given[0] if given else []
            if isinstance(items, list):
                pairs = text == "collections.OrderedDict"  # as Python 2 wrote them
                self.check_keys([key for key, _ in items] if pairs else items)
                return len(given) < 2
            return len(given) < 2 and isinstance(items, Made) and items.text in _DICTS
        if text == "builtins.bytearray":
            return all(isinstance(g, str | bytes) or g == Made("_codecs.encode") for g in given)
        if text == "_codecs.encode":
            return len(given) == 2 and type(given[0]) is str and given[1] in CODECS
        if text == "torch.Size":
            return len(given) == 1 and isinstance(given[0], tuple)
        return all(isinstance(each, str | int | float) for each in given)

    def _check_bounds(
        self, storage: Storage, offset: int, shape: Any, strides: Any, *rest: Any
    ) -> None:
        """Refuse a tensor that reaches out of its storage: torch would enlarge the storage."""
        named = [each.text.removeprefix("torch.") for each in rest if isinstance(each, Name)]
        kinds = [kind for name in named if isinstance(kind := getattr(torch, name, 0), torch.dtype)]
        width = kinds[0].itemsize if kinds else storage.width
        reach = 0
        if math.prod(shape):
            reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(offset, *shape, *strides, 0) < 0 or (
            reach * width > storage.numbers * storage.width
        ):
            raise build_refusal(self.file, "a tensor is larger than its storage")

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Refuse keys that make a dict slow, or that are nested and end the process."""
        for key in keys:
            kind = type(key)
            if kind is str or kind is bytes or (kind is int and abs(key) < SMALL):
                continue
            self.odd_keys += 1
            parts = key if kind is tuple else (key,)
            flat = all(type(p) in (str, bytes, int, float, type(None)) for p in parts)
            if not flat or self.odd_keys > raise_limit(MOST_ODD_KEYS):
                raise build_refusal(self.file, "the keys of a dict are no names")

    def build_call_refusal(self, text: str) -> Refused:
        """What is raised on a call that a state dict does not need."""
        return Refused(
            f"{self.file} was not opened: it calls {escape(text)} as no state dict of plain"
            f" tensors needs it. {ADVICE}"
        )


class _Walk:
    """Follows a pickle's stack without building what it describes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.rules = _Rules(file)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Storage] = []

    def list_storages(self, instructions: Iterable[tuple[Any, Any, Any]]) -> list[Storage]:
        try:
            for opcode, argument, _ in limit_length(instructions, self.file):
                self._follow(opcode.name, argument)
        except _UnknownError:  # torch stops here too, and says why
            pass
        return self.storages

    def _follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _STACK:
            pops, pushes = _STACK[name]
            self._take(pops)
            if pushes:
                stack.append(None)
        elif name in _VALUES:
            stack.append(argument)
        elif name in _TUPLES:
            stack.append(self._take(_TUPLES[name]))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            taken = self._take(len(stack) - self.marks.pop())
            self._put(name, taken)
        elif name in ("APPEND", "SETITEM"):
            self._put(f"{name}S", self._take(1 if name == "APPEND" else 2))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append(Made("dict"))
        elif name == "GLOBAL":
            stack.append(self.rules.read_name(argument))
        elif name in ("REDUCE", "NEWOBJ"):
            called, given = self._take(2)
            stack.append(self.rules.check_call(called, given))
        elif name == "BUILD":
            (given,) = self._take(1)
            attributes = stack[-1] == Made("collections.OrderedDict") and given == Made("dict")
            if not attributes and stack[-1] is not IGNORED:
                raise self.rules.build_call_refusal("something other than a dict with attributes")
        elif name == "BINPERSID":
            (asked,) = self._take(1)
            # torch also takes bytes that spell the word, which are not followed here
            if not isinstance(asked, tuple) or asked[:1] != ("storage",):
                raise build_refusal(self.file, "it asks for something other than a storage")
            stack.append(self._read_storage(*asked[1:]))
        else:
            raise _UnknownError

    def _put(self, name: str, taken: tuple[Any, ...]) -> None:
        """What was taken from the stack, into what is then uppermost or as a tuple."""
        if name == "TUPLE":
            self.stack.append(taken)
        elif name == "SETITEMS":
            self.rules.check_keys(taken[::2])
        elif isinstance(self.stack[-1], list):
            self.stack[-1].extend(taken)

    def _take(self, count: int) -> tuple[Any, ...]:
        """The uppermost values, which leave the stack; of a mark's own only."""
        bottom = len(self.stack) - count
        if bottom < (self.marks[-1] if self.marks else 0):
            raise IndexError("the stack is empty")
        taken = tuple(self.stack[bottom:])
        del self.stack[bottom:]
        return taken

    def _read_storage(self, kind: Name, key: str, _where: str, count: int, *_: Any) -> Storage:
        short = kind.text.rpartition(".")[2]
        typed = None if short == "UntypedStorage" else StorageType(short).dtype  # type: ignore[no-untyped-call]
        width = typed.itemsize if typed else 1
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError(key)
        self.storages.append(Storage(key, count, width))
        return self.storages[-1]


def build_damage(file: str) -> UsageError:
    """What is raised on a file that is not whole."""
    return UsageError(f"{file} is truncated or damaged; download or copy it again")


def build_refusal(file: str, why: str) -> Refused:
    """What is raised on a file that torch would not have written."""
    return Refused(
        f"{file} was not opened: {why}, which torch.save never writes and which can hide what is "
        f"inside. {ADVICE}"
    )


def build_code_refusal(file: str, wanted: str) -> Refused:
    """What is raised on a file that could run code."""
    return Refused(
        f"{file} was not opened, because that could run code: it needs {wanted}. {ADVICE}"
    )


ADVICE = (
    "If you trust it, load it yourself and save its tensors alone: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)
