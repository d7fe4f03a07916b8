"""Shadow pages: the tables that the processor walks with TDP off (``struct kvm_mmu_page``, kvm-mmu.md 10)."""

from __future__ import annotations

from typing import Final

from pykvm.model.mmu import roles, spte

NONLEAF: Final = spte.P | spte.W | spte.U | spte.A | spte.MMU_PRESENT
"""A non-leaf SPTE; the page that it points to is in ``children``."""


class ShadowPage:
    """A table for the processor: ``spt`` holds what is not zero of its 512 SPTEs.

    An *indirect* page shadows the guest's table at ``gfn``; a *direct* one maps gfns in a row.  Its key in
    the hash is gfn and ``role``.
    """

    __slots__ = (
        "access",
        "children",
        "direct",
        "generation",
        "gfn",
        "invalid",
        "level",
        "mmio_generation",
        "nx_huge_page_disallowed",
        "nx_split",
        "parents",
        "role",
        "root_count",
        "shadowed_access",
        "spt",
        "unsync",
        "unsync_child_bitmap",
        "write_flooding_count",
    )

    def __init__(self, gfn: int, role: int, generation: int) -> None:
        self.gfn = gfn
        self.role = role
        self.level = role & roles.LEVEL
        self.direct = bool(role & roles.DIRECT)
        self.access = roles.access_of(role)
        self.generation = generation
        self.invalid = False
        """role.invalid: no vCPU may use it any more."""
        self.root_count = 0
        """How many cached roots of vCPUs it is."""
        self.spt: dict[int, int] = {}
        self.children: dict[int, ShadowPage] = {}
        self.shadowed_access: dict[int, int] = {}
        """Of each leaf SPTE, the access rights that the guest's tables gave it (indirect pages)."""
        self.mmio_generation: dict[int, int] = {}
        """Of each MMIO SPTE, the generation of the memslots when it was made."""
        self.parents: dict[tuple[ShadowPage, int], None] = {}
        """``parent_ptes``: the non-leaf SPTEs that point here, as page and index."""
        self.unsync = False
        """The guest may have written to its table since it was synchronised (level 1 only)."""
        self.unsync_child_bitmap: set[int] = set()
        """Indices of SPTEs below which something is unsync."""
        self.write_flooding_count = 0
        self.nx_huge_page_disallowed = False
        """Direct page that maps small pages so that they can be executed (NX huge-page mitigation)."""
        self.nx_split = False
        """A huge page would stand in its place without the mitigation: nx_lpage_splits counts it."""

    @property
    def unsync_children(self) -> int:
        """How many SPTEs have something unsync below them."""
        return len(self.unsync_child_bitmap)

    def leaf_gfn(self, index: int) -> int:
        """The gfn that entry ``index`` of a direct page maps."""
        return self.gfn + (index << 9 * (self.level - 1))

    def __repr__(self) -> str:
        state = " unsync" if self.unsync else ""
        return f"<SP gfn {self.gfn:#x}, {roles.describe(self.role)}{state}>"
