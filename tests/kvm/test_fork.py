"""A VM belongs to the process that made it (docs/reference/hosts.md C.4)."""

from __future__ import annotations

import pytest

from tests.kvm.processes import in_a_process

FORK = """
import errno, os, sys
from pykvm.errors import KvmError
from pykvm.kvm import KvmSystem
from tests.kvm.tiny import DATA, Tiny, done
with KvmSystem() as system, Tiny(system.create_machine(), pages=64) as guest:
    assert done(guest.store(DATA))
    child = os.fork()
    if not child:
        problems = []
        calls = {
            "run": guest.vcpu.run, "get_registers": guest.vcpu.get_registers,
            "get_dirty_log": lambda: guest.vm.get_dirty_log(guest.slot), "create_vcpu": guest.vm.create_vcpu,
            "delete": guest.slot.delete,
        }
        for name, call in calls.items():
            try:
                call()
            except KvmError as error:
                if error.errno != errno.EIO or "fork" not in str(error):
                    problems.append(f"{name}: {error}")
            else:
                problems.append(f"{name} worked")
        print(problems, flush=True)
        os._exit(bool(problems))
    _, status = os.waitpid(child, 0)
    assert done(guest.store(DATA + 1))
    assert guest.vm.get_dirty_log(guest.slot).tolist() == [DATA, DATA + 1]
    sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.kvm
def test_a_forked_child_gets_an_error_and_the_parent_goes_on() -> None:
    """hosts.md C.4: EIO, with a sentence that says why."""
    in_a_process(FORK)


RING_FORK = """
import errno, os, sys
from pykvm.errors import KvmError
from pykvm.kvm import KvmSystem
from tests.kvm.tiny import DATA, Tiny, done
from tests.rings import LEAST_RING
with KvmSystem() as system, system.create_machine() as vm:
    vm.enable_dirty_ring(LEAST_RING)
    with Tiny(vm, pages=64) as guest:
        vm.collect_rings()
        assert done(guest.store(DATA))
        child = os.fork()
        if not child:
            try:
                vm.collect_rings()
            except KvmError as error:
                os._exit(error.errno != errno.EIO)
            os._exit(2)
        _, status = os.waitpid(child, 0)
        assert (0, DATA) in vm.collect_rings().pages
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.kvm
def test_a_forked_child_does_not_take_the_parents_ring_entries() -> None:
    """The ring is shared memory: entries marked by the child would be missing in the parent's collection."""
    in_a_process(RING_FORK)
