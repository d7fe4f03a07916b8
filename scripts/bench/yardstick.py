"""Compiles yardstick.c with the system's C compiler and loads it.

cffi's dlopen mode serves here: the functions time themselves, so what a call costs does not count.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from cffi import FFI

SOURCE = Path(__file__).with_name("yardstick.c")

ffi: Any = FFI()
ffi.cdef(
    """
    void *yardstick_map(int fd, size_t size, uint64_t offset);
    void yardstick_unmap(void *map, size_t size);
    int64_t yardstick_exits(int vcpu, void *run, int stop);
    int64_t yardstick_empty_ioctls(int kvm, int n);
    int64_t yardstick_ring(int vm, void *ring, uint32_t size, uint32_t *head, uint32_t *slots,
                           uint64_t *offsets, uint32_t *taken);
    int64_t yardstick_slot_flags(int vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
                                 uint64_t host);
    int64_t yardstick_dirty_log(int vm, uint32_t slot, uint64_t *bitmap, size_t words, uint64_t base,
                                uint64_t *gfns, size_t *found);
    int64_t yardstick_lifecycle(int kvm, size_t size, const void *code, size_t code_size);
    int64_t yardstick_send(int socket, const char *memory, size_t size);
    int64_t yardstick_receive(int socket, char *memory, size_t size);
    """
)


class YardstickError(Exception):
    """The C side cannot be built or failed; one sentence for the user."""


def load() -> Any:
    """The library, built with -O2 into a folder that is gone again when this returns."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise YardstickError(
            "The bench needs a C compiler; install one with 'apt-get install gcc libc6-dev'."
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "yardstick.so"
        command = [compiler, "-O2", "-std=gnu11", "-Wall", "-Werror", "-shared", "-fPIC"]
        result = subprocess.run(
            [*command, "-o", str(target), str(SOURCE)], capture_output=True, text=True, timeout=60
        )
        if result.returncode:
            raise YardstickError(f"yardstick.c does not compile: {result.stderr.strip()}")
        return ffi.dlopen(str(target))


def checked(nanoseconds: int) -> int:
    """A function's result, or YardstickError where it is -errno."""
    if nanoseconds < 0:
        raise YardstickError(f"The yardstick failed: {os.strerror(-nanoseconds)}.")
    return nanoseconds
