"""Holding machines against each other: the model, the real KVM and the host CPU."""
