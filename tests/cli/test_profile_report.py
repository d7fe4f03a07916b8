"""How 'pykvm info' shows a profile, and what 'pykvm overhead' prints."""

from __future__ import annotations

import pytest

from pykvm.cli.profile_report import profile_document, profile_summary
from pykvm.probe import Detection, Finding, How
from pykvm.probe.detect import BEHAVIOURS
from pykvm.profiles import profile
from tests.cli.runner import invoke


def detection(**changes: object) -> Detection:
    """An amd-npt 7.2 with some behaviours changed; everything found but what is about PML."""
    found = profile("amd-npt", "7.2", **changes)
    findings = {
        name: Finding(name, getattr(found, name), How.ASSUMED if "pml" in name else How.PROBE, "seen")
        for name in BEHAVIOURS
    }
    return Detection(found, findings, ("6.18",))


def test_a_known_host() -> None:
    text = profile_summary(detection())
    assert text.startswith(f"amd-npt 7.2: all of {len(BEHAVIOURS) - 2} behaviours that were found")
    assert "6.18 would fit as well" in text
    assert text.endswith("2 are assumed")
    document = profile_document(detection())
    assert (document["equal"], document["differences"], document["other_eras"]) == (True, [], ["6.18"])
    assert [each["name"] for each in document["behaviours"]] == list(BEHAVIOURS)
    assert document["behaviours"][0]["value"] == "npt"


def test_a_host_that_differs() -> None:
    odd = detection(mmio_caching=False, address_spaces=1)
    assert "nearest to amd-npt 7.2, but address_spaces is 1 and not 2, mmio_caching is no and not yes" in (
        profile_summary(odd)
    )
    assert {"name": "mmio_caching", "found": False, "known": True} in profile_document(odd)["differences"]


@pytest.mark.parametrize(("policy", "total"), [("always", 269486080), ("external", 1050624)])
def test_overhead_under_a_policy(capfd: pytest.CaptureFixture[str], policy: str, total: int) -> None:
    """2 bytes a page for 39 bits of addresses, or nothing; beside 8 bytes for each large page."""
    document = invoke(capfd, "overhead", "--profile", "amd-npt", "--policy", policy, "--json").document
    assert [each["policy"] for each in document["policies"]] == [policy]
    assert document["pages"] == 1 << 27
    slots = document["policies"][0]["moments"][0]
    assert slots["moment"] == "slots"
    assert slots["total_bytes"] - slots["bytes"]["vmalloc"] == total


@pytest.mark.parametrize(
    "arguments",
    [("--profile", "amd"), ("--profile", "amd-npt@5.4"), ("--memory", "1000"), ("--policy", "never"),
     ("--profile", "amd-npt", "--memory", "512T"), ("--profile", "amd-npt", "--ring", "100")],
)  # fmt: skip
def test_overhead_refuses_in_a_sentence(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    result = invoke(capfd, "overhead", *arguments, "--json")
    assert result.document["exit_status"] == result.status != 0
    assert result.document["error"].endswith((".", "?", "'--help'."))
