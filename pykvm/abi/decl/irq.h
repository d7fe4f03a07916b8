/* In-kernel interrupt controllers, routing, injection: api.rst 4.16, 4.24 to 4.27, 4.52, 4.57, 4.58, 4.64, 4.71, 4.75. */
#define KVM_CREATE_IRQCHIP ...
#define KVM_GET_IRQCHIP ...
#define KVM_SET_IRQCHIP ...
#define KVM_IRQ_LINE ...
#define KVM_IRQ_LINE_STATUS ...
#define KVM_SET_GSI_ROUTING ...
#define KVM_SIGNAL_MSI ...
#define KVM_IRQFD ...
#define KVM_INTERRUPT ...
#define KVM_NMI ...
#define KVM_GET_LAPIC ...
#define KVM_SET_LAPIC ...

#define KVM_IRQCHIP_PIC_MASTER ...
#define KVM_IRQCHIP_PIC_SLAVE ...
#define KVM_IRQCHIP_IOAPIC ...
#define KVM_IRQ_ROUTING_IRQCHIP ...
#define KVM_IRQ_ROUTING_MSI ...
#define KVM_IRQFD_FLAG_DEASSIGN ...
#define KVM_IRQFD_FLAG_RESAMPLE ...
#define KVM_APIC_REG_SIZE ...

struct pykvm_irqchip {
    __u32 chip_id;
    __u32 pad;
    __u8 chip[512];
};

struct kvm_irq_level {
    __u32 irq;
    __u32 level;
};

struct kvm_irq_routing_irqchip {
    __u32 irqchip;
    __u32 pin;
};

struct kvm_irq_routing_msi {
    __u32 address_lo;
    __u32 address_hi;
    __u32 data;
    ...;
};

/* kvm_irq_routing and its entries, whose union cffi cannot name; compat.h holds the layouts together. */
union pykvm_irq_route_target {
    struct kvm_irq_routing_irqchip irqchip;
    struct kvm_irq_routing_msi msi;
    __u32 pad[8];
};
struct pykvm_irq_route {
    __u32 gsi;
    __u32 type;
    __u32 flags;
    __u32 pad;
    union pykvm_irq_route_target u;
};
struct pykvm_irq_routing {
    __u32 nr;
    __u32 flags;
    struct pykvm_irq_route entries[];
};

struct kvm_msi {
    __u32 address_lo;
    __u32 address_hi;
    __u32 data;
    __u32 flags;
    ...;
};

struct kvm_irqfd {
    __u32 fd;
    __u32 gsi;
    __u32 flags;
    __u32 resamplefd;
    ...;
};

struct kvm_interrupt {
    __u32 irq;
};

struct pykvm_lapic {
    __u8 regs[1024];
};
