"""The ways in (docs/ways-in*.md): what recipes and examples name is there and takes the options given."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import click
import pytest

from pykvm.cli import main
from pykvm.lab.cache import PARTS
from pykvm.lab.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("ways-in*.md"))
WORKFLOW = ROOT / "docs/examples/github-actions.yml"
CONTAINER = ROOT / "scripts/container"
VAGRANTFILE = (ROOT / "Vagrantfile").read_text()
BASH = shutil.which("bash") or "/bin/bash"


def ignored() -> list[str]:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# --- commands in texts -----------------------------------------------------------------------------


def code(page: str) -> str:
    """What a page of Markdown sets as code, a piece a line."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^ *```\n.*?^ *```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`]+)`", rest)])


def commands(text: str) -> Iterator[list[str]]:
    """The words of every pykvm command and every script of the project that the code names."""
    for line in re.findall(r"(?:\bpykvm (?=[a-z])(?!pykvm)|(?<![\w.])[./\w]*\bscripts/)[^`'\"#|&>\n]*", text):
        yield line.split()


def leaf(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and its own arguments."""
    command: click.Command = main.cli
    while isinstance(command, click.Group) and words:
        inner = command.get_command(click.Context(command), words[0])
        assert inner is not None, f"there is no command '{words[0]}'"
        command, words = inner, words[1:]
    return command, words


def check_pykvm(words: list[str]) -> None:
    """Options exist and take the values given; what comes after -- is a command of its own."""
    command, arguments = leaf(words)
    if "--" in arguments:
        cut = arguments.index("--")
        if arguments[cut + 1 : cut + 2] == ["pykvm"]:
            check_pykvm(arguments[cut + 2 :])
        arguments = arguments[:cut]
    options = {name: option for option in command.params for name in option.opts}
    for word, value in pairwise([*arguments, ""]):
        if word.startswith("-"):
            name, _, given = word.partition("=")
            assert name in options, f"{command.name} has no option {name}"
            kind = options[name].type
            given = given or value
            if isinstance(kind, click.Choice) and "${{" not in given:
                assert given in kind.choices, f"{name} does not take {given}"


def check(text: str) -> int:
    """How many commands there are; each of them is checked."""
    count = 0
    for words in commands(text):
        count += 1
        program, arguments = words[0], words[1:]
        if program == "pykvm":
            check_pykvm([word for word in arguments if word != "…"])
        else:
            path = ROOT / program.removeprefix("/vagrant/")
            assert path.exists(), f"there is no {program}"
            assert not program.startswith("./") or os.access(path, os.X_OK), f"{program} cannot be executed"
    return count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_pages_exist(page: Path) -> None:
    assert check(code(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_kinds_and_tests_that_the_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`((?:amd|intel)-[a-z-]+)`", text):
        assert name in KINDS
    for path in re.findall(r"`((?:tests|scripts|docs)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


def asked_for() -> set[tuple[str, str, str, str]]:
    """Module, parameter, Y or N, and the kind of lab that asks for it, as the tables of parameters say."""
    found = set()
    text = (ROOT / "docs/ways-in-bare-metal.md").read_text()
    for module, section in re.findall(r"^### (\w+)(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL):
        for row in re.findall(r"^\| `.*\|$", section, re.MULTILINE):
            first, *_, last = row.strip("| ").split(" | ")
            for value, kinds in re.findall(r"\b([YN]): ([^;]*)", last):
                for name, kind in product(re.findall(r"`(\w+)`", first), re.findall(r"`([\w-]+)`", kinds)):
                    found.add((module, name, value, kind))
    return found


def test_the_parameters_of_every_kind_are_explained() -> None:
    """Each of them, with its value; and the page names no lab that does not ask for it."""
    assert asked_for() == {
        (module, name, "NY"[int(value)], kind.name)
        for kind in KINDS.values()
        for module, parameters in kind.parameters.items()
        for name, value in (parameter.split("=") for parameter in parameters.split(","))
    }


def test_every_kind_is_in_the_table_of_hosts() -> None:
    text = (ROOT / "docs/ways-in.md").read_text()
    assert KINDS.keys() <= set(re.findall(r"`([a-z-]+)`", text))


# --- Vagrant ---------------------------------------------------------------------------------------


def test_the_vagrantfile_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in ("./scripts/demo", "./scripts/test"):
        assert command in readme
        assert command in VAGRANTFILE
    assert check(VAGRANTFILE) >= 3
    assert "install_system_packages" in VAGRANTFILE


def test_the_machine_has_virtualization_with_either_provider() -> None:
    assert 'cpu_mode = "host-passthrough"' in VAGRANTFILE
    assert "nested = true" in VAGRANTFILE
    assert '"--nested-hw-virt", "on"' in VAGRANTFILE


def test_vagrants_own_folder_is_no_part_of_the_checkout() -> None:
    assert "/.vagrant/" in ignored()


@pytest.mark.skipif(shutil.which("ruby") is None, reason="needs ruby")
def test_the_vagrantfile_is_ruby() -> None:
    subprocess.run(["ruby", "-c", ROOT / "Vagrantfile"], check=True, capture_output=True, timeout=60)


@pytest.mark.skipif(shutil.which("vagrant") is None, reason="needs vagrant")
@pytest.mark.parametrize("provider", ["virtualbox", "libvirt"])
def test_vagrant_takes_the_vagrantfile(tmp_path: Path, provider: str) -> None:
    for name in ("Vagrantfile", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    # vagrant asks VirtualBox for its version before it looks at the settings.
    virtualbox = tmp_path / "VBoxManage"
    virtualbox.write_text(f"#!{BASH}\necho 7.0.10r158379\n")
    virtualbox.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DEFAULT_PROVIDER": provider,
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    done = subprocess.run(
        ["vagrant", "validate"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if provider == "libvirt" and "provider 'libvirt' could not be found" in done.stderr:
        pytest.skip("needs vagrant-libvirt")
    assert done.returncode == 0, done.stderr
    assert "validated successfully" in done.stdout


# --- GitHub Actions --------------------------------------------------------------------------------


def parsed(path: Path) -> Any:
    """The YAML file, by whatever is there to read it."""
    if importlib.util.find_spec("yaml") is not None:
        return importlib.import_module("yaml").safe_load(path.read_text())
    if (ruby := shutil.which("ruby")) is None:
        pytest.skip("needs PyYAML or ruby")
    code = "puts JSON.generate(YAML.load_file(ARGV[0]))"
    done = subprocess.run(
        [ruby, "-ryaml", "-rjson", "-e", code, path], capture_output=True, timeout=60, check=True
    )
    return json.loads(done.stdout)


def test_the_workflow_has_both_jobs() -> None:
    workflow = parsed(WORKFLOW)
    host, labs = workflow["jobs"]["host-kvm"], workflow["jobs"]["labs"]
    assert any(step.get("env", {}).get("PYKVM_REQUIRE_KVM") == "1" for step in host["steps"])
    assert set(labs["strategy"]["matrix"]["kvm"]) <= KINDS.keys()
    assert {cell["kvm"] for cell in labs["strategy"]["matrix"]["include"]} <= KINDS.keys()
    for job in (host, labs):
        steps = job["steps"]
        scripts = " ".join(step.get("run", "") for step in steps)
        (upload,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
        assert upload["if"] == "always()"
        assert upload["with"]["path"] in scripts
        for step in steps:
            subprocess.run([BASH, "-n", "-c", step.get("run", "")], check=True, timeout=60)


def test_the_workflows_commands_exist() -> None:
    text = WORKFLOW.read_text()
    folded = re.sub(r"\n +(?=--)", " ", text)  # a command that goes on in the next line
    assert check(folded) >= 4
    assert "pykvm lab test --kernel ${{ matrix.kernel }} --kvm ${{ matrix.kvm }} --selection" in folded


def test_the_workflow_keeps_folders_of_the_labs_cache() -> None:
    kept = re.findall(r"~/\.cache/pykvm/lab/(\w+)", WORKFLOW.read_text())
    assert len(kept) == 2
    assert set(kept) <= set(PARTS)


# --- the container ---------------------------------------------------------------------------------


def test_the_image_leaves_out_what_git_ignores() -> None:
    lines = (CONTAINER / "Containerfile.dockerignore").read_text().splitlines()
    left_out = {line.removeprefix("**/").strip("/") for line in lines if not line.startswith("#")}
    assert {pattern.strip("/") for pattern in ignored()} <= left_out


def test_the_image_takes_its_packages_from_the_scripts() -> None:
    text = (CONTAINER / "Containerfile").read_text()
    assert "install_system_packages" in text
    assert "&& prepare" in text
    user, build = text.index("\nUSER pykvm"), text.index("&& prepare")
    assert user < build, "nothing but the packages needs root"
    assert check("\n".join(re.findall(r"^#  +(.*)$", text, re.MULTILINE))) >= 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    subprocess.run(["shellcheck", CONTAINER / "run"], check=True, timeout=60)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can read, with the script in it, and tools/ for PATH."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copy = folder / "scripts/container/run"
        copy.parent.mkdir(parents=True)
        shutil.copy(CONTAINER / "run", copy)
        (folder / "tools").mkdir()
        for tool in ("dirname", "readlink", "stat"):
            (folder / "tools" / tool).symlink_to(shutil.which(tool) or tool)
        (folder / "kvm").touch()
        (folder / "log").touch()
        (folder / "log").chmod(0o666)
        yield folder


def run_in_container(
    place: Path, engine: str, *arguments: str, device: str = "kvm", user: int | None = None
) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """Run the script with an engine that only writes down how it was called; the calls and the outcome."""
    fake = place / "tools" / engine
    fake.write_text(f'#!{BASH}\necho "${{@@Q}}" >>{place / "log"}\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [BASH, place / "scripts/container/run", *arguments],
        env={"PATH": str(place / "tools"), "KVM_DEVICE": str(place / device)},
        cwd="/",
        user=user,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    return [shlex.split(line) for line in (place / "log").read_text().splitlines()], done


def test_docker_gets_the_device_and_its_group(place: Path) -> None:
    (build, run), done = run_in_container(place, "docker", "pykvm", "info")
    assert done.returncode == 0, done.stderr
    assert build[0] == "build"
    assert build[-1] == str(place)
    assert "--ignorefile" not in build
    device = ["--device", f"{place / 'kvm'}:/dev/kvm", "--group-add", str((place / "kvm").stat().st_gid)]
    assert run == ["run", "--rm", *device, "pykvm", "pykvm", "info"]


def test_without_kvm_the_tests_run_all_the_same(place: Path) -> None:
    (_, run), done = run_in_container(place, "docker", device="nosuch")
    assert run == ["run", "--rm", "pykvm", "./scripts/test"]
    assert "nosuch" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start it as somebody else")
def test_rootless_podman_keeps_the_users_groups(place: Path) -> None:
    (build, run), done = run_in_container(place, "podman", user=65534)
    assert done.returncode == 0, done.stderr
    assert build[build.index("--ignorefile") + 1].endswith("Containerfile.dockerignore")
    assert run[run.index("--group-add") + 1] == "keep-groups"


def test_without_an_engine_it_says_what_to_install(place: Path) -> None:
    calls, done = run_in_container(place, "neither")
    assert not calls
    assert done.returncode == 2
    assert "podman" in done.stderr
