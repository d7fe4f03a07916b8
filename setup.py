"""Only what pyproject.toml cannot say: cffi's build hook and the guest images."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithGuests(build_py):
    """Assemble the guests into the package before its files are collected."""

    def run(self) -> None:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "build_guests.py")], check=True)
        super().run()


setup(
    cffi_modules=["pykvm/abi/build.py:ffibuilder"],
    cmdclass={"build_py": BuildWithGuests},
)
