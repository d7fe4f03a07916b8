/* Memslots and both dirty logs: api.rst 4.35, 4.8, 4.117, 8.29. */
#define KVM_SET_USER_MEMORY_REGION ...
#define KVM_SET_USER_MEMORY_REGION2 ...
#define KVM_SET_TSS_ADDR ...
#define KVM_SET_IDENTITY_MAP_ADDR ...
#define KVM_SET_NR_MMU_PAGES ...
#define KVM_GET_DIRTY_LOG ...
#define KVM_CLEAR_DIRTY_LOG ...
#define KVM_RESET_DIRTY_RINGS ...

#define KVM_MEM_LOG_DIRTY_PAGES ...
#define KVM_MEM_READONLY ...
#define KVM_MEM_GUEST_MEMFD ...
#define KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE ...
#define KVM_DIRTY_LOG_INITIALLY_SET ...
#define KVM_DIRTY_LOG_PAGE_OFFSET ...
#define KVM_DIRTY_GFN_F_DIRTY ...
#define KVM_DIRTY_GFN_F_RESET ...

struct kvm_userspace_memory_region {
    __u32 slot;
    __u32 flags;
    __u64 guest_phys_addr;
    __u64 memory_size;
    __u64 userspace_addr;
};

struct kvm_userspace_memory_region2 {
    __u32 slot;
    __u32 flags;
    __u64 guest_phys_addr;
    __u64 memory_size;
    __u64 userspace_addr;
    __u64 guest_memfd_offset;
    __u32 guest_memfd;
    ...;
};

struct kvm_dirty_log {
    __u32 slot;
    __u32 padding1;
    void *dirty_bitmap;
    ...;
};

struct kvm_clear_dirty_log {
    __u32 slot;
    __u32 num_pages;
    __u64 first_page;
    void *dirty_bitmap;
    ...;
};

struct kvm_dirty_gfn {
    __u32 flags;
    __u32 slot;
    __u64 offset;
};
