/*
 * What <linux/kvm.h> of older distributions lacks.  Each default names the kernel that added it; a newer
 * header wins.  Numbers are user-space ABI and never change.
 */
#ifndef PYKVM_COMPAT_H
#define PYKVM_COMPAT_H

#include <stddef.h>
#include <stdint.h>
#include <linux/fs.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
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

#ifndef KVM_GET_XSAVE2 /* 5.17, be50b2065dfa "kvm: x86: Add support for getting/setting expanded xstate buffer" */
#define KVM_GET_XSAVE2 _IOR(KVMIO, 0xcf, struct kvm_xsave)
#endif

#ifndef KVM_CLOCK_REALTIME /* 5.16, c68dc1b577ea "KVM: x86: Report host tsc and realtime values in KVM_GET_CLOCK" */
#define KVM_CLOCK_REALTIME (1 << 2)
#define KVM_CLOCK_HOST_TSC (1 << 3)
#endif

#ifndef KVM_GUESTDBG_BLOCKIRQ /* 5.15, 61e5f69ef083 "KVM: x86: implement KVM_GUESTDBG_BLOCKIRQ" */
#define KVM_GUESTDBG_BLOCKIRQ 0x00100000
#endif

#ifndef UFFD_USER_MODE_ONLY /* 5.11, 37cd0575b851 "userfaultfd: add UFFD_USER_MODE_ONLY" */
#define UFFD_USER_MODE_ONLY 1
#endif

#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM /* 5.19, b1f9e876862d "mm/uffd: enable write protection for shmem & hugetlbfs" */
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif

#ifndef USERFAULTFD_IOC_NEW /* 6.1, 2d5de004e009 "userfaultfd: add /dev/userfaultfd for fine grained access control" */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#ifndef UFFD_FEATURE_WP_UNPOPULATED /* 6.4, 2bad466cc9d9 "mm/uffd: UFFD_FEATURE_WP_UNPOPULATED" */
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif

#ifndef UFFD_FEATURE_WP_ASYNC /* 6.7, d61ea1cb0095 "userfaultfd: UFFD_FEATURE_WP_ASYNC" */
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

