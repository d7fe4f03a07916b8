"""All mutations by topic, in the order in which docs/interleavings.md tells them.

Most lose something, and the explorer finds a shortest schedule that shows it.  A few lose nothing: they are
here because one might think that they do.
"""

from __future__ import annotations

from pykvm.model.interleave import mutations_logging as logging
from pykvm.model.interleave import mutations_mappings as mappings

TOPICS = {
    "GET_DIRTY_LOG and CLEAR_DIRTY_LOG": logging.GET,
    "Page faults": mappings.FAULTS,
    "Write tracking": mappings.TRACKING,
    "Dirty rings": logging.RINGS,
    "Deletion of a slot": mappings.REMOVAL,
    "PML": logging.PML,
    "Writes without a vCPU": logging.OUTSIDE,
    "Unsync": mappings.UNSYNC,
    "A fast page fault for shadow paging": mappings.SHADOW,
}

MUTATIONS = {mutation.name: mutation for topic in TOPICS.values() for mutation in topic}
