"""Groups that import a command's module when it is used, so that --help and errors come at once."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """``modules`` maps a command's name to its module in pykvm.cli, which has it as ``command``."""

    def __init__(self, *arguments: Any, modules: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self._modules:
            return None
        command = importlib.import_module(f"pykvm.cli.{self._modules[name]}").command
        assert isinstance(command, click.Command)
        return command
