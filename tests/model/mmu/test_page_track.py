"""Page write-tracking of the model: kvm-mmu.md 9, line by line."""

from __future__ import annotations

import errno

import pytest

from pykvm.errors import KvmError
from pykvm.model.mmu.memslots import Memslot
from pykvm.model.mmu.page_track import MAX_COUNT
from pykvm.profiles import WriteTrackAllocation
from tests.model.mmu.foundation import Rig


class Node:
    """An external user that writes down what it hears, into a list that it may share with others."""

    def __init__(self, name: str = "", heard: list[tuple[object, ...]] | None = None) -> None:
        self.name = name
        self.heard: list[tuple[object, ...]] = [] if heard is None else heard

    def track_write(self, gpa: int, new: bytes) -> None:
        self.heard.append((self.name, "write", gpa, new))

    def track_remove_region(self, gfn: int, pages: int) -> None:
        self.heard.append((self.name, "remove", gfn, pages))


# --- counts ----------------------------------------------------------------------------------------


def test_add_and_remove_count() -> None:
    """9: plain reference counts shared by all users; only 1 to 0 makes the gfn untracked (9.1)."""
    rig = Rig()
    slot, track = rig.slot(), rig.mmu.page_track
    assert not track.is_tracked(slot, 7)
    for count in (1, 2, 3):
        track.add(slot, 7)
        assert track.count(slot, 7) == count
    for count in (2, 1):
        track.remove(slot, 7)
        assert track.count(slot, 7) == count
        assert track.is_tracked(slot, 7)
    track.remove(slot, 7)
    assert not track.is_tracked(slot, 7)
    assert slot.gfn_write_track == {}, "what is not tracked costs nothing"
    assert not track.is_tracked(slot, 8)


def test_adding_protects_every_mapping_and_flushes_at_once() -> None:
    """9, add: every SPTE of all levels, in both MMUs; a full flush if anything changed."""
    rig = Rig(vcpus=2)
    slot, track = rig.slot(), rig.mmu.page_track
    track.add(slot, 7)
    assert rig.tables.take() == [("write_protect_gfn", 0, 7, 1)]
    assert rig.flushes == 1
    assert [vcpu.tlb_flushes for vcpu in rig.vcpus] == [1, 1]
    rig.tables.flush = False
    track.add(slot, 7)
    assert rig.tables.take() == [("write_protect_gfn", 0, 7, 1)]
    assert rig.flushes == 1


def test_removing_touches_no_mapping() -> None:
    """9, remove: mappings become writable lazily on the next fault."""
    rig = Rig()
    slot, track = rig.slot(), rig.mmu.page_track
    track.add(slot, 7)
    rig.tables.take()
    track.remove(slot, 7)
    assert rig.tables.take() == []
    assert rig.flushes == 1


def test_a_tracked_gfn_is_never_in_a_large_page() -> None:
    """9: disallow_lpage +1 at 2M and 1G with each add, -1 with each remove."""
    rig = Rig()
    slot, track = rig.slot(pages=1 << 18), rig.mmu.page_track
    assert not slot.lpage_disallowed(700, 2)
    track.add(slot, 700)
    track.add(slot, 700)
    assert slot.lpage_disallowed(1023, 2)
    assert slot.lpage_disallowed(0, 3)
    assert not slot.lpage_disallowed(1024, 2)
    track.remove(slot, 700)
    assert slot.lpage_disallowed(700, 2)
    track.remove(slot, 700)
    assert not slot.lpage_disallowed(700, 2)
    assert not slot.lpage_disallowed(700, 3)


def test_the_16_bits_are_never_left() -> None:
    """9: a change that would leave 0 to 65535 is ignored (and warned about); the caller does the rest of its
    work all the same."""
    rig = Rig()
    slot, track = rig.slot(pages=1024), rig.mmu.page_track
    assert MAX_COUNT == 65535
    assert slot.gfn_write_track is not None
    slot.gfn_write_track[7] = MAX_COUNT - 1
    track.add(slot, 7)
    assert (track.count(slot, 7), track.ignored) == (MAX_COUNT, 0)
    rig.tables.take()
    track.add(slot, 7)
    assert (track.count(slot, 7), track.ignored) == (MAX_COUNT, 1)
    assert rig.tables.take() == [("write_protect_gfn", 0, 7, 1)]
    assert slot.disallow_lpage[2, 0] == 2
    track.remove(slot, 9)
    assert (track.count(slot, 9), track.ignored) == (0, 2)
    assert slot.disallow_lpage[2, 0] == 1


def test_tracking_and_logging_are_independent() -> None:
    """9: a tracked gfn is logged through the emulator's own mark; tracking alone marks nothing."""
    rig = Rig()
    slot = rig.slot()
    rig.mmu.page_track.add(slot, 7)
    assert rig.log(slot) == []
    rig.mark(slot, 7)
    assert rig.log(slot) == [7]
    assert rig.mmu.page_track.count(slot, 7) == 1


