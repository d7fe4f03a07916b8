"""Why a lab died, read off consoles.

The samples are what kernels and emulators print, cut to a few lines.
"""

from __future__ import annotations

import pytest

from pykvm.lab.diagnosis import diagnose

SYSRQ = """[    5.1] sysrq: Trigger a crash
[    5.1] Kernel panic - not syncing: sysrq triggered crash
[    5.1] CPU: 0 PID: 93 Comm: sh Not tainted 6.1.0-56-cloud-amd64
[    5.1]  <TASK>
[    5.1]  sysrq_handle_crash+0x16/0x20
"""
IN_KVM = """[   80.2] BUG: unable to handle page fault for address: ffffc90000a3d000
[   80.2] Oops: 0002 [#1] PREEMPT SMP NOPTI
[   80.2] RIP: 0010:tdp_mmu_set_spte_atomic+0x3a/0x120 [kvm]
"""
PATCHING = """[    1.9] invalid opcode: 0000 [#1] SMP
[    1.9] RIP: 0010:text_poke_bp_batch+0x9f/0x2a0
[    1.9] invalid opcode: 0000 [#2] SMP
"""
PATCHING_ONCE = """[    1.9] invalid opcode: 0000 [#1] SMP
[    1.9] RIP: 0010:text_poke_bp_batch+0x9f/0x2a0
[    1.9] Kernel panic - not syncing: Fatal exception
"""


@pytest.mark.parametrize(
    ("console", "slug", "blame", "says"),
    [
        (SYSRQ, "qemu-tcg", "kernel", "sysrq triggered crash (KVM is not in its stack"),
        (IN_KVM, "qemu-tcg", "kernel", "(KVM is in its stack"),
        (PATCHING, "qemu-tcg", "emulator", "patching its own text"),
        (PATCHING_ONCE, "qemu-tcg", "emulator", "patching its own text"),
        ("[  1.0] Initramfs unpacking failed: write error\n", "qemu-tcg", "memory", "--memory"),
        ("Out of memory: Killed process 99 (python3) total-vm:1", "bochs", "memory", "--memory"),
        ("qemu: fatal: Trying to execute code outside RAM", "qemu-tcg", "emulator", "outside RAM"),
        (">>PANIC<< prefetch: running in bogus memory", "bochs", "emulator", "bogus memory"),
        ("KeyError: 'argv'\r\npykvm: the agent ended with 1\r\n", "qemu-tcg", "unknown", "KeyError"),
        ("qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory", "qemu-tcg",
         "memory", "less with --memory"),
        ("qemu-system-x86_64: Could not access KVM kernel module", "qemu-kvm", "unknown", "access KVM"),
        ("qemu-system-x86_64: warning: TCG doesn't support it", "qemu-tcg", "unknown", "without a word"),
        (SYSRQ + "qemu-system-x86_64: terminating on signal 15", "qemu-tcg", "kernel", "sysrq"),
        ("", "qemu-tcg", "unknown", "without a word"),
    ],
)  # fmt: skip
def test_the_cause_is_named(console: str, slug: str, blame: str, says: str) -> None:
    found = diagnose(console, slug, running=True)
    assert found.blame == blame
    assert says in found.sentence


def test_a_bug_of_one_emulator_is_not_seen_under_another() -> None:
    """A guest may print anything: only Bochs can say that Bochs panicked."""
    assert diagnose(">>PANIC<< words", "qemu-tcg", running=True).blame == "unknown"


@pytest.mark.parametrize("message", ["ACPI control: soft power off", "the guest was reset"])
def test_a_guest_that_ends_itself_is_no_bug_of_bochs(message: str) -> None:
    """Bochs writes the same word for it; what the kernel said before counts."""
    log = f"00885785890p[ACPI  ] >>PANIC<< {message}\n"
    assert diagnose(log, "bochs", running=True).blame == "unknown"
    assert diagnose(SYSRQ + log, "bochs", running=True).blame == "kernel"


def test_before_the_command_is_told_from_during_it() -> None:
    assert "before its command started" in diagnose("", "bochs", running=False).sentence
