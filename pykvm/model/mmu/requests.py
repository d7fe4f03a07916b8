"""What a vCPU has to do before it next runs guest code (``KVM_REQ_*``)."""

from __future__ import annotations


class Requests:
    """The requests that wait, and that KVM serves in ``vcpu_enter_guest``."""

    __slots__ = ("flush", "flush_current", "flush_guest", "free_obsolete", "ring_full", "sync")

    def __init__(self) -> None:
        self.flush = False
        """KVM_REQ_TLB_FLUSH."""
        self.flush_current = False
        """KVM_REQ_TLB_FLUSH_CURRENT; a full flush serves it, too."""
        self.flush_guest = False
        """KVM_REQ_TLB_FLUSH_GUEST: with shadow paging it also synchronises."""
        self.sync = False
        """KVM_REQ_MMU_SYNC."""
        self.free_obsolete = False
        """KVM_REQ_MMU_FREE_OBSOLETE_ROOTS."""
        self.ring_full = False
        """KVM_REQ_DIRTY_RING_SOFT_FULL."""

    @property
    def pending(self) -> bool:
        """Whether one waits that the entry itself serves (``kvm_request_pending``, a full ring aside)."""
        return self.flush or self.flush_current or self.flush_guest or self.sync or self.free_obsolete
