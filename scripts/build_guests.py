#!/usr/bin/env python3
"""Assemble guests/*.S into pykvm/guest/images/, reproducibly, with GNU as and ld.

Does nothing when sources, tools and results are those of the last run.  Exit status 2 with one sentence
when binutils is missing or a source does not assemble.  Uses the standard library only: setup.py runs it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "guests"
IMAGES = ROOT / "pykvm" / "guest" / "images"
STAMP = "stamp"

# Word size for as, then options for ld: flat binaries in conventional memory, but for the exceptions.
FLAT = ("64", "-melf_x86_64", "--oformat=binary", "-Ttext=0x8000")
FORMATS = {
    "rom": ("64", "-melf_x86_64", "--oformat=binary", "-Ttext=0xf000"),
    "selftest": ("64", "-melf_x86_64", "--oformat=binary", "-Ttext=0x0"),
    "kernel": ("64", "-melf_x86_64", "--oformat=binary", "-Ttext=0x100000"),
    "multiboot": ("32", "-melf_i386", "-Ttext=0x100000"),
}


class BuildError(Exception):
    """Told to the user as one sentence."""


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BuildError(
            f"The guests cannot be built: '{name}' is missing; install it with 'apt-get install binutils'."
        )
    return path


def run(*command: str | Path) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "Error" in line), result.stderr.strip())
        raise BuildError(f"The guests cannot be built: {first or f'{command[0]} failed'}")


def digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        total.update(f"{file.name} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()


def inputs() -> list[Path]:
    return sorted([*SOURCES.glob("*.S"), *SOURCES.glob("*.inc"), Path(__file__).resolve()])


def outputs() -> list[Path]:
    return sorted(file for file in IMAGES.glob("*") if file.name != STAMP)


def stamp() -> str:
    return f"{digest(inputs())} {digest(outputs())}\n"


def up_to_date() -> bool:
    file = IMAGES / STAMP
    return file.exists() and file.read_text() == stamp()


def build(source: Path, assembler: str, linker: str) -> bytes:
    word, *layout = FORMATS.get(source.stem, FLAT)
    with tempfile.TemporaryDirectory() as folder:
        part, whole = Path(folder) / "guest.o", Path(folder) / "guest"
        run(assembler, f"--{word}", "--fatal-warnings", f"-I{SOURCES}", "-o", part, source)
        run(linker, "-N", "--build-id=none", "--strip-all", "-e", "entry", *layout, "-o", whole, part)
        return whole.read_bytes()


def build_all() -> int:
    assembler, linker = tool("as"), tool("ld")
    sources = sorted(SOURCES.glob("*.S"))
    files = {f"{source.stem}.bin": build(source, assembler, linker) for source in sources}
    files |= {text.name: text.read_bytes() for text in [*sources, *sorted(SOURCES.glob("*.inc"))]}
    IMAGES.mkdir(parents=True, exist_ok=True)
    for old in IMAGES.iterdir():
        if old.name not in files:
            old.unlink()
    for name, content in files.items():
        (IMAGES / name).write_bytes(content)
    (IMAGES / STAMP).write_text(stamp())
    return len(sources)


def main() -> int:
    try:
        if up_to_date():
            print("Guests are up to date.")
        else:
            print(f"Built {build_all()} guests in {IMAGES.relative_to(ROOT)}.")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
