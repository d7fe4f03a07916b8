"""Fixtures for tests on a real KVM.

``PYKVM_REQUIRE_KVM=1`` turns the skip for want of a usable /dev/kvm into a failure.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from pykvm.errors import PykvmError
from pykvm.kvm import KvmSystem, KvmVm


def _why_no_kvm() -> str:
    try:
        with KvmSystem() as system, system.create_machine():
            return ""
    except PykvmError as error:
        return str(error)


WHY_NO_KVM = _why_no_kvm()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kvm") is None or not WHY_NO_KVM:
        return
    if os.environ.get("PYKVM_REQUIRE_KVM") == "1":
        pytest.fail(f"PYKVM_REQUIRE_KVM=1, but {WHY_NO_KVM}", pytrace=False)
    pytest.skip(f"needs a real KVM: {WHY_NO_KVM}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that takes a real system or VM runs on KVM; sweeps and labs only run when -m asks for them."""
    for item in items:
        backend = item.callspec.params.get("system") if hasattr(item, "callspec") else None
        if not str(backend).startswith("model") and {"system", "vm"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.kvm)
        for bug in item.iter_markers("emulator_bug"):
            slug, reason = bug.args
            if os.environ.get("PYKVM_LAB_EMULATOR") == slug:
                run = not bug.kwargs.get("kills", False)
                item.add_marker(pytest.mark.xfail(reason=f"{slug}: {reason}", strict=False, run=run))
    if not config.option.markexpr:
        kept: list[pytest.Item] = []
        left_out: list[pytest.Item] = []
        for item in items:
            (left_out if any(map(item.get_closest_marker, ("slow", "lab"))) else kept).append(item)
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A host that emulates in batches ends one at any interrupt of its own (reference/hosts.md D.7), which
    serves requests one entry sooner.  What is wrong is wrong three times.
    """
    if pyfuncitem.get_closest_marker("interruptible") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for more in (True, True, False):
        try:
            pyfuncitem.obj(**arguments)
        except AssertionError:
            if not more:
                raise
        else:
            break
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("kvm") is not None:
        # A property survives the way from an xdist worker to the process that counts.
        report.user_properties.append(("kvm", True))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of the run was judged by a real KVM."""
    ran = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, ())]
    real = sum(any(name == "kvm" for name, _ in report.user_properties) for report in ran)
    why = f": {WHY_NO_KVM}" if WHY_NO_KVM else ""
    terminalreporter.write_line(f"{real} of {len(ran)} tests ran on real KVM{why}")


@pytest.fixture
def system() -> Iterator[KvmSystem]:
    """/dev/kvm."""
    with KvmSystem() as opened:
        yield opened


@pytest.fixture
def vm(system: KvmSystem) -> Iterator[KvmVm]:
    """A fresh VM without memory or vCPUs."""
    with system.create_machine() as machine:
        yield machine
