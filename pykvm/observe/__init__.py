"""The host's processor as an oracle: one instruction at a time in a traced child process."""

from pykvm.observe.host_cpu import HostCase, HostCpu, HostOutcome

__all__ = ["HostCase", "HostCpu", "HostOutcome"]
