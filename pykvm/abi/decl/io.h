/* Port and MMIO writes that need no exit: ioeventfd (api.rst 4.59), coalesced zones (api.rst 4.116). */
#define KVM_IOEVENTFD ...
#define KVM_IOEVENTFD_FLAG_DATAMATCH ...
#define KVM_IOEVENTFD_FLAG_PIO ...
#define KVM_IOEVENTFD_FLAG_DEASSIGN ...
#define KVM_REGISTER_COALESCED_MMIO ...
#define KVM_UNREGISTER_COALESCED_MMIO ...

struct kvm_ioeventfd {
    __u64 datamatch;
    __u64 addr;
    __u32 len;
    __s32 fd;
    __u32 flags;
    ...;
};

struct kvm_coalesced_mmio_zone {
    __u64 addr;
    __u32 size;
    __u32 pio;
};

struct kvm_coalesced_mmio {
    __u64 phys_addr;
    __u32 len;
    __u32 pio;
    __u8 data[8];
};

struct pykvm_coalesced_ring {
    __u32 first;
    __u32 last;
    struct kvm_coalesced_mmio entries[];
};
