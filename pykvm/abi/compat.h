/*
 * What <linux/kvm.h> of older distributions lacks.  Each default names the kernel that added it; a newer
 * header wins.  Numbers are user-space ABI and never change.
 */
#ifndef PYKVM_COMPAT_H
#define PYKVM_COMPAT_H

#include <stddef.h>
#include <stdint.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>

#ifndef KVM_MEM_GUEST_MEMFD /* 6.8, a7800aa80ea4 "KVM: Add KVM_CREATE_GUEST_MEMFD" */
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
#endif

#ifndef KVM_SET_USER_MEMORY_REGION2 /* 6.8, bb58b90b1a8f "KVM: Introduce KVM_SET_USER_MEMORY_REGION2" */
struct kvm_userspace_memory_region2 {
    __u32 slot;
    __u32 flags;
    __u64 guest_phys_addr;
    __u64 memory_size;
    __u64 userspace_addr;
    __u64 guest_memfd_offset;
    __u32 guest_memfd;
    __u32 pad1;
    __u64 pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#endif

#ifndef KVM_EXIT_MEMORY_FAULT /* 6.8, 16f95f3b95ca "KVM: Add KVM_EXIT_MEMORY_FAULT exit" */
#define KVM_EXIT_MEMORY_FAULT 39
#endif

#ifndef KVM_DIRTY_LOG_PAGE_OFFSET /* 5.11, fb04a1eddb1a; zero means an architecture without the ring */
#define KVM_DIRTY_LOG_PAGE_OFFSET 64
#endif

/* Named stand-ins for the anonymous members of kvm_run's union. */
struct pykvm_run_io { __u8 direction, size; __u16 port; __u32 count; __u64 data_offset; };
struct pykvm_run_mmio { __u64 phys_addr; __u8 data[8]; __u32 len; __u8 is_write; };
struct pykvm_run_internal { __u32 suberror, ndata; __u64 data[16]; };
struct pykvm_run_system_event { __u32 type, ndata; __u64 data[16]; };
struct pykvm_run_memory_fault { __u64 flags, gpa, size; };
struct pykvm_run_fail_entry { __u64 hardware_entry_failure_reason; __u32 cpu; };

union pykvm_run_payload {
    struct pykvm_run_io io;
    struct pykvm_run_mmio mmio;
    struct pykvm_run_internal internal;
    struct pykvm_run_system_event system_event;
    struct pykvm_run_memory_fault memory_fault;
    struct pykvm_run_fail_entry fail_entry;
    struct kvm_debug_exit_arch debug;
    __u64 hardware_exit_reason;
    __u8 bytes[256];
};

struct pykvm_run_page {
    __u8 request_interrupt_window, immediate_exit, padding1[6];
    __u32 exit_reason;
    __u8 ready_for_interrupt_injection, if_flag;
    __u16 flags;
    __u64 cr8, apic_base;
    union pykvm_run_payload u;
    __u64 kvm_valid_regs, kvm_dirty_regs;
    __u8 sync[2048];
};

#define PYKVM_SAME(ours, kernel) \
    _Static_assert(offsetof(struct pykvm_run_page, ours) == offsetof(struct kvm_run, kernel), #kernel)
PYKVM_SAME(immediate_exit, immediate_exit);
PYKVM_SAME(exit_reason, exit_reason);
PYKVM_SAME(flags, flags);
PYKVM_SAME(cr8, cr8);
PYKVM_SAME(apic_base, apic_base);
PYKVM_SAME(u.io.direction, io.direction);
PYKVM_SAME(u.io.size, io.size);
PYKVM_SAME(u.io.port, io.port);
PYKVM_SAME(u.io.count, io.count);
PYKVM_SAME(u.io.data_offset, io.data_offset);
PYKVM_SAME(u.mmio.phys_addr, mmio.phys_addr);
PYKVM_SAME(u.mmio.data, mmio.data);
PYKVM_SAME(u.mmio.len, mmio.len);
PYKVM_SAME(u.mmio.is_write, mmio.is_write);
PYKVM_SAME(u.internal.suberror, internal.suberror);
PYKVM_SAME(u.internal.data, internal.data);
PYKVM_SAME(u.system_event.type, system_event.type);
PYKVM_SAME(u.system_event.data, system_event.flags);
PYKVM_SAME(u.fail_entry.cpu, fail_entry.cpu);
PYKVM_SAME(u.debug, debug.arch);
PYKVM_SAME(kvm_valid_regs, kvm_valid_regs);
PYKVM_SAME(kvm_dirty_regs, kvm_dirty_regs);
PYKVM_SAME(sync, s.regs);
_Static_assert(sizeof(struct pykvm_run_page) == sizeof(struct kvm_run), "kvm_run");

#endif
