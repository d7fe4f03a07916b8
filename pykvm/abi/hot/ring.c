/* The dirty ring's user side: api.rst 8.29 (KVM_CAP_DIRTY_LOG_RING_ACQ_REL). */
#include "hot.h"

/*
 * Takes at most limit entries in order from head on: flags are read with acquire so that slot and offset
 * are those the kernel published, and written with release so that the kernel sees them taken only after
 * they were read.  Stops at the first entry that is not dirty or already harvested.
 */
long pykvm_ring_harvest(struct kvm_dirty_gfn *ring, __u32 size, __u32 head, __u32 limit, __u32 *slots,
                        __u64 *offsets)
{
    __u32 n = 0;

    while (n < limit) {
        struct kvm_dirty_gfn *entry = &ring[(head + n) & (size - 1)];
        __u32 flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);

        if (!(flags & KVM_DIRTY_GFN_F_DIRTY) || (flags & KVM_DIRTY_GFN_F_RESET))
            break;
        slots[n] = entry->slot;
        offsets[n] = entry->offset;
        __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        n++;
    }
    return n;
}

/* Index of some dirty, unharvested entry, or -1: after an overflow entries appear away from the head. */
long pykvm_ring_find_dirty(struct kvm_dirty_gfn *ring, __u32 size)
{
    for (__u32 i = 0; i < size; i++) {
        __u32 flags = __atomic_load_n(&ring[i].flags, __ATOMIC_ACQUIRE);

        if ((flags & KVM_DIRTY_GFN_F_DIRTY) && !(flags & KVM_DIRTY_GFN_F_RESET))
            return i;
    }
    return -1;
}
