"""What can be broken in changing mappings: page faults, write-tracking, deletion of a slot, shadow paging."""

from __future__ import annotations

from pykvm.model.interleave.mutation import Mutation
from pykvm.model.interleave.rules import Repair

FAULTS = (
    Mutation(
        "fast-mark-before-cmpxchg",
        "bitmap",
        {"fast_order": ("mark", "cmpxchg")},
        "The fast page fault marks the page dirty first and sets W=1 then.",
        "A collection in between takes the mark. It finds W=0 already, so the SPTE does not change, the "
        "compare-and-exchange succeeds, and the page is writable without a bit.",
        "Mark after the compare-and-exchange (kvm-mmu.md 11.2). A collection in between misses the page, "
        "but the mark is still to come, and the next one has it; the last one is after all vCPUs left "
        "KVM_RUN, so after their marks.",
    ),
    Mutation(
        "fast-without-compare",
        "tracking",
        {"fast_compares": False},
        "The fast page fault stores the SPTE instead of a compare-and-exchange.",
        "A page that became write-tracked in between gets W and MMU-writable back.",
        "The compare-and-exchange fails when anything in the SPTE has changed, and all is looked at again "
        "(kvm-mmu.md 11.2, locking.rst 2).",
    ),
    Mutation(
        "fast-without-compare-removal",
        "removal",
        {"fast_compares": False},
        "The same while the slot is being deleted.",
        "The SPTE was zapped in between and comes back. The guest writes memory that userspace has taken "
        "back.",
        "As before: a zapped SPTE does not compare equal (kvm-mmu.md 11.2).",
    ),
    Mutation(
        "fast-without-compare-logging",
        "bitmap",
        {"fast_compares": False},
        "The same, and nothing else goes on but logging.",
        "Logging changes only W, from 1 to 0. Whoever stores W=1 after that marks the page after that, "
        "too. The compare is there for the other changes.",
        "See fast-without-compare.",
        harmless=True,
    ),
    Mutation(
        "fast-ignores-mmu-writable",
        "tracking",
        {"fast_needs_mmu_writable": False},
        "The fast page fault looks at W only, and not at MMU-writable.",
        "The fault looked at the track count before the page was tracked. The SPTE that it reads is "
        "protected for good, but it looks as one that logging protected.",
        "MMU-writable tells why W is 0 (kvm-mmu.md 8): 110 may be fixed without a lock, 100 may not.",
    ),
    Mutation(
        "fault-without-first-look",
        "tracking",
        {"fault_looks_at_tracking": False},
        "A page fault does not look at the track count before it takes the fast path or mmu_lock.",
        "The fast path meets an SPTE that is not MMU-writable, and the slow path looks at the count under "
        "mmu_lock. The first look saves time; no schedule here needs it.",
        "page_fault_handle_page_track comes first all the same (kvm-mmu.md 7.2, 9). The look that counts is "
        "the one of slow-without-recheck.",
        harmless=True,
    ),
    Mutation(
        "slow-without-recheck",
        "tracking",
        {"slow_rechecks_tracking": False},
        "The slow page fault relies on the track count that was read before mmu_lock.",
        "The page becomes tracked in between, and the fault makes it writable again.",
        "make_spte asks mmu_try_to_unsync_pages under mmu_lock, which refuses tracked gfns (kvm-mmu.md 8, "
        "10.5).",
    ),
    Mutation(
        "tdp-without-compare",
        "tdp-ring",
        {"slow_compares": False},
        "A fault of the TDP MMU stores the SPTE, though other faults hold mmu_lock for reading, too.",
        "All that another fault or a fast page fault does meanwhile is to set W=1 in the same SPTE, and "
        "each marks for itself. Protection and zapping wait for the lock here.",
        "KVM compares and exchanges (kvm-mmu.md 11.1): SPTEs of tables are installed the same way, and KVM "
        "zaps obsolete roots under the shared lock.",
        harmless=True,
    ),
)

