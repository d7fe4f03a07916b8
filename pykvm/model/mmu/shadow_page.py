"""Shadow pages (being written)."""


class ShadowPage:
    """``struct kvm_mmu_page``."""
