"""What can be broken in collecting dirty pages: GET and CLEAR, rings, PML, writes without a vCPU."""

from __future__ import annotations

from pykvm.model.interleave.mutation import Mutation

GET = (
    Mutation(
        "get-without-flush",
        "bitmap",
        {"get_order": ("kick", "xchg", "protect", "read")},
        "GET_DIRTY_LOG clears W in the SPTEs and flushes no TLB.",
        "A vCPU still has the translation from before and stores through it after userspace has copied the "
        "page. No fault, no mark.",
        "One remote TLB flush after the words were exchanged and protected, before GET returns (kvm-mmu.md "
        "3.2).",
    ),
    Mutation(
        "get-flush-before-protect",
        "bitmap",
        {"get_order": ("kick", "xchg", "flush", "protect", "read")},
        "The flush comes before W is cleared.",
        "Between the two a vCPU walks, finds W=1 and caches it. It is as if there had been no flush.",
        "First the tables, then the flush (kvm-mmu.md 3.2).",
    ),
    Mutation(
        "get-without-protect",
        "bitmap",
        {"get_order": ("kick", "xchg", "flush", "read")},
        "GET_DIRTY_LOG takes the bits and flushes, but leaves W=1.",
        "The next store walks and goes through without a fault.",
        "Each bit that is taken re-arms its page (kvm-mmu.md 3.2, 'rearm').",
    ),
    Mutation(
        "get-copy-before-protect",
        "bitmap",
        {"get_order": ("kick", "xchg", "read", "protect", "flush")},
        "The contents are copied when the bits are known, before the pages are protected.",
        "A store between the copy and the protection needs no fault, and its bit was taken already.",
        "GET returns after protection and flush, so whatever userspace reads then is newer (kvm-mmu.md 3.1).",
    ),
    Mutation(
        "get-flush-after-return",
        "bitmap",
        {"get_order": ("kick", "xchg", "protect", "return", "flush", "read")},
        "GET_DIRTY_LOG returns first; the flush comes late, but before the contents are copied.",
        "Until the flush stores go through stale translations, and all of them are in the copy. For "
        "logging it is enough that the flush comes before the contents are read.",
        "KVM itself flushes after it has released mmu_lock (kvm-mmu.md 3.2). Compare track-flush-after-"
        "return.",
        harmless=True,
    ),
    Mutation(
        "get-without-exclusion",
        "tdp-bitmap",
        {"protect_locks": False},
        "GET_DIRTY_LOG does not exclude faults of the TDP MMU: it holds mmu_lock for reading as they do, or "
        "not at all.",
        "make_spte marks before the SPTE is there. The collection takes the mark, finds nothing to protect, "
        "and copies; then the SPTE is installed with W=1. Compare-and-exchange does not help: the SPTE was "
        "not present before and is not present after the protection.",
        "GET, CLEAR and RESET protect under mmu_lock for writing, which waits for faults (kvm-mmu.md 3.2).",
    ),
    Mutation(
        "pause-without-waiting",
        "bitmap",
        {"pause_waits": False},
        "For the last collection userspace asks the vCPUs to stop and does not wait until KVM_RUN has "
        "returned.",
        "One vCPU is between the compare-and-exchange of its fast page fault and the mark. Another one has "
        "used the new W=1 already. The mark comes when the last collection is over.",
        "The last collection comes after KVM_RUN has returned on every vCPU: what a fault has begun is then "
        "done (kvm-mmu.md 11.2, 15.13).",
    ),
    Mutation(
        "manual-copy-before-clear",
        "manual",
        {"manual_order": ("get", "read", "clear", "protect", "flush")},
        "With manual protect, userspace copies the pages between GET and CLEAR.",
        "A store after the copy sets no new bit, since the bit is still set, and CLEAR takes it away.",
        "CLEAR, then copy: only CLEAR re-arms (kvm-mmu.md 3.1).",
    ),
    Mutation(
        "manual-clear-unread",
        "manual",
        {"clear_only_what_was_read": False},
        "CLEAR clears all bits, and not only those that GET has returned.",
        "A bit that was set after GET is cleared unseen.",
        "CLEAR_DIRTY_LOG takes the bits to clear as an argument (kvm-mmu.md 3.1): pass those that were read.",
    ),
)