TRACKING = (
    Mutation(
        "track-without-flush",
        "tracking",
        {"track_order": ("count", "protect", "return")},
        "Adding a page to tracking protects it and flushes no TLB.",
        "A store through a stale translation reaches the page, and the tracker is not told.",
        "Full remote flush before the add returns (kvm-mmu.md 9).",
    ),
    Mutation(
        "track-flush-after-return",
        "tracking",
        {"track_order": ("count", "protect", "return", "flush")},
        "The flush comes late, after the add has returned.",
        "Logging may do that (get-flush-after-return), tracking may not: what a store changed can be "
        "copied later, but a notification that was not given is missing for ever.",
        "The flush comes before the add returns, under mmu_lock (kvm-mmu.md 9).",
    ),
    Mutation(
        "track-flush-by-w",
        "tracking-logging",
        {"track_flush_by_mmu_writable": False},
        "The add flushes only if it found W=1.",
        "GET_DIRTY_LOG has cleared W and not flushed yet, since logging may flush late. The add finds W=0, "
        "thinks that nobody can have it cached, and returns.",
        "Whether a flush is due is asked of MMU-writable, which logging does not clear (kvm-mmu.md 8).",
    ),
    Mutation(
        "track-keeps-mmu-writable",
        "tracking",
        {"track_clears_mmu_writable": False},
        "The add clears W and leaves MMU-writable set.",
        "An SPTE that logging had protected does not change at all, so the compare-and-exchange of a fast "
        "page fault that is under way succeeds.",
        "Protection for tracking clears MMU-writable, protection for logging does not (kvm-mmu.md 8, 9).",
    ),
    Mutation(
        "track-protect-before-count",
        "tracking",
        {"track_order": ("protect", "count", "flush", "return")},
        "The add protects first and counts then.",
        "Both are done under mmu_lock. Who reads the count without the lock and sees 0 meets an SPTE that "
        "is not MMU-writable, and then waits for the lock.",
        "KVM counts first (kvm-mmu.md 9); the lock makes the order of the two irrelevant.",
        harmless=True,
    ),
)

REMOVAL = (
    Mutation(
        "remove-without-wait",
        "removal",
        {"remove_order": ("invalidate", "zap", "flush", "delete", "free")},
        "The slot is freed without any wait for SRCU readers.",
        "A page fault that found the slot marks the page in a bitmap that was freed.",
        "synchronize_srcu after each publication of memslots; faults run in a read section (kvm-mmu.md 2, "
        "locking.rst).",
    ),
    Mutation(
        "remove-without-first-wait",
        "removal",
        {"remove_order": ("invalidate", "zap", "flush", "delete", "wait", "free")},
        "INVALID is published, and mappings are zapped without waiting for readers of the memslots before.",
        "A fault that found the slot still VALID installs an SPTE after the zap. The guest writes memory "
        "that userspace has taken back.",
        "The wait after INVALID: no fault that has not seen it is left when the zap begins (kvm-mmu.md 2). "
        "Where everything is zapped, the fault's root has become obsolete, too, which it notices; with "
        "QUIRK_SLOT_ZAP_ALL disabled there is only the wait.",
    ),
    Mutation(
        "remove-without-second-wait",
        "removal",
        {"remove_order": ("invalidate", "wait", "zap", "flush", "delete", "free")},
        "The slot is freed without waiting for those who found it INVALID.",
        "The fast page fault does not ask for INVALID: it fixes the SPTE before the zap, and marks the "
        "page after the bitmap was freed.",
        "The wait after the memslots without the slot were published (kvm-mmu.md 2).",
    ),
    Mutation(
        "remove-without-flush",
        "removal",
        {"remove_order": ("invalidate", "wait", "zap", "delete", "wait", "free")},
        "The SPTEs are zapped and no TLB is flushed.",
        "A stale translation leads to memory that userspace has taken back.",
        "The zap ends with a flush, under mmu_lock (kvm-mmu.md 2).",
    ),
)

UNSYNC = (
    Mutation(
        "unsync-after-writable",
        "unsync",
        {"unsync_order": ("writable", "unsync")},
        "The SPTE of the table's page gets W=1 before the shadow page is unsync.",
        "Another vCPU writes the table without a fault and flushes. Its sync asks without mmu_lock whether "
        "anything is unsync, hears no, and the guest goes on with the old translation.",
        "unsync first, a write barrier, then W=1 (kvm-mmu.md 10.5; mmu_try_to_unsync_pages).",
    ),
    Mutation(
        "sync-without-flush",
        "unsync",
        {"sync_order": ("protect", "copy", "clear")},
        "The sync protects the table's page and flushes no TLB.",
        "Another vCPU writes the table through a stale translation after it was copied. The shadow page "
        "counts as in step, so the flush of that vCPU syncs nothing.",
        "Protect, flush, then sync the SPTEs (kvm-mmu.md 10.5, mmu_sync_children).",
    ),
    Mutation(
        "sync-copy-before-protect",
        "unsync",
        {"sync_order": ("copy", "protect", "flush", "clear")},
        "The SPTE is built from the gPTE while the table can still be written.",
        "A write between the copy and the protection is never synced.",
        "Protect, flush, then sync the SPTEs (kvm-mmu.md 10.5, mmu_sync_children).",
    ),
    Mutation(
        "sync-clear-before-copy",
        "unsync",
        {"sync_order": ("protect", "flush", "clear", "copy")},
        "The root says that nothing is unsync before the SPTE is in step.",
        "Another vCPU flushes at that moment, believes it, and uses the SPTE that is not in step yet.",
        "The parents' unsync_children, which are asked without mmu_lock, are cleared after the sync (kvm-"
        "mmu.md 10.5, mmu_sync_children).",
    ),
)

