"""All modules with semantics: importing this one fills the table."""

from __future__ import annotations

from pykvm.model.cpu import (  # noqa: F401
    arithmetic,
    bits,
    bmi,
    branches,
    conditions,
    control,
    cpuid,
    debug,
    decimal,
    flag_control,
    hints,
    iret,
    moves,
    msrs,
    multiply,
    ports,
    shifts,
    software_interrupts,
    stack,
    strings,
    system,
    tables,
)
