"""KVM's own MMU: which page is marked when, which write is emulated, what the counters say.

One module a mechanism, named as KVM names it.  The rules are those of docs/reference/kvm-mmu.md; a
``Profile`` says which of them a certain host follows.
"""