RINGS = (
    Mutation(
        "ring-copy-before-reset",
        "ring",
        {"ring_order": ("harvest", "read", "reset", "protect", "flush")},
        "Userspace copies the harvested pages and resets the ring then.",
        "Until RESET the page is writable. A store after the copy makes no entry, and RESET makes nobody "
        "look again.",
        "RESET before the contents are read (kvm-mmu.md 4.1, api.rst).",
    ),
    Mutation(
        "ring-without-protect",
        "ring",
        {"ring_order": ("harvest", "reset", "flush", "read")},
        "RESET takes entries back and does not protect their pages.",
        "The page stays writable and is never pushed again.",
        "RESET re-arms what it takes back (kvm-mmu.md 4.5).",
    ),
    Mutation(
        "ring-without-flush",
        "ring",
        {"ring_order": ("harvest", "reset", "protect", "read")},
        "RESET protects the pages and flushes no TLB.",
        "As with GET: a store through a stale translation after the copy.",
        "One remote TLB flush if anything was reset (kvm-mmu.md 4.5).",
    ),
    Mutation(
        "ring-protect-without-lock",
        "ring",
        {"protect_locks": False},
        "RESET protects without mmu_lock.",
        "make_spte pushes the entry before the SPTE is installed. The entry is harvested, reset and its "
        "page protected and copied, all while the SPTE is not there yet; then it is installed with W=1.",
        "make_spte and RESET hold mmu_lock, so the protection comes after the SPTE (kvm-mmu.md 4.5, 8).",
    ),
    Mutation(
        "harvest-without-acquire",
        "ring",
        {"acquire": False},
        "Userspace reads flags without acquire, so its read of slot and offset may be done before.",
        "It sees a payload from before the push together with the flag from after it, and takes a page for "
        "dirty that is not, in place of the one that is.",
        "Load-acquire of flags (kvm-mmu.md 4.1). x86 does not reorder two loads, but a compiler does, and "
        "arm64 does both.",
    ),
    Mutation(
        "push-flag-before-payload",
        "ring",
        {"push_order": ("flag", "payload")},
        "KVM publishes the entry and writes slot and offset then.",
        "As without acquire: the entry that is harvested has the payload of its last use.",
        "Payload, write barrier, flags (kvm-mmu.md 4.3).",
    ),
    Mutation(
        "ring-without-full-check",
        "ring-full",
        {"full_check": False},
        "The vCPU enters the guest with a full ring.",
        "The next push overwrites an entry that nobody has harvested.",
        "At the soft limit the vCPU exits with KVM_EXIT_DIRTY_RING_FULL instead (kvm-mmu.md 4.4). Hosts "
        "that emulate guest code in batches look too late (hosts.md D.7).",
    ),
    Mutation(
        "harvest-release-before-payload",
        "ring",
        {"harvest_order": ("release", "payload")},
        "Userspace gives the entry back before it has read slot and offset.",
        "One thread harvests and resets, so nothing reuses the entry until it has read the payload. With a "
        "second thread that resets it would be lost.",
        "Store-release of the harvested flag (kvm-mmu.md 4.1).",
        harmless=True,
    ),
)

PML = (
    Mutation(
        "pml-without-kick",
        "pml",
        {"get_order": ("xchg", "protect", "flush", "read"), "pause": False},
        "The last collection neither kicks the vCPUs nor takes them out of KVM_RUN.",
        "The guest has stopped writing, but the gfn is still in the PML buffer of a vCPU that has not "
        "exited since.",
        "GET_DIRTY_LOG kicks all vCPUs in PML mode, and the exit flushes the buffer (kvm-mmu.md 11.3).",
    ),
    Mutation(
        "pml-kick-without-pause",
        "pml",
        {"pause": False},
        "The last collection is a GET_DIRTY_LOG, with its kick, while the vCPUs are in KVM_RUN.",
        "The kick makes them leave the guest, but the flush of the buffer is theirs and comes after that. "
        "The bitmap may be read first. The page would be in the next collection, and there is none.",
        "Take the vCPUs out of KVM_RUN before the last collection (kvm-mmu.md 11.3, 15.13).",
    ),
    Mutation(
        "pml-pause-without-kick",
        "pml",
        {"get_order": ("xchg", "protect", "flush", "read")},
        "GET_DIRTY_LOG does not kick, but the vCPUs are out of KVM_RUN at the last collection.",
        "Collections before see some pages late. None is lost.",
        "The kick makes the bitmap recent; the way out of KVM_RUN makes it complete (kvm-mmu.md 11.3).",
        harmless=True,
    ),
)

OUTSIDE = (
    Mutation(
        "outside-mark-dropped",
        "outside",
        {"marks_without_vcpu": False},
        "A mark without a loaded vCPU is dropped, as in 6.1.",
        "KVM writes guest memory in a VM ioctl, and the page is never reported.",
        "Since 6.12 the bitmap takes such marks, with a warning (kvm-mmu.md 3.2). 6.1 relies on there "
        "being no such writes on x86.",
    ),
    Mutation(
        "outside-ring",
        "outside",
        {"outside_ring": True},
        "The VM uses dirty rings, and there is no bitmap beside them, as on x86.",
        "Without a vCPU there is no ring to push to.",
        "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP where such writes exist; x86 is made to have none (kvm-mmu.md "
        "4.8).",
    ),
)
