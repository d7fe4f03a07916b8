"""The roots of a vCPU's shadow page tables: loading, caching, switching (kvm-mmu.md 10.2, 13.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pykvm.model.mmu import roles
from pykvm.model.mmu.outcomes import TripleFault
from pykvm.model.mmu.roles import RootRole
from pykvm.model.mmu.shadow_page import ShadowPage
from pykvm.model.paging_format import ADDRESS

if TYPE_CHECKING:
    from pykvm.model.mmu.vcpu import VcpuMmu

_PREVIOUS: Final = 3
"""KVM_MMU_NUM_PREV_ROOTS."""
_PAE_ROOTS: Final = 4
_RULE: Final = "kvm-mmu.md 10.2"


class Root(NamedTuple):
    """A loaded root: what it stands for, and its page, or four with up to three levels (None: absent)."""

    pgd: int
    role: RootRole
    pages: tuple[ShadowPage | None, ...]

    @property
    def is_dummy(self) -> bool:
        """Whether it maps nothing, since CR3 had no slot when it was loaded."""
        return all(sp is None for sp in self.pages)


class Roots:
    """The current root of a vCPU and the three before it."""

    def __init__(self, vcpu: VcpuMmu) -> None:
        self._vcpu = vcpu
        self.current: Root | None = None
        self.previous: list[Root | None] = [None] * _PREVIOUS

    def _all(self) -> list[Root]:
        return [root for root in (self.current, *self.previous) if root is not None]

    # --- loading -------------------------------------------------------------------------------------

    def load(self) -> None:
        """``kvm_mmu_load``: make the root that CR3 asks for.  Raises TripleFault where CR3 has no slot and
        the profile knows no dummy root."""
        vcpu = self._vcpu
        mmu = vcpu.mmu
        role = vcpu.root
        mmu.shadow.make_available()
        mmu.shadow.first_shadow_root() if role.levels else None
        pages: tuple[ShadowPage | None, ...]
        if role.levels == 0 and role.role & roles.LEVEL >= 4:
            pages = (self._page(0, role.role),)
            pgd = 0
        elif role.levels == 0:
            pages = tuple(
                self._page(number << 18, role.role & ~roles.LEVEL | 2) for number in range(_PAE_ROOTS)
            )
            pgd = 0
        else:
            pgd = vcpu.control.cr3
            pages = self._shadow_roots(role, pgd)
        if mmu.journal is not None:
            mmu.journal.note(f"vCPU {vcpu.id} loads root {pgd:#x}", _RULE)
        self.current = Root(pgd, role, pages)

    def _shadow_roots(self, role: RootRole, pgd: int) -> tuple[ShadowPage | None, ...]:
        vcpu = self._vcpu
        memslots = vcpu.mmu.memslots
        gfn = (pgd & ADDRESS) >> 12
        if memslots.visible(gfn) is None:
            self._require_dummy_root()
            return (None,) * (1 if role.levels >= 4 else _PAE_ROOTS)
        if role.levels >= 4:
            return (self._page(gfn, role.role),)
        level_2 = role.role & ~roles.LEVEL | 2
        if role.levels == 2:
            return tuple(
                self._page(gfn, level_2 | number << roles.QUADRANT_SHIFT) for number in range(_PAE_ROOTS)
            )
        pages: list[ShadowPage | None] = []
        for entry in vcpu.control.pdptrs:
            gfn = (entry & ADDRESS) >> 12
            if not entry & 1:
                pages.append(None)
            elif memslots.visible(gfn) is None:
                self._require_dummy_root()
                pages.append(None)
            else:
                pages.append(self._page(gfn, level_2))
        return tuple(pages)

    def _require_dummy_root(self) -> None:
        """The root has no slot: up to 6.1 ``mmu_check_root`` shuts the vCPU down."""
        if not self._vcpu.mmu.profile.dummy_root:
            raise TripleFault

    def _page(self, gfn: int, role: int) -> ShadowPage:
        sp = self._vcpu.mmu.shadow.get_page(self._vcpu, gfn, role)
        sp.root_count += 1
        return sp

    # --- synchronising -------------------------------------------------------------------------------

    def sync(self) -> None:
        """``kvm_mmu_sync_roots``: the tables below the current root, if any of them is unsync."""
        root = self.current
        if root is None or not root.role.levels:
            return
        vcpu = self._vcpu
        vcpu.forget_mmio()
        for sp in root.pages:
            if sp is not None and (sp.unsync_child_bitmap or sp.unsync):
                vcpu.mmu.unsync.sync_children(vcpu, sp)

    def free_unsync_previous(self) -> None:
        """``kvm_mmu_sync_prev_roots``: cached roots with something unsync are dropped instead."""
        self.free_previous(
            lambda root: any(sp is not None and (sp.unsync_child_bitmap or sp.unsync) for sp in root.pages)
        )

    def free_previous(self, chosen: Callable[[Root], bool]) -> None:
        """Drop the cached roots, the current one aside, that are ``chosen``."""
        gone = [root for root in self.previous if root is not None and chosen(root)]
        self.previous = [None if root in gone else root for root in self.previous]
        self._free(gone)

    # --- letting go ----------------------------------------------------------------------------------

    def _free(self, gone: list[Root]) -> None:
        shadow = self._vcpu.mmu.shadow
        zapped: list[ShadowPage] = []
        for root in gone:
            for sp in root.pages:
                if sp is not None:
                    shadow.release_root(sp, zapped)
        shadow.commit(zapped)

    def free_all(self) -> None:
        """``kvm_mmu_unload``: forget all roots; their pages stay in the hash."""
        gone = self._all()
        self.current = None
        self.previous = [None] * _PREVIOUS
        self._free(gone)

    def free_obsolete(self) -> None:
        """``kvm_mmu_free_obsolete_roots``: those whose pages were zapped under them, and dummies."""
        shadow = self._vcpu.mmu.shadow

        def obsolete(root: Root | None) -> bool:
            if root is None:
                return False
            return root.is_dummy or any(sp is not None and shadow.is_obsolete(sp) for sp in root.pages)

        gone = [root for root in self._all() if obsolete(root)]
        if obsolete(self.current):
            self.current = None
        self.previous = [None if obsolete(root) else root for root in self.previous]
        self._free(gone)

    # --- switching -----------------------------------------------------------------------------------

    def switch(self, pgd: int) -> None:
        """``kvm_mmu_new_pgd`` (``fast_pgd_switch``): take a cached root for this CR3, or have one loaded.

        The others move down one place; the fourth oldest goes.  Roots of up to three levels are not cached.
        """
        role = self._vcpu.root
        if role.levels < 4:
            if self.current is not None:
                self._free([self.current])
            self.current = None
            return

        def usable(root: Root | None) -> bool:
            return root is not None and root.pgd == pgd and root.role == role

        if self.current is None:
            for number, root in enumerate(self.previous):
                if usable(root):
                    self.current = root
                    del self.previous[number]
                    self.previous.append(None)
                    break
            else:
                return
        elif not usable(self.current):
            carried: Root | None = self.current
            for number in range(_PREVIOUS):
                carried, self.previous[number] = self.previous[number], carried
                if usable(carried):
                    break
            else:
                if carried is not None:
                    self._free([carried])
                carried = None
            self.current = carried
        if self.current is not None:
            for sp in self.current.pages:
                if sp is not None:
                    sp.write_flooding_count = 0
