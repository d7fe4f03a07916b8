"""pykvm: find out whether a KVM host tells the truth about memory."""

__version__ = "0.1.0"
