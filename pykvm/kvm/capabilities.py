"""The named capabilities of KVM (KVM_CAP_*), all architectures, up to the headers of Linux 7.2.

Numbers are user-space ABI and never change, so they stand here instead of coming from the headers of the
machine that compiled the binding: an old distribution can name what a new kernel offers.  A test holds
them against whatever header is installed.  Sections in comments are those of the kernel's api.rst.
"""

from __future__ import annotations

import errno
from enum import IntEnum

from pykvm.abi import ffi, lib
from pykvm.abi.managed import Managed, Refusals
from pykvm.errors import CapabilityError, KvmError
from pykvm.kvm.fields import fill


class Capability(IntEnum):
    """What ``check_extension`` can be asked for; ``value`` in a comment says what a non-zero answer means."""

    IRQCHIP = 0  # in-kernel PIC, IOAPIC and LAPIC (api.rst 4.24)
    HLT = 1  # HLT exits
    MMU_SHADOW_CACHE_CONTROL = 2  # KVM_SET_NR_MMU_PAGES
    USER_MEMORY = 3  # memslots over user memory (4.35)
    SET_TSS_ADDR = 4  # KVM_SET_TSS_ADDR, Intel only in effect (4.36)
    VAPIC = 6  # TPR access reporting
    EXT_CPUID = 7  # KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2 (4.46)
    CLOCKSOURCE = 8  # kvmclock; the value may carry flags
    NR_VCPUS = 9  # recommended most vCPUs of a VM
    NR_MEMSLOTS = 10  # most memslots of an address space
    PIT = 11  # the old i8254 ioctls
    NOP_IO_DELAY = 12  # writes to port 0x80 need no exit
    PV_MMU = 13
    MP_STATE = 14  # KVM_GET/SET_MP_STATE (4.38)
    COALESCED_MMIO = 15  # value: page of the ring in the vCPU mapping (4.116)
    SYNC_MMU = 16  # host changes of the mapping reach the guest at once
    IOMMU = 18
    DESTROY_MEMORY_REGION_WORKS = 21  # a slot of size 0 deletes
    USER_NMI = 22  # KVM_NMI (4.64)
    SET_GUEST_DEBUG = 23  # KVM_SET_GUEST_DEBUG (4.87)
    REINJECT_CONTROL = 24  # KVM_REINJECT_CONTROL of the PIT
    IRQ_ROUTING = 25  # value: routes of KVM_SET_GSI_ROUTING (4.52)
    IRQ_INJECT_STATUS = 26  # KVM_IRQ_LINE_STATUS
    ASSIGN_DEV_IRQ = 29
    JOIN_MEMORY_REGIONS_WORKS = 30  # slots may join where others were
    MCE = 31  # value: machine-check banks (4.104)
    IRQFD = 32  # KVM_IRQFD (4.75)
    PIT2 = 33  # KVM_CREATE_PIT2
    SET_BOOT_CPU_ID = 34  # KVM_SET_BOOT_CPU_ID (4.41)
    PIT_STATE2 = 35  # KVM_GET/SET_PIT2 (4.72)
    IOEVENTFD = 36  # KVM_IOEVENTFD (4.59)
    SET_IDENTITY_MAP_ADDR = 37  # KVM_SET_IDENTITY_MAP_ADDR (4.40)
    XEN_HVM = 38  # value: Xen features (KVM_XEN_HVM_CONFIG_*)
    ADJUST_CLOCK = 39  # KVM_GET/SET_CLOCK; value: flags that SET and GET know (4.29)
    INTERNAL_ERROR_DATA = 40  # data words with KVM_EXIT_INTERNAL_ERROR
    VCPU_EVENTS = 41  # KVM_GET/SET_VCPU_EVENTS (4.31)
    S390_PSW = 42
    PPC_SEGSTATE = 43
    HYPERV = 44  # Hyper-V MSRs
    HYPERV_VAPIC = 45
    HYPERV_SPIN = 46
    PCI_SEGMENT = 47
    PPC_PAIRED_SINGLES = 48
    INTR_SHADOW = 49  # interrupt shadow in the vCPU events
    DEBUGREGS = 50  # KVM_GET/SET_DEBUGREGS (4.33)
    X86_ROBUST_SINGLESTEP = 51  # single step survives a guest that uses TF
    PPC_OSI = 52
    PPC_UNSET_IRQ = 53
    ENABLE_CAP = 54  # KVM_ENABLE_CAP on a vCPU (4.37)
    XSAVE = 55  # KVM_GET/SET_XSAVE (4.42)
    XCRS = 56  # KVM_GET/SET_XCRS (4.44)
    PPC_GET_PVINFO = 57
    PPC_IRQ_LEVEL = 58
    ASYNC_PF = 59  # asynchronous page faults
    TSC_CONTROL = 60  # the TSC frequency of a vCPU can be scaled (4.55)
    GET_TSC_KHZ = 61  # KVM_GET_TSC_KHZ (4.56)
    PPC_BOOKE_SREGS = 62
    SPAPR_TCE = 63
    PPC_SMT = 64
    PPC_RMA = 65
    MAX_VCPUS = 66  # most vCPUs of a VM
    PPC_HIOR = 67
    PPC_PAPR = 68
    SW_TLB = 69
    ONE_REG = 70
    S390_GMAP = 71
    TSC_DEADLINE_TIMER = 72  # the LAPIC's TSC-deadline mode
    S390_UCONTROL = 73
    SYNC_REGS = 74  # value: register sets shared through kvm_run (6.74)
    PCI_2_3 = 75
    KVMCLOCK_CTRL = 76  # KVM_KVMCLOCK_CTRL (4.70)
    SIGNAL_MSI = 77  # KVM_SIGNAL_MSI (4.71)
    PPC_GET_SMMU_INFO = 78
    S390_COW = 79
    PPC_ALLOC_HTAB = 80
    READONLY_MEM = 81  # KVM_MEM_READONLY
    IRQFD_RESAMPLE = 82  # level-triggered irqfds
    PPC_BOOKE_WATCHDOG = 83
    PPC_HTAB_FD = 84
    S390_CSS_SUPPORT = 85
    PPC_EPR = 86
    ARM_PSCI = 87
    ARM_SET_DEVICE_ADDR = 88
    DEVICE_CTRL = 89  # KVM_CREATE_DEVICE (4.79)
    IRQ_MPIC = 90
    PPC_RTAS = 91
    IRQ_XICS = 92
    ARM_EL1_32BIT = 93
    SPAPR_MULTITCE = 94
    EXT_EMUL_CPUID = 95  # KVM_GET_EMULATED_CPUID (4.88)
    HYPERV_TIME = 96  # Hyper-V reference counter and TSC page
    IOAPIC_POLARITY_IGNORED = 97
    ENABLE_CAP_VM = 98  # KVM_ENABLE_CAP on a VM (4.37)
    S390_IRQCHIP = 99
    IOEVENTFD_NO_LENGTH = 100  # ioeventfd of length 0 on the fast MMIO bus
    VM_ATTRIBUTES = 101  # device attributes of a VM
    ARM_PSCI_0_2 = 102
    PPC_FIXUP_HCALL = 103
    PPC_ENABLE_HCALL = 104
    CHECK_EXTENSION_VM = 105  # KVM_CHECK_EXTENSION on a VM
    S390_USER_SIGP = 106
    S390_VECTOR_REGISTERS = 107
    S390_MEM_OP = 108
    S390_USER_STSI = 109
    S390_SKEYS = 110
    MIPS_FPU = 111
    MIPS_MSA = 112
    S390_INJECT_IRQ = 113
    S390_IRQ_STATE = 114
    PPC_HWRNG = 115
    DISABLE_QUIRKS = 116  # obsolete form of DISABLE_QUIRKS2
    X86_SMM = 117  # system management mode
    MULTI_ADDRESS_SPACE = 118  # value: address spaces (2 with SMM)
    GUEST_DEBUG_HW_BPS = 119  # value: hardware breakpoints of a debugged guest
    GUEST_DEBUG_HW_WPS = 120  # value: hardware watchpoints of a debugged guest
    SPLIT_IRQCHIP = 121  # LAPIC in the kernel, PIC and IOAPIC outside (7.5)
    IOEVENTFD_ANY_LENGTH = 122  # ioeventfd of length 0
    HYPERV_SYNIC = 123  # Hyper-V synthetic interrupt controller
    S390_RI = 124
    SPAPR_TCE_64 = 125
    ARM_PMU_V3 = 126
    VCPU_ATTRIBUTES = 127  # device attributes of a vCPU (4.80)
    MAX_VCPU_ID = 128  # one more than the largest vCPU id
    X2APIC_API = 129  # 32-bit APIC ids in the LAPIC, MSI and routing ioctls (7.7)
    S390_USER_INSTR0 = 130
    MSI_DEVID = 131
    PPC_HTM = 132
    SPAPR_RESIZE_HPT = 133
    PPC_MMU_RADIX = 134
    PPC_MMU_HASH_V3 = 135
    IMMEDIATE_EXIT = 136  # kvm_run.immediate_exit
    MIPS_VZ = 137
    MIPS_TE = 138
    MIPS_64BIT = 139
    S390_GS = 140
    S390_AIS = 141
    SPAPR_TCE_VFIO = 142
    X86_DISABLE_EXITS = 143  # value: HLT, MWAIT, PAUSE, C-state exits that can be switched off (7.13)
    ARM_USER_IRQ = 144
    S390_CMMA_MIGRATION = 145
    PPC_FWNMI = 146
    PPC_SMT_POSSIBLE = 147
    HYPERV_SYNIC2 = 148  # SynIC with user-space messages
    HYPERV_VP_INDEX = 149  # settable Hyper-V VP index
    S390_AIS_MIGRATION = 150
    PPC_GET_CPU_CHAR = 151
    S390_BPB = 152
    GET_MSR_FEATURES = 153  # KVM_GET_MSRS and feature list on /dev/kvm (4.18)
    HYPERV_EVENTFD = 154  # KVM_HYPERV_EVENTFD
    HYPERV_TLBFLUSH = 155  # Hyper-V TLB flush hypercalls
    S390_HPAGE_1M = 156
    NESTED_STATE = 157  # value: largest state of KVM_GET/SET_NESTED_STATE (4.114)
    ARM_INJECT_SERROR_ESR = 158
    MSR_PLATFORM_INFO = 159  # the guest may read MSR_PLATFORM_INFO (7.15)
    PPC_NESTED_HV = 160
    HYPERV_SEND_IPI = 161  # Hyper-V IPI hypercall
    COALESCED_PIO = 162  # coalesced zones of I/O ports (4.116)
    HYPERV_ENLIGHTENED_VMCS = 163  # enlightened VMCS for nested Hyper-V
    EXCEPTION_PAYLOAD = 164  # exception payloads in the vCPU events (7.17)
    ARM_VM_IPA_SIZE = 165
    MANUAL_DIRTY_LOG_PROTECT = 166  # obsolete: the broken predecessor of ...PROTECT2
    HYPERV_CPUID = 167  # KVM_GET_SUPPORTED_HV_CPUID
    MANUAL_DIRTY_LOG_PROTECT2 = 168  # value: supported KVM_DIRTY_LOG_* flags (7.18)
    PPC_IRQ_XIVE = 169
    ARM_SVE = 170
    ARM_PTRAUTH_ADDRESS = 171
    ARM_PTRAUTH_GENERIC = 172
    PMU_EVENT_FILTER = 173  # KVM_SET_PMU_EVENT_FILTER (4.120)
    ARM_IRQ_LINE_LAYOUT_2 = 174
    HYPERV_DIRECT_TLBFLUSH = 175  # direct TLB flush for nested Hyper-V
    PPC_GUEST_DEBUG_SSTEP = 176
    ARM_NISV_TO_USER = 177
    ARM_INJECT_EXT_DABT = 178
    S390_VCPU_RESETS = 179
    S390_PROTECTED = 180
    PPC_SECURE_GUEST = 181
    HALT_POLL = 182  # per-VM halt polling time (7.20)
    ASYNC_PF_INT = 183  # asynchronous page faults end with an interrupt
    LAST_CPU = 184  # the host CPU in fail_entry and internal-error exits
    SMALLER_MAXPHYADDR = 185  # guests may have fewer physical address bits than the host
    S390_DIAG318 = 186
    STEAL_TIME = 187  # stolen time (value on x86)
    X86_USER_SPACE_MSR = 188  # exits for refused MSR accesses (7.21)
    X86_MSR_FILTER = 189  # KVM_X86_SET_MSR_FILTER (4.97)
    ENFORCE_PV_FEATURE_CPUID = 190  # paravirtual features only as CPUID says
    SYS_HYPERV_CPUID = 191  # KVM_GET_SUPPORTED_HV_CPUID on /dev/kvm
    DIRTY_LOG_RING = 192  # value: bytes of the largest dirty ring (8.29)
    X86_BUS_LOCK_EXIT = 193  # exits on bus locks
    PPC_DAWR1 = 194
    SET_GUEST_DEBUG2 = 195  # value: supported KVM_GUESTDBG_* flags
    SGX_ATTRIBUTE = 196  # SGX provisioning key
    VM_COPY_ENC_CONTEXT_FROM = 197  # SEV: a mirror VM
    PTP_KVM = 198  # clock pairing hypercall
    HYPERV_ENFORCE_CPUID = 199  # Hyper-V features only as CPUID says
    SREGS2 = 200  # KVM_GET/SET_SREGS2 (4.131)
    EXIT_HYPERCALL = 201  # value: hypercalls that can exit
    PPC_RPT_INVALIDATE = 202
    BINARY_STATS_FD = 203  # KVM_GET_STATS_FD (4.133)
    EXIT_ON_EMULATION_FAILURE = 204  # every emulation failure exits
    ARM_MTE = 205
    VM_MOVE_ENC_CONTEXT_FROM = 206  # SEV: move between VMs
    VM_GPA_BITS = 207  # guest-physical address bits
    XSAVE2 = 208  # value: bytes of KVM_GET_XSAVE2's buffer, at least 4096 (4.134)
    SYS_ATTRIBUTES = 209  # device attributes of /dev/kvm
    PPC_AIL_MODE_3 = 210
    S390_MEM_OP_EXTENSION = 211
    PMU_CAPABILITY = 212  # the PMU of a VM can be switched off (8.35)
    DISABLE_QUIRKS2 = 213  # value: quirks that can be switched off (7.31)
    VM_TSC_CONTROL = 214  # KVM_SET_TSC_KHZ on a VM (4.55)
    SYSTEM_EVENT_DATA = 215  # data words with KVM_EXIT_SYSTEM_EVENT
    ARM_SYSTEM_SUSPEND = 216
    S390_PROTECTED_DUMP = 217
    X86_TRIPLE_FAULT_EVENT = 218  # triple faults in the vCPU events
    X86_NOTIFY_VMEXIT = 219  # exits for event windows that stay shut
    VM_DISABLE_NX_HUGE_PAGES = 220  # no NX huge page mitigation for a VM
    S390_ZPCI_OP = 221
    S390_CPU_TOPOLOGY = 222
    DIRTY_LOG_RING_ACQ_REL = 223  # the ring needs acquire and release (8.29)
    S390_PROTECTED_ASYNC_DISABLE = 224
    DIRTY_LOG_RING_WITH_BITMAP = 225  # ring plus bitmap for writes without a vCPU (8.29)
    PMU_EVENT_MASKED_EVENTS = 226  # masked events in the PMU filter
    COUNTER_OFFSET = 227  # Arm: counter offsets of a VM
    ARM_EAGER_SPLIT_CHUNK_SIZE = 228
    ARM_SUPPORTED_BLOCK_SIZES = 229
    ARM_SUPPORTED_REG_MASK_RANGES = 230
    USER_MEMORY2 = 231  # KVM_SET_USER_MEMORY_REGION2 (4.140)
    MEMORY_FAULT_INFO = 232  # KVM_EXIT_MEMORY_FAULT (7.34)
    MEMORY_ATTRIBUTES = 233  # value: attributes of KVM_SET_MEMORY_ATTRIBUTES (4.141)
    GUEST_MEMFD = 234  # KVM_CREATE_GUEST_MEMFD (4.142)
    VM_TYPES = 235  # value: bit per VM type that KVM_CREATE_VM takes
    PRE_FAULT_MEMORY = 236  # KVM_PRE_FAULT_MEMORY (4.143)
    X86_APIC_BUS_CYCLES_NS = 237  # settable APIC timer frequency
    X86_GUEST_MODE = 238  # kvm_run.flags tells nested guest mode
    ARM_WRITABLE_IMP_ID_REGS = 239
    ARM_EL2 = 240
    ARM_EL2_E2H0 = 241
    RISCV_MP_STATE_RESET = 242
    ARM_CACHEABLE_PFNMAP_SUPPORTED = 243
    GUEST_MEMFD_FLAGS = 244  # value: flags of KVM_CREATE_GUEST_MEMFD
    ARM_SEA_TO_USER = 245
    S390_USER_OPEREXEC = 246
    S390_KEYOP = 247
    S390_VSIE_ESAMODE = 248
    S390_HPAGE_2G = 249


