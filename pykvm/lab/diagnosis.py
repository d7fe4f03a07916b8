"""Why a lab died, read off its console: the guest kernel's fault, the emulator's, or memory that did not
suffice.

A bug of the emulator must not be blamed on KVM, and a bug of KVM must not be put down to the emulator, so
each rule names its evidence, and what no rule matches is said to be unexplained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Blame = Literal["emulator", "kernel", "memory", "unknown"]


@dataclass(frozen=True)
class Diagnosis:
    """A sentence for people, and whose fault it is."""

    blame: Blame
    sentence: str


@dataclass(frozen=True)
class _Rule:
    blame: Blame
    pattern: re.Pattern[str]
    sentence: str
    emulators: tuple[str, ...] = ()  # slugs; empty: any


def _rule(blame: Blame, pattern: str, sentence: str, *emulators: str) -> _Rule:
    return _Rule(blame, re.compile(pattern), sentence, emulators)


_RULES = (
    _rule(
        "memory",
        r"Initramfs unpacking failed: write error|No space left on device.*initramfs",
        "its memory does not hold the files it starts with; give it more with --memory",
    ),
    _rule(
        "memory",
        r"System is deadlocked on memory|Out of memory: Killed process .*\((?:python|pykvm)",
        "the guest ran out of memory; give it more with --memory",
    ),
    _rule(
        "memory",
        r"cannot set up guest memory",
        "this machine has less memory free than it was to have; give it less with --memory",
        "qemu-tcg",
        "qemu-kvm",
    ),
    _rule(
        "emulator",
        # Bochs calls it a panic, too, when the guest switches itself off or resets itself.
        r">>PANIC<< (?!ACPI control: soft power off|the guest was reset)(?P<detail>.*)",
        "Bochs itself gave up ({detail}), which says nothing about KVM",
        "bochs",
    ),
    _rule(
        "emulator",
        r"qemu(?:-system-x86_64)?: fatal: (?P<detail>.*)",
        "QEMU itself gave up ({detail}), which says nothing about KVM",
        "qemu-tcg",
        "qemu-kvm",
    ),
    _rule(
        "emulator",
        # An oops names the place after what happened; a second one may follow.
        r"RIP: 0010:\w*(?:text_poke|alternative|jump_label)\w*\+"
        r"|(?:text_poke|alternative|jump_label)[\s\S]{0,400}?(?:invalid opcode|Oops|BUG)",
        "its kernel crashed while patching its own text, a known fault of emulated processors, not of KVM",
        "qemu-tcg",
        "bochs",
    ),
    _rule(
        "unknown",
        r"(?P<detail>[^\n\r]*)[\r\n]+pykvm: the agent ended with [1-9]",
        "pykvm's own agent in the guest failed ({detail})",
    ),
    _rule("kernel", r"Kernel panic - not syncing: (?P<detail>[^\n\r]*)", "its kernel panicked: {detail}"),
    _rule("kernel", r"BUG: (?P<detail>[^\n\r]*)", "its kernel reported a bug: {detail}"),
    _rule("kernel", r"general protection fault[^\n\r]*", "its kernel met a general protection fault"),
    _rule(
        "unknown",
        r"qemu-system-x86_64: (?!warning: )(?P<detail>[^\n\r]+)",
        "QEMU ended with the words '{detail}'",
        "qemu-tcg",
        "qemu-kvm",
    ),
)
_KVM_FRAME = re.compile(r"\b(?:kvm|svm|vmx|tdp_mmu|mmu_)\w*\+0x|\[kvm(?:_amd|_intel)?\]")


def diagnose(console: str, slug: str, running: bool) -> Diagnosis:
    """The cause that ``console`` shows under the emulator ``slug``.

    ``running``: whether the command had started.
    """
    for rule in _RULES:
        if rule.emulators and slug not in rule.emulators:
            continue
        found = rule.pattern.search(console)
        if not found:
            continue
        detail = {key: value.strip() for key, value in found.groupdict().items()}
        sentence = rule.sentence.format(**detail)
        if rule.blame == "kernel":
            inside = "KVM is" if _KVM_FRAME.search(console[found.start() :]) else "KVM is not"
            sentence += f" ({inside} in its stack; under an emulator the cause may be the emulator's)"
        return Diagnosis(rule.blame, sentence)
    if running:
        return Diagnosis("unknown", "the emulator ended while the command ran, without a word on the console")
    return Diagnosis("unknown", "it ended before its command started, without a word on the console")
