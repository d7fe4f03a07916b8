/* CPUID, MSRs and vCPU state beyond the registers: api.rst 4.3, 4.18 to 4.23, 4.31 to 4.34, 4.38 to 4.46, 4.88, 4.134. */
#define KVM_GET_FPU ...
#define KVM_SET_FPU ...
#define KVM_GET_XSAVE ...
#define KVM_SET_XSAVE ...
#define KVM_GET_XSAVE2 ...
#define KVM_GET_XCRS ...
#define KVM_SET_XCRS ...
#define KVM_MAX_XCRS ...
#define KVM_GET_MSRS ...
#define KVM_SET_MSRS ...
#define KVM_GET_MSR_INDEX_LIST ...
#define KVM_GET_MSR_FEATURE_INDEX_LIST ...
#define KVM_GET_SUPPORTED_CPUID ...
#define KVM_GET_EMULATED_CPUID ...
#define KVM_GET_CPUID2 ...
#define KVM_SET_CPUID2 ...
#define KVM_GET_MP_STATE ...
#define KVM_SET_MP_STATE ...
#define KVM_GET_VCPU_EVENTS ...
#define KVM_SET_VCPU_EVENTS ...
#define KVM_GET_DEBUGREGS ...
#define KVM_SET_DEBUGREGS ...
#define KVM_KVMCLOCK_CTRL ...

struct kvm_fpu {
    __u8 fpr[8][16];
    __u16 fcw;
    __u16 fsw;
    __u8 ftwx;
    __u16 last_opcode;
    __u64 last_ip;
    __u64 last_dp;
    __u8 xmm[16][16];
    __u32 mxcsr;
    ...;
};

struct kvm_xcr {
    __u32 xcr;
    __u32 reserved;
    __u64 value;
};

struct kvm_xcrs {
    __u32 nr_xcrs;
    __u32 flags;
    struct kvm_xcr xcrs[16];
    ...;
};

struct kvm_msr_entry {
    __u32 index;
    __u32 reserved;
    __u64 data;
};

/* The three lists of variable length; compat.h holds them together with the kernel's. */
struct pykvm_msrs {
    __u32 nmsrs;
    __u32 pad;
    struct kvm_msr_entry entries[];
};

struct pykvm_msr_list {
    __u32 nmsrs;
    __u32 indices[];
};

struct kvm_cpuid_entry2 {
    __u32 function;
    __u32 index;
    __u32 flags;
    __u32 eax;
    __u32 ebx;
    __u32 ecx;
    __u32 edx;
    ...;
};

struct pykvm_cpuid2 {
    __u32 nent;
    __u32 padding;
    struct kvm_cpuid_entry2 entries[];
};

struct kvm_mp_state {
    __u32 mp_state;
};

/* kvm_vcpu_events, flat; compat.h holds it together with the kernel's. */
struct pykvm_vcpu_events {
    __u8 exception_injected, exception_nr, exception_has_error_code, exception_pending;
    __u32 exception_error_code;
    __u8 interrupt_injected, interrupt_nr, interrupt_soft, interrupt_shadow;
    __u8 nmi_injected, nmi_pending, nmi_masked, nmi_pad;
    __u32 sipi_vector;
    __u32 flags;
    __u8 smi_smm, smi_pending, smi_smm_inside_nmi, smi_latched_init;
    __u8 triple_fault_pending;
    __u8 reserved[26];
    __u8 exception_has_payload;
    __u64 exception_payload;
};

struct kvm_debugregs {
    __u64 db[4];
    __u64 dr6;
    __u64 dr7;
    __u64 flags;
    ...;
};

/* kvm_run.s.regs (api.rst section 5); needs the registers' structs, which sort before this file. */
struct pykvm_sync_regs {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct pykvm_vcpu_events events;
};
