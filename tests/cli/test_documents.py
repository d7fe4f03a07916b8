"""The pages in docs/ against the code: exit statuses, JSON keys, commands, options, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from pykvm import errors
from pykvm.cli import main
from pykvm.errors import PykvmError
from tests.cli.runner import ROOT, invoke

DOCS = ROOT / "docs"


# --- exit statuses -------------------------------------------------------------------------------


def documented_statuses() -> dict[str, int]:
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", (DOCS / "exit-status.md").read_text(), re.MULTILINE)
    return {name: int(status) for status, names in rows for name in re.findall(r"`([A-Z]\w+)`", names)}


def test_every_exception_is_documented_with_its_exit_status() -> None:
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, PykvmError)
    ]
    assert documented_statuses() == {item.__name__: item.exit_status for item in classes}


def test_the_statuses_without_an_exception_are_documented() -> None:
    text = (DOCS / "exit-status.md").read_text()
    for status in (main.USAGE_STATUS, main.BUG_STATUS, main.INTERRUPTED_STATUS, main.BROKEN_PIPE_STATUS):
        assert f"\n| {status} |" in text


# --- JSON ----------------------------------------------------------------------------------------


def documented_keys(heading: str) -> dict[str, bool]:
    """The keys of the section that names the command, and whether each is always there."""
    sections = re.split(r"^## ", (DOCS / "json.md").read_text(), flags=re.MULTILINE)
    (section,) = [part for part in sections if f"`{heading}`" in part.partition("\n")[0]]
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", section, re.MULTILINE)
    return {key: "(only" not in meaning for key, meaning in rows}


def keys_of(value: Any, known: dict[str, bool], prefix: str = "") -> Iterator[str]:
    """Paths as json.md writes them; what it documents as a whole is not looked into."""
    whole = prefix in known and not any(key.startswith((f"{prefix}.", f"{prefix}[].")) for key in known)
    if prefix and (whole or value is None):
        yield prefix
    elif isinstance(value, dict):
        if prefix in known:
            yield prefix
        for name, item in value.items():
            yield from keys_of(item, known, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list):
        for item in value:
            yield from keys_of(item, known, f"{prefix}[]")
    else:
        yield prefix


def check_keys(heading: str, document: dict[str, Any]) -> None:
    known = documented_keys(heading)
    found = set(keys_of(document, known))
    assert found - known.keys() == set(), "keys that docs/json.md does not have"
    assert {key for key, always in known.items() if always} - found == set(), (
        "documented keys that are missing"
    )


COMMANDS = {
    "pykvm guests list": ["guests", "list"],
    "pykvm guests show": ["guests", "show", "hotspot"],
    "pykvm overhead": ["overhead", "--profile", "amd-npt@7.2", "--vcpus", "2"],
    "pykvm interleave": ["interleave", "--case", "tracking"],
}

KVM_COMMANDS = {
    "pykvm info": ["info"],
    "pykvm dirty": ["dirty", "random", "--memory", "4M", "--seconds", "50ms", "--interval", "20ms"],
    "pykvm migrate": ["migrate", "--memory", "4M", "--check-seconds", "50ms", "--warm-up", "50ms"],
}


@pytest.mark.parametrize("heading", COMMANDS)
def test_json_has_the_documented_keys(capfd: pytest.CaptureFixture[str], heading: str) -> None:
    check_keys(heading, invoke(capfd, *COMMANDS[heading], "--json").document)


@pytest.mark.kvm
@pytest.mark.parametrize("heading", KVM_COMMANDS)
def test_json_has_the_documented_keys_on_kvm(capfd: pytest.CaptureFixture[str], heading: str) -> None:
    document = invoke(capfd, *KVM_COMMANDS[heading], "--json").document
    check_keys(heading, document)
    if heading == "pykvm migrate":
        check_keys("pykvm migrate receive", document["destination"])


@pytest.mark.kvm
@pytest.mark.parametrize("log", ["none", "bitmap"])
def test_json_of_run_has_the_documented_keys(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, log: str
) -> None:
    image = tmp_path / "halt.bin"
    image.write_bytes(b"\xc6\x06\x00\x50\x01\xf4")  # mov byte [0x5000], 1 ; hlt
    check_keys("pykvm run", invoke(capfd, "run", str(image), "--log", log, "--json").document)


# --- commands and links ----------------------------------------------------------------------------


def all_commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{prefix} {name}", command
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{prefix} {name}")


ALL_COMMANDS = dict(all_commands(main.cli, "pykvm"))


@pytest.mark.parametrize("path", ALL_COMMANDS)
def test_every_command_is_documented_and_explains_its_options(path: str) -> None:
    command = ALL_COMMANDS[path]
    assert f"`{path}" in (DOCS / "commands.md").read_text()
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{path} {option.opts[0]}"


@pytest.mark.parametrize(
    "path", [path for path, item in ALL_COMMANDS.items() if not isinstance(item, click.Group)]
)
def test_every_command_takes_the_common_options(path: str) -> None:
    names = {name for option in ALL_COMMANDS[path].params for name in option.opts}
    expected = {"--json", "--backend", "--debug"}
    if path.startswith("pykvm lab "):
        expected -= {"--backend"}  # the machine is the lab's
    if path == "pykvm lab run":
        expected -= {"--json"}  # its output is the command's
    assert expected == names & {"--json", "--backend", "--debug"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    for target in targets:
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.kvm
def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(r"\d+ pages written, \[.*\] 0 corruptions\n", capsys.readouterr().out)
