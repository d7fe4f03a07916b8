"""The scenarios of docs/kvm-findings.md: on the models of their hosts, on real KVM, and their commands."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest

from pykvm.crosscheck.mmu_example import mismatches
from pykvm.crosscheck.mmu_examples import EXAMPLES
from pykvm.crosscheck.mmu_findings import FINDINGS, Finding
from pykvm.crosscheck.run import EVERYTHING, run
from pykvm.crosscheck.scenario import Scenario, check
from pykvm.crosscheck.trace import Trace
from pykvm.errors import RingSizeError
from pykvm.kvm import KvmSystem
from pykvm.machine import System
from pykvm.model.system import ModelSystem
from pykvm.probe import detect, read_evidence
from pykvm.profiles import DEVELOPMENT_HOST, profile
from tests.cli.runner import ROOT, invoke

pytestmark = pytest.mark.interruptible

DOCUMENT = ROOT / "docs" / "kvm-findings.md"
TEXT = DOCUMENT.read_text()
COMMANDS = sorted(set(re.findall(r"`pykvm explain ([a-z][^`\n]*)`", TEXT)))


def trace_of(finding: Finding, system: System) -> Trace:
    return run(finding.scenario, system, watch=EVERYTHING)


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_survives_json(name: str) -> None:
    scenario = FINDINGS[name].scenario
    check(scenario)
    assert Scenario.from_json(json.loads(json.dumps(scenario.to_json()))) == scenario
    assert name not in EXAMPLES


@pytest.mark.parametrize(
    ("name", "host"),
    [(name, host) for name, finding in FINDINGS.items() for host in finding.profiles],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_models_of_its_hosts_show_it(name: str, host: tuple[str, str]) -> None:
    finding = FINDINGS[name]
    with ModelSystem(profile=profile(*host)) as model:
        assert mismatches(finding, trace_of(finding, model)) == []


ARCHITECTURE = [name for name, finding in FINDINGS.items() if finding.architecture]


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_the_architecture_has_it_otherwise(name: str) -> None:
    """So the reference machine without a profile shows what the SDM says, and not what KVM does."""
    finding = FINDINGS[name]
    with ModelSystem() as architecture, ModelSystem(profile=profile(*finding.profiles[0])) as model:
        said = replace(finding, expected=finding.architecture)
        assert mismatches(said, trace_of(finding, architecture)) == []
        assert mismatches(said, trace_of(finding, model)) != []


@pytest.mark.kvm
@pytest.mark.parametrize("name", FINDINGS)
def test_real_kvm_shows_what_the_model_of_its_host_shows(name: str, system: KvmSystem) -> None:
    """To the word: on hosts of another kind both have the same to say against the finding."""
    finding = FINDINGS[name]
    host = detect(system, read_evidence(), system.check_extension).profile
    try:
        seen = mismatches(finding, trace_of(finding, system))
    except RingSizeError as error:
        pytest.skip(f"this host has no rings so small: {error}")
    with ModelSystem(profile=host) as model:
        assert seen == mismatches(finding, trace_of(finding, model))


def test_a_later_kernel_does_not_mark_what_a_sync_leaves_as_it_is() -> None:
    finding = FINDINGS["sync-marks-again"]
    with ModelSystem(profile=profile("amd-shadow", "6.12")) as model:
        found = mismatches(finding, trace_of(finding, model))
    assert found == ["step 3: ring nothing, not 5 6", "step 4: dirty 13, not 5 6 13"]


def test_a_larger_ring_loses_nothing() -> None:
    """And that of the finding loses exactly the oldest entries."""
    finding = FINDINGS["ring-overflow"]
    large = replace(finding.scenario, ring_entries=1024)
    with ModelSystem(profile=profile(*DEVELOPMENT_HOST)) as model:
        trace = run(large, model, watch=EVERYTHING)
    assert [offset for _, _, offset in trace.steps[0].pushed] == [5, *[6] * 300]
    assert trace.steps[1].refused == ""


# --- the document --------------------------------------------------------------------------------


def test_every_finding_is_in_the_document_with_its_command() -> None:
    named = {command.split()[0] for command in COMMANDS}
    assert FINDINGS.keys() <= named
    assert named <= FINDINGS.keys() | EXAMPLES.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_document_work(capfd: pytest.CaptureFixture[str], command: str) -> None:
    arguments = shlex.split(command)
    finding = {**EXAMPLES, **FINDINGS}[arguments[0]]
    if isinstance(finding, Finding) and finding.profiles[0] != DEVELOPMENT_HOST:
        assert "--profile" in arguments
        assert tuple(arguments[2::2]) in finding.profiles
    elif "--profile" not in arguments:
        arguments += ["--backend", "model"]
    done = invoke(capfd, "explain", *arguments, "--json")
    assert done.status == 0
    assert done.document["unexpected"] == {"model": []}


def test_the_mutations_of_the_document_exist(capfd: pytest.CaptureFixture[str]) -> None:
    named = re.findall(r"`pykvm interleave --mutation ([^`\n]+)`", TEXT)
    listed = invoke(capfd, "interleave", "--list").out
    assert named
    assert [name for name in named if name not in listed] == []


def test_the_tests_that_the_document_names_exist() -> None:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = {name.removesuffix(".py") for name in re.findall(r"\btest_\w+(?:\.py)?", TEXT)}
    missing = {name for name in named - files if not any(f"def {name}(" in source for source in sources)}
    assert missing == set()


def test_the_table_of_contents_lists_the_headings() -> None:
    headings = re.findall(r"^##+ (.+)$", TEXT, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    linked = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert set(linked) <= set(anchors)
    sections = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in sections} <= set(linked)