SHADOW = (
    Mutation(
        "shadow-compare",
        "shadow-remap",
        {"shadow_repair": Repair.COMPARE},
        "A write fault on a log-protected shadow SPTE is fixed without a walk and without mmu_lock; the "
        "gfn to mark is what was remembered of the SPTE, and only the SPTE is compared.",
        "Meanwhile the page frame went to another gfn, and the guest made X lead there. The new SPTE "
        "equals the old one, bit for bit (ABA). W is set for the one gfn and the other one is marked.",
        "KVM takes the slow path for shadow pages (kvm-mmu.md 7.3, 11.2; locking.rst 2.1). The SPTE of a "
        "direct page has one gfn for ever.",
    ),
    Mutation(
        "shadow-look-again",
        "shadow-remap",
        {"shadow_repair": Repair.LOOK_AGAIN},
        "The same, and after the compare-and-exchange the gfn is looked up again and marked, too.",
        "The SPTE may have changed twice. The gfn that was written lies between the two that were looked up.",
        "None: looking before and after does not tell what it was at the moment of the exchange.",
    ),
    Mutation(
        "shadow-pin",
        "shadow-remap",
        {"shadow_repair": Repair.PIN},
        "The same without a second look; the frame of the gfn is pinned before the exchange and until the "
        "mark.",
        "While the frame is pinned, no other gfn gets it, so an SPTE with this frame is of this gfn.",
        "The solution that locking.rst 2.1 proposes.",
        harmless=True,
    ),
    Mutation(
        "shadow-pin-alias",
        "shadow-alias",
        {"shadow_repair": Repair.PIN},
        "The same, and two gfns have one page frame from the beginning: two slots on one memory.",
        "The guest makes X lead to the other gfn. The frame is the same, pinned or not, and the wrong gfn "
        "is marked.",
        "KVM takes the slow path for shadow pages. A pin shows that the frame stayed, not the gfn.",
    ),
    Mutation(
        "shadow-tag",
        "shadow-remap",
        {"shadow_repair": Repair.TAG},
        "What is compared tells the gfn as well as the SPTE, as spare bits of the SPTE could.",
        "An SPTE of another gfn does not compare equal, whatever frame it has.",
        "Not in KVM.",
        harmless=True,
    ),
    Mutation(
        "shadow-tag-alias",
        "shadow-alias",
        {"shadow_repair": Repair.TAG},
        "The same with two slots on one memory.",
        "The gfn is compared, so it does not matter that the frames are the same.",
        "Not in KVM.",
        harmless=True,
    ),
    Mutation(
        "shadow-without-compare",
        "shadow-forbid",
        {"shadow_repair": Repair.TAG, "shadow_compares": False},
        "The lockless path stores the SPTE without comparing it.",
        "The guest has made X read-only and flushed: the sync cleared W and MMU-writable, and the store "
        "brings them back. The guest's own protection is gone.",
        "Without a walk the SPTE is all that tells what the guest allows: MMU-writable holds it, and the "
        "compare-and-exchange makes sure that it still does (kvm-mmu.md 8).",
    ),
    Mutation(
        "shadow-keeps-mmu-writable",
        "shadow-table",
        {"shadow_repair": Repair.TAG, "shadowing_clears_mmu_writable": False},
        "A gfn becomes a page table that KVM shadows, and its SPTE keeps MMU-writable.",
        "The lockless path makes the page table writable, and KVM does not learn of a write to it: the "
        "shadow of it stays as it was.",
        "account_shadowed protects as tracking does and clears MMU-writable (kvm-mmu.md 10.3).",
    ),
    Mutation(
        "shadow-ignores-dirty",
        "shadow-clean",
        {"shadow_repair": Repair.TAG, "shadow_mmu_writable_needs_dirty": False},
        "A read fault with D clear in the gPTE leaves MMU-writable set in the SPTE.",
        "The lockless path does not walk, so nobody sets D in the gPTE. The guest's own dirty tracking "
        "loses the write.",
        "A read fault with D clear builds the SPTE without write access, so without MMU-writable (kvm-"
        "mmu.md 5.1, 8). The 2012 proposal kept a copy of the gPTE's A and D for it (9.2).",
    ),
)
