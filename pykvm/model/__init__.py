"""The reference machine: an x86 in pure Python behind the interface of KVM."""