# --- address spaces --------------------------------------------------------------------------------


@pytest.mark.parametrize(("era", "both"), [("6.1", True), ("6.12", False), ("6.18", False), ("7.2", True)])
def test_the_query_looks_in_both_address_spaces_or_in_its_own(era: str, both: bool) -> None:
    """9, query: [6.1] and [7.2] both; [6.12] the slot's own, so that SMM sees an untracked page (15.37)."""
    rig = Rig("amd-shadow", era)
    normal, smm = rig.slot(0), rig.slot(1 << 16)
    track = rig.mmu.page_track
    track.add(smm, 7)
    assert track.is_tracked(smm, 7)
    assert track.is_tracked(normal, 7) is both
    assert track.count(normal, 7) == 0
    assert not track.is_tracked(normal, 8)
    track.remove(smm, 7)
    track.add(normal, 7)
    assert track.is_tracked(smm, 7) is both


def test_a_gfn_that_only_one_space_has() -> None:
    rig = Rig("amd-shadow", "7.2")
    normal = rig.slot(0, gfn=0)
    smm = rig.slot(1 << 16, gfn=0x1000)
    track = rig.mmu.page_track
    track.add(normal, 7)
    track.add(smm, 0x1007)
    assert track.is_tracked(normal, 7)
    assert track.is_tracked(smm, 0x1007)
    assert not track.is_tracked(None, 7)
    one_space = Rig("pvm-shadow", "7.2")
    slot = one_space.slot()
    assert not one_space.mmu.page_track.is_tracked(slot, 7)


def test_aliases_are_tracked_by_gfn_not_by_memory() -> None:
    """9: the count belongs to the gfn; the same memory at another gfn is written unnoticed."""
    rig = Rig()
    low, high = rig.slot(0), rig.slot(1, gfn=0x1000)
    rig.mmu.page_track.add(low, 7)
    assert not rig.mmu.page_track.is_tracked(high, 0x1007)


# --- external users --------------------------------------------------------------------------------


def test_an_external_user_adds_and_removes_by_gfn() -> None:
    """9: ``kvm_write_track_add_gfn``: EINVAL where the gfn has no slot."""
    rig = Rig()
    slot, track = rig.slot(gfn=0x100), rig.mmu.page_track
    track.register(Node())
    track.add_gfn(0x107)
    assert track.count(slot, 0x107) == 1
    track.remove_gfn(0x107)
    assert track.count(slot, 0x107) == 0
    for call in (track.add_gfn, track.remove_gfn):
        with pytest.raises(KvmError) as caught:
            call(7)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.operation == f"kvm_write_track_{call.__name__}"


def test_the_latest_registered_is_called_first() -> None:
    """9.1: new nodes are added at the front."""
    rig = Rig()
    heard: list[tuple[object, ...]] = []
    first, second = Node("first", heard), Node("second", heard)
    rig.mmu.page_track.register(first)
    rig.mmu.page_track.register(second)
    rig.mmu.page_track.notify_write(0x7008, b"\x01\x02")
    assert heard == [("second", "write", 0x7008, b"\x01\x02"), ("first", "write", 0x7008, b"\x01\x02")]
    heard.clear()
    rig.mmu.page_track.unregister(second)
    rig.mmu.page_track.notify_write(0x7008, b"\x03")
    assert heard == [("first", "write", 0x7008, b"\x03")]


def test_writes_are_told_of_tracked_or_not() -> None:
    """9: every emulated RAM write is delivered; receivers filter."""
    rig = Rig()
    rig.slot()
    node = Node()
    rig.mmu.page_track.register(node)
    rig.mmu.page_track.notify_write(0x9000, b"\xff")
    assert node.heard == [("", "write", 0x9000, b"\xff")]


def test_unregistering_leaves_the_counts() -> None:
    """9.1: the user removes each gfn itself."""
    rig = Rig()
    slot, track = rig.slot(), rig.mmu.page_track
    node = Node()
    track.register(node)
    track.add_gfn(7)
    track.unregister(node)
    assert track.count(slot, 7) == 1
    track.notify_write(0x7000, b"\0")
    assert node.heard == []


@pytest.mark.parametrize("era", ["6.1", "6.12", "7.2"])
def test_users_are_told_when_a_slot_goes(era: str) -> None:
    """9.1: base gfn and pages; its counts vanish with the metadata, and a later remove has no slot."""
    rig = Rig("amd-shadow", era)
    rig.slot(gfn=0x100, pages=16)
    node = Node()
    rig.mmu.page_track.register(node)
    rig.mmu.page_track.add_gfn(0x107)
    rig.set(gfn=0x100, pages=0)
    assert node.heard == [("", "remove", 0x100, 16)]
    with pytest.raises(KvmError) as caught:
        rig.mmu.page_track.remove_gfn(0x107)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("era", "order"), [("6.1", "told, zapped"), ("6.12", "zapped, told"), ("7.2", "zapped, told")]
)
def test_kvm_s_own_node_is_the_last_one_in_6_1(era: str, order: str) -> None:
    """9.1: registered at VM creation, and new ones go to the front; since it is no node, KVM zaps first."""
    rig = Rig("amd-shadow", era)
    rig.slot()
    happened: list[str] = []
    node = Node()
    node.track_remove_region = lambda *_: happened.append("told")  # type: ignore[method-assign]
    rig.tables.zap_all_fast = lambda: happened.append("zapped")  # type: ignore[method-assign]
    rig.mmu.page_track.register(node)
    rig.set(pages=0)
    assert ", ".join(happened) == order


