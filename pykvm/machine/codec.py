"""Records to JSON values and back, the way back trusting nothing.

A decoder takes a JSON value and the path that led to it (``state.registers.rax``) and returns the checked
value.  Whatever is odd (type, range, length, a missing or unknown key) raises UsageError with that path, so
a stream from the network can be decoded as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import IntFlag
from typing import Any, TypeVar

from pykvm.errors import UsageError

T = TypeVar("T")
Decoder = Callable[[object, str], T]


def encode(value: object) -> Any:
    """A dataclass as a dict, bytes as hexadecimal, tuples as lists, flags as integers, the rest as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, IntFlag):
        return int(value)
    return value


def unsigned(bits: int, most: int | None = None) -> Decoder[int]:
    """An integer from 0 to ``most``, by default all that ``bits`` bits hold; booleans are not integers."""
    limit = (1 << bits) - 1 if most is None else most

    def decode(value: object, path: str) -> int:
        if type(value) is not int:
            raise UsageError(f"{path} must be an integer, not {_kind(value)}.")
        if not 0 <= value <= limit:
            raise UsageError(f"{path} must be in 0 to {limit:#x}.")
        return value

    return decode


def signed(bits: int) -> Decoder[int]:
    """An integer that ``bits`` bits hold in two's complement."""
    limit = 1 << bits - 1

    def decode(value: object, path: str) -> int:
        if type(value) is not int:
            raise UsageError(f"{path} must be an integer, not {_kind(value)}.")
        if not -limit <= value < limit:
            raise UsageError(f"{path} must fit {bits} bits.")
        return value

    return decode


def octets(least: int, most: int) -> Decoder[bytes]:
    """``least`` to ``most`` bytes in hexadecimal, two digits each."""

    def decode(value: object, path: str) -> bytes:
        if type(value) is not str:
            raise UsageError(f"{path} must be a string of hexadecimal digits, not {_kind(value)}.")
        if not 2 * least <= len(value) <= 2 * most:
            raise UsageError(f"{path} must have {least} to {most} bytes.")
        # Not bytes.fromhex alone: it skips white space.
        if len(value) % 2 or not set(value) <= set("0123456789abcdef"):
            raise UsageError(f"{path} must consist of pairs of the digits 0 to 9 and a to f.")
        return bytes.fromhex(value)

    return decode


def boolean(value: object, path: str) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise UsageError(f"{path} must be true or false, not {_kind(value)}.")
    return value


def text(most: int) -> Decoder[str]:
    """A string of at most ``most`` characters."""

    def decode(value: object, path: str) -> str:
        if type(value) is not str:
            raise UsageError(f"{path} must be a string, not {_kind(value)}.")
        if len(value) > most:
            raise UsageError(f"{path} must have at most {most} characters.")
        return value

    return decode


def choice(*names: str) -> Decoder[str]:
    """One of these strings."""

    def decode(value: object, path: str) -> str:
        if type(value) is not str:
            raise UsageError(f"{path} must be a string, not {_kind(value)}.")
        if value not in names:
            raise UsageError(f"{path} must be one of {', '.join(names)}, not {value[:40]!r}.")
        return value

    return decode


def tagged(tag: str, kinds: Mapping[str, Decoder[T]]) -> Decoder[T]:
    """An object whose member ``tag`` says which of ``kinds`` its other members are for."""
    name = choice(*kinds)

    def decode(value: object, path: str) -> T:
        if type(value) is not dict:
            raise UsageError(f"{path} must be an object, not {_kind(value)}.")
        if tag not in value:
            raise UsageError(f"{path}.{tag} is missing.")
        rest = {key: member for key, member in value.items() if key != tag}
        return kinds[name(value[tag], f"{path}.{tag}")](rest, path)

    return decode


def sequence(item: Decoder[T], most: int, least: int = 0) -> Decoder[tuple[T, ...]]:
    """A list of ``least`` to ``most`` items."""

    def decode(value: object, path: str) -> tuple[T, ...]:
        if type(value) is not list:
            raise UsageError(f"{path} must be a list, not {_kind(value)}.")
        if not least <= len(value) <= most:
            raise UsageError(f"{path} must have {least} to {most} items, not {len(value)}.")
        return tuple(item(element, f"{path}[{i}]") for i, element in enumerate(value))

    return decode


def optional(item: Decoder[T]) -> Decoder[T | None]:
    """null, or what ``item`` takes."""

    def decode(value: object, path: str) -> T | None:
        return None if value is None else item(value, path)

    return decode


def record(make: Callable[..., T], members: Mapping[str, Decoder[Any]]) -> Decoder[T]:
    """An object with exactly these members, handed to ``make`` by name."""

    def decode(value: object, path: str) -> T:
        if type(value) is not dict:
            raise UsageError(f"{path} must be an object, not {_kind(value)}.")
        for name in members:
            if name not in value:
                raise UsageError(f"{path}.{name} is missing.")
        if len(value) != len(members):
            unknown = next(name for name in value if name not in members)
            raise UsageError(f"{path} has an unknown member {str(unknown)[:40]!r}.")
        return make(**{name: item(value[name], f"{path}.{name}") for name, item in members.items()})

    return decode


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)
