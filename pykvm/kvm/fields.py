"""Python numbers into C structs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pykvm.errors import UsageError

if TYPE_CHECKING:
    from pykvm.abi.library import CData


def fill(target: CData, **values: object) -> None:
    """Set fields of a struct.  Raises UsageError, naming the field, for a value that it cannot hold."""
    for name, value in values.items():
        try:
            setattr(target, name, value)
        except (OverflowError, TypeError, IndexError):
            raise UsageError(
                f"{name} cannot be {value!r}: it does not fit the field's type and width."
            ) from None