#ifndef PAGEMAP_SCAN /* 6.7, 52526ca7fdb9 "fs/proc/task_mmu: implement IOCTL to get and optionally clear info about PTEs" */
struct page_region {
    __u64 start;
    __u64 end;
    __u64 categories;
};
struct pm_scan_arg {
    __u64 size;
    __u64 flags;
    __u64 start;
    __u64 end;
    __u64 walk_end;
    __u64 vec;
    __u64 vec_len;
    __u64 max_pages;
    __u64 category_inverted;
    __u64 category_mask;
    __u64 category_anyof_mask;
    __u64 return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WRITTEN (1 << 1)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
#endif

/* Flat or complete forms of structs with anonymous members, flexible arrays or fields that came later. */
struct pykvm_irqchip { __u32 chip_id, pad; __u8 chip[512]; };
_Static_assert(sizeof(struct pykvm_irqchip) == sizeof(struct kvm_irqchip), "kvm_irqchip");

union pykvm_irq_route_target {
    struct kvm_irq_routing_irqchip irqchip;
    struct kvm_irq_routing_msi msi;
    __u32 pad[8];
};
struct pykvm_irq_route { __u32 gsi, type, flags, pad; union pykvm_irq_route_target u; };
struct pykvm_irq_routing { __u32 nr, flags; struct pykvm_irq_route entries[]; };
_Static_assert(sizeof(struct pykvm_irq_route) == sizeof(struct kvm_irq_routing_entry), "kvm_irq_routing_entry");
_Static_assert(offsetof(struct pykvm_irq_route, u) == offsetof(struct kvm_irq_routing_entry, u), "route target");
_Static_assert(offsetof(struct pykvm_irq_routing, entries) == offsetof(struct kvm_irq_routing, entries),
               "kvm_irq_routing");

struct pykvm_lapic { __u8 regs[1024]; };
_Static_assert(sizeof(struct pykvm_lapic) == sizeof(struct kvm_lapic_state), "kvm_lapic_state");

struct pykvm_coalesced_ring { __u32 first, last; struct kvm_coalesced_mmio entries[]; };
_Static_assert(offsetof(struct pykvm_coalesced_ring, entries) ==
                   offsetof(struct kvm_coalesced_mmio_ring, coalesced_mmio),
               "kvm_coalesced_mmio_ring");

struct pykvm_clock_data { __u64 clock; __u32 flags, pad0; __u64 realtime, host_tsc; __u32 pad[4]; };
_Static_assert(sizeof(struct pykvm_clock_data) == sizeof(struct kvm_clock_data), "kvm_clock_data");
_Static_assert(offsetof(struct pykvm_clock_data, flags) == offsetof(struct kvm_clock_data, flags), "clock flags");

struct pykvm_msrs { __u32 nmsrs, pad; struct kvm_msr_entry entries[]; };
struct pykvm_msr_list { __u32 nmsrs; __u32 indices[]; };
struct pykvm_cpuid2 { __u32 nent, padding; struct kvm_cpuid_entry2 entries[]; };
_Static_assert(offsetof(struct pykvm_msrs, entries) == offsetof(struct kvm_msrs, entries), "kvm_msrs");
_Static_assert(offsetof(struct pykvm_msr_list, indices) == offsetof(struct kvm_msr_list, indices), "kvm_msr_list");
_Static_assert(offsetof(struct pykvm_cpuid2, entries) == offsetof(struct kvm_cpuid2, entries), "kvm_cpuid2");

struct pykvm_vcpu_events {
    __u8 exception_injected, exception_nr, exception_has_error_code, exception_pending;
    __u32 exception_error_code;
    __u8 interrupt_injected, interrupt_nr, interrupt_soft, interrupt_shadow;
    __u8 nmi_injected, nmi_pending, nmi_masked, nmi_pad;
    __u32 sipi_vector, flags;
    __u8 smi_smm, smi_pending, smi_smm_inside_nmi, smi_latched_init;
    __u8 triple_fault_pending; /* 6.0, ed2351174e38; reserved and zero before */
    __u8 reserved[26];
    __u8 exception_has_payload;
    __u64 exception_payload;
};
#define PYKVM_SAME_EVENT(ours, kernel) \
    _Static_assert(offsetof(struct pykvm_vcpu_events, ours) == offsetof(struct kvm_vcpu_events, kernel), #kernel)
PYKVM_SAME_EVENT(exception_pending, exception.pending);
PYKVM_SAME_EVENT(exception_error_code, exception.error_code);
PYKVM_SAME_EVENT(interrupt_injected, interrupt.injected);
PYKVM_SAME_EVENT(interrupt_shadow, interrupt.shadow);
PYKVM_SAME_EVENT(nmi_injected, nmi.injected);
PYKVM_SAME_EVENT(nmi_masked, nmi.masked);
PYKVM_SAME_EVENT(sipi_vector, sipi_vector);
PYKVM_SAME_EVENT(flags, flags);
PYKVM_SAME_EVENT(smi_smm, smi.smm);
PYKVM_SAME_EVENT(smi_latched_init, smi.latched_init);
PYKVM_SAME_EVENT(exception_has_payload, exception_has_payload);
PYKVM_SAME_EVENT(exception_payload, exception_payload);
_Static_assert(sizeof(struct pykvm_vcpu_events) == sizeof(struct kvm_vcpu_events), "kvm_vcpu_events");

struct pykvm_guest_debug { __u32 control, pad; __u64 debugreg[8]; };
_Static_assert(sizeof(struct pykvm_guest_debug) == sizeof(struct kvm_guest_debug), "kvm_guest_debug");

struct pykvm_signal_mask { __u32 len; __u8 sigset[8]; };
_Static_assert(offsetof(struct pykvm_signal_mask, sigset) == offsetof(struct kvm_signal_mask, sigset),
               "kvm_signal_mask");

struct pykvm_sync_regs { struct kvm_regs regs; struct kvm_sregs sregs; struct pykvm_vcpu_events events; };
_Static_assert(sizeof(struct pykvm_sync_regs) == sizeof(struct kvm_sync_regs), "kvm_sync_regs");

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
