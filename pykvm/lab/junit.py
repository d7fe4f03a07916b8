"""A run of tests as JUnit XML, the dialect that continuous integration reads.

One ``testsuite`` for each kernel and kind; ``classname`` and ``name`` as pytest writes them.  Expected
failures are ``skipped`` elements, as pytest has it, since the format knows no other word; a test that killed
its lab is an ``error``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree as Xml

from pykvm.lab.results import Case, SuiteResult

# What XML 1.0 cannot carry, not even as a reference.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    """``text`` with characters that XML cannot carry written as escapes."""
    return _FORBIDDEN.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def names(nodeid: str) -> tuple[str, str]:
    """``tests/kvm/test_x.py::TestY::test_z[1::2]`` as ``tests.kvm.test_x.TestY`` and ``test_z[1::2]``."""
    base, bracket, parameters = nodeid.partition("[")
    path, *inner = base.split("::")
    parts = [path.removesuffix(".py").replace("/", "."), *inner]
    if len(parts) == 1:
        return "", parts[0] + bracket + parameters
    return ".".join(parts[:-1]), parts[-1] + bracket + parameters


def junit(results: Iterable[SuiteResult]) -> bytes:
    """The document, UTF-8 with a declaration."""
    root = Xml.Element("testsuites", name="pykvm lab")
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for result in results:
        suite = _suite(result)
        root.append(suite)
        for name in totals:
            totals[name] += int(suite.get(name, "0"))
    for name, value in totals.items():
        root.set(name, str(value))
    Xml.indent(root)
    document: bytes = Xml.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def write_junit(path: Path, results: Iterable[SuiteResult]) -> None:
    """Write the document; OSError if that is impossible."""
    path.write_bytes(junit(results))


def _suite(result: SuiteResult) -> Xml.Element:
    cases = list(result.cases)
    problem = result.state != "finished"
    suite = Xml.Element("testsuite", name=f"{result.kind} {result.release}")
    suite.set("tests", str(len(cases) + problem))
    suite.set("failures", str(result.count("failed")))
    suite.set("errors", str(result.count("died") + problem))
    suite.set("skipped", str(result.count("skipped") + result.count("xfailed")))
    suite.set("time", f"{result.seconds:.3f}")
    properties = Xml.SubElement(suite, "properties")
    facts = {
        "kernel": result.running or result.release,
        "kind": result.kind,
        "emulator": result.emulator,
        "emulator_slug": result.slug,
        "boots": str(result.boots),
        "boot_seconds": f"{result.boot_seconds:.1f}",
        "state": result.state,
    }
    for name, value in facts.items():
        Xml.SubElement(properties, "property", name=name, value=clean(value))
    for case in cases:
        suite.append(_case(case))
    if problem:
        element = Xml.SubElement(suite, "testcase", classname="pykvm.lab", name="the lab", time="0.000")
        Xml.SubElement(element, "error", message=clean(result.problem), type=result.state)
    return suite


def _case(case: Case) -> Xml.Element:
    classname, name = names(case.nodeid)
    element = Xml.Element(
        "testcase", classname=clean(classname), name=clean(name), time=f"{case.seconds:.3f}"
    )
    reason = clean(case.reason)
    if case.outcome == "failed":
        Xml.SubElement(element, "failure", message=reason).text = clean(case.text)
    elif case.outcome == "died":
        Xml.SubElement(element, "error", message=reason, type="died").text = clean(case.text)
    elif case.outcome == "skipped":
        Xml.SubElement(element, "skipped", message=reason, type="pytest.skip")
    elif case.outcome == "xfailed":
        said = f"the emulator's bug: {clean(case.bug)}" if case.bug else reason
        Xml.SubElement(element, "skipped", message=said, type="pytest.xfail")
    elif case.outcome == "xpassed":
        Xml.SubElement(element, "system-out").text = f"passed although expected to fail: {reason}"
    return element