def test_a_node_may_leave_while_it_is_called() -> None:
    """9.1: the list is walked under its own protection."""
    rig = Rig()
    track = rig.mmu.page_track
    heard: list[tuple[object, ...]] = []
    last = Node("last", heard)

    class Leaving(Node):
        def track_write(self, gpa: int, new: bytes) -> None:
            super().track_write(gpa, new)
            track.unregister(self)

    track.register(last)
    track.register(Leaving("leaving", heard))
    track.notify_write(0, b"a")
    track.notify_write(0, b"b")
    assert [entry[0] for entry in heard] == ["leaving", "last", "last"]


# --- when the counts are allocated -----------------------------------------------------------------


def allocated(*slots: Memslot) -> list[bool]:
    return [slot.gfn_write_track is not None for slot in slots]


ALLOCATION = {
    # kind, era, built with external tracking, policy: with the slot, after a user, after a shadow root
    "shadow paging, any policy": ("amd-shadow", {}, [True, True, True]),
    "[6.1] built for KVMGT": ("amd-npt", {"era": "6.1"}, [True, True, True]),
    "[6.1] built without": ("amd-npt", {"era": "6.1", "external_write_tracking": False}, [False, None, True]),
    "first shadow root": (
        "amd-npt",
        {"write_track_allocation": WriteTrackAllocation.SHADOW_ROOT, "external_write_tracking": False},
        [False, None, True],
    ),
    "on demand": ("amd-npt", {"era": "6.12"}, [False, True, True]),
    "on demand, EPT": ("intel-ept", {"era": "7.2"}, [False, True, True]),
    "on demand, older MMU": ("amd-npt-oldmmu", {"era": "6.12"}, [False, True, True]),
}


@pytest.mark.parametrize("name", ALLOCATION)
@pytest.mark.parametrize("event", ["slot", "user", "root"])
def test_who_allocates_the_counts(name: str, event: str) -> None:
    """9, allocation points: slot creation when enabled, first shadow root, first external user; each for all
    slots of all address spaces, and for those that come later."""
    kind, changes, expected = ALLOCATION[name]
    expect = dict(zip(("slot", "user", "root"), expected, strict=True))[event]
    if expect is None:
        pytest.skip("a kernel without external write tracking has no external users")
    rig = Rig(kind, **changes)  # type: ignore[arg-type]
    first, smm = rig.slot(0), rig.slot(1 << 16)
    assert allocated(first, smm) == [expected[0]] * 2
    if event == "user":
        rig.mmu.page_track.register(Node())
    elif event == "root":
        rig.mmu.shadow.first_shadow_root()
    later = rig.slot(1, gfn=0x1000)
    assert allocated(first, smm, later) == [expect] * 3
    if not expect:
        assert not rig.mmu.page_track.is_tracked(first, 7)


def test_what_was_allocated_stays() -> None:
    """9: one-way flags, never shrunk; freed with the slot."""
    rig = Rig("amd-npt")
    slot = rig.slot()
    node = Node()
    rig.mmu.page_track.register(node)
    rig.mmu.page_track.add_gfn(7)
    rig.mmu.page_track.unregister(node)
    assert rig.mmu.page_track.count(slot, 7) == 1
    assert allocated(slot, rig.slot(1, gfn=0x1000)) == [True, True]
    rig.mmu.page_track.register(node)
    assert rig.mmu.page_track.count(slot, 7) == 1, "registering again must not empty what is there"


def test_a_first_shadow_root_keeps_the_counts_of_an_external_user() -> None:
    """9: who allocates passes over slots that have their counts already."""
    rig = Rig("amd-npt")
    slot = rig.slot()
    rig.mmu.page_track.register(Node())
    rig.mmu.page_track.add_gfn(7)
    rig.mmu.shadow.first_shadow_root()
    assert rig.mmu.page_track.count(slot, 7) == 1
    assert slot.rmap is not None


def test_counts_are_new_after_a_move() -> None:
    """kvm-mmu.md 2: freed and reallocated, all zero."""
    rig = Rig("amd-shadow", "6.1")
    slot = rig.slot()
    rig.mmu.page_track.add(slot, 7)
    rig.set(gfn=0x1000, pages=256, flags=1)
    assert slot.gfn_write_track == {}
    assert not rig.mmu.page_track.is_tracked(slot, 0x1007)
