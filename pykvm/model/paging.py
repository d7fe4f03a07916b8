"""The architectural page walk (placeholder signatures; being written)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

ReadEntry = Callable[[int, int], "int | None"]


class Access(IntFlag):
    READ = 0
    WRITE = 1
    FETCH = 2
    USER = 4
    IMPLICIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    cr0: int
    cr3: int
    cr4: int
    efer: int
    ac: bool = False
    pkru: int = 0
    pkrs: int = 0
    pdptrs: tuple[int, int, int, int] = (0, 0, 0, 0)
    physical_bits: int = 46
    pages_1g: bool = True
    pse36: bool = True


class Update(NamedTuple):
    gpa: int
    size: int
    old: int
    new: int


class Walk(NamedTuple):
    gpa: int
    error: int | None
    updates: tuple[Update, ...]


def read_pdptes(read: ReadEntry, cr3: int, physical_bits: int) -> tuple[int, int, int, int] | None:
    raise NotImplementedError


def walk(read: ReadEntry, control: Control, linear: int, access: Access) -> Walk:
    raise NotImplementedError