def name_of(capability: int) -> str:
    """``KVM_CAP_…``, or the number where it has no name here."""
    try:
        return f"KVM_CAP_{Capability(capability).name}"
    except ValueError:
        return f"KVM capability {capability}"


class Extensions(Managed):
    """Whoever answers KVM_CHECK_EXTENSION: the system, or a VM for itself (KVM_CAP_CHECK_EXTENSION_VM)."""

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION (api.rst 4.4) of a Capability or a number: 0 where it lacks, else its value.

        A VM says what it can do, which may be less or more than what /dev/kvm says.
        """
        return self.ioctl_int(lib.KVM_CHECK_EXTENSION, int(capability), "KVM_CHECK_EXTENSION")

    def require(self, capability: int, purpose: str) -> int:
        """KVM_CHECK_EXTENSION (api.rst 4.4) for ``purpose``.  Raises CapabilityError where it answers 0."""
        value = self.check_extension(capability)
        if not value:
            raise CapabilityError(
                f"{purpose} needs {name_of(capability)}, which this host does not offer; use a newer kernel "
                "or another host ('pykvm info' lists what this one has)."
            )
        return value


class Switches(Managed):
    """A VM (KVM_CAP_ENABLE_CAP_VM) or vCPU (KVM_CAP_ENABLE_CAP) with capabilities that can be switched."""

    def enable_cap(self, cap: int, *args: int, refusals: Refusals | None = None) -> None:
        """KVM_ENABLE_CAP (api.rst 4.37, sections 6 and 7 for the meaning of up to four arguments).

        Raises UsageError for arguments out of range, KvmError: EINVAL for a capability that does not exist,
        cannot be switched here, or not any more.
        """
        request = ffi.new("struct kvm_enable_cap *")
        fill(request, cap=int(cap), args=args)
        default: Refusals = {
            errno.EINVAL: (KvmError, "it cannot be switched on this object, or not at this point, or not so.")
        }
        self.ioctl(lib.KVM_ENABLE_CAP, request, f"KVM_ENABLE_CAP({name_of(cap)})", refusals or default)
