/* Debugging and looking in: api.rst 4.15 (translate), 4.21 (signal mask), 4.87 (guest debug). */
#define KVM_SET_GUEST_DEBUG ...
#define KVM_GUESTDBG_ENABLE ...
#define KVM_GUESTDBG_SINGLESTEP ...
#define KVM_GUESTDBG_USE_SW_BP ...
#define KVM_GUESTDBG_USE_HW_BP ...
#define KVM_GUESTDBG_BLOCKIRQ ...
#define KVM_TRANSLATE ...
#define KVM_SET_SIGNAL_MASK ...

struct pykvm_guest_debug {
    __u32 control;
    __u32 pad;
    __u64 debugreg[8];
};

struct kvm_translation {
    __u64 linear_address;
    __u64 physical_address;
    __u8 valid;
    __u8 writeable;
    __u8 usermode;
    ...;
};

struct pykvm_signal_mask {
    __u32 len;
    __u8 sigset[8];
};
