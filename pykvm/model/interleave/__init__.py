"""The lockless parts of KVM's dirty tracking as atomic steps of a few actors, explored exhaustively.

``cases`` are small worlds, ``mutations`` KVM's rules with one of them broken; ``explorer`` visits every
state that the actors of a case can reach in any order.  docs/interleavings.md tells what came of it.
"""

from pykvm.model.interleave.cases import CASES, Case
from pykvm.model.interleave.explorer import Counterexample, Line, Result
from pykvm.model.interleave.mutation import Mutation
from pykvm.model.interleave.mutations import MUTATIONS, TOPICS
from pykvm.model.interleave.rules import Repair, Rules

__all__ = [
    "CASES",
    "MUTATIONS",
    "TOPICS",
    "Case",
    "Counterexample",
    "Line",
    "Mutation",
    "Repair",
    "Result",
    "Rules",
]
