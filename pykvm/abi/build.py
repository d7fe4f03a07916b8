"""Compile the binding: cdef from decl/*.h, C source from compat.h and hot/*.c (cffi API mode).

Run by setuptools (``cffi_modules`` in setup.py), so it must not import pykvm.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path("pykvm/abi").resolve()

# types.h first, since every other file uses its names; hot.h last, since it uses the kernel's structs.
TOPICS = sorted((HERE / "decl").glob("*.h"), key=lambda p: (p.name != "types.h", p.name == "hot.h", p.name))

ffibuilder = FFI()
for topic in TOPICS:
    ffibuilder.cdef(topic.read_text())

ffibuilder.set_source(
    "pykvm.abi._native",
    '#include "compat.h"\n#include "hot/hot.h"\n'
    + "".join(f'#include "hot/{path.name}"\n' for path in sorted((HERE / "hot").glob("*.c"))),
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-std=gnu11", "-fno-strict-aliasing"],
)
