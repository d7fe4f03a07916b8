"""The only door to C: the compiled binding, its types, and the base of everything that owns a descriptor."""

from pykvm.abi._native import ffi, lib

__all__ = ["ffi", "lib"]
