"""Finding the profile of a live host: what its KVM does about memory, shown by tiny guests."""

from pykvm.probe.detect import Detection, detect
from pykvm.probe.evidence import Evidence, read_evidence
from pykvm.probe.finding import Finding, How

__all__ = ["Detection", "Evidence", "Finding", "How", "detect", "read_evidence"]
