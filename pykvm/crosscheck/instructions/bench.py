"""The processors that a case of one mode and CPL runs on, and their verdict."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from enum import Enum
from types import TracebackType
from typing import Self

from pykvm.crosscheck.instructions.case import Executor, InstructionCase, Outcome
from pykvm.crosscheck.instructions.compare import Oracle, difference
from pykvm.crosscheck.instructions.host import HostExecutor
from pykvm.crosscheck.instructions.known import explanation
from pykvm.crosscheck.instructions.machine import MachineExecutor
from pykvm.crosscheck.instructions.rule import Known
from pykvm.errors import HostError
from pykvm.machine import System
from pykvm.observe import HostCpu
from pykvm.observe.cpuid import host_cpuid
from pykvm.x86.cpuid import CpuidEntry


class Kind(Enum):
    """What a comparison showed."""

    AGREE = "agree"
    ALONE = "only the model executed it"
    KNOWN = "known difference"
    MODEL = "the model is wrong"
    KVM = "KVM is wrong"
    HOST = "the host's outcome stands alone"
    OPEN = "two disagree, and nobody decides"
    MISSING = "the model lacks the instruction"


def processor(system: System) -> tuple[CpuidEntry, ...]:
    """The CPUID that guests see: the host's own where it can be asked, or else the best of the system's."""
    try:
        with HostCpu() as host:
            return host_cpuid(host)
    except HostError:
        with system.create_machine() as machine:
            return tuple(machine.supported_cpuid)


UNEXPLAINED = frozenset({Kind.MODEL, Kind.KVM, Kind.HOST, Kind.OPEN})


@dataclass(frozen=True, slots=True)
class Verdict:
    """``words``: the first difference per executor; ``known``: what explains one."""

    kind: Kind
    words: dict[str, str] = field(default_factory=dict)
    known: Known | None = None

    def __str__(self) -> str:
        differences = "; ".join(f"{self.kind.value}: {who} has {text}" for who, text in self.words.items())
        return differences or self.kind.value


class Bench:
    """The model and whatever else is there: the host's processor at CPL 3, KVM.

    ``systems``: the model's system and KVM's, if there is one.  ``cpuid`` is the processor that the guests
    see.  ``left_out`` says why an executor is missing.  A context manager.
    """

    def __init__(
        self,
        mode: int,
        cpl: int,
        systems: Sequence[System],
        oracle: Oracle,
        cpuid: Sequence[CpuidEntry],
        *,
        host: bool = True,
    ) -> None:
        self.mode, self.cpl = mode, cpl
        self.oracle = oracle
        self.left_out: list[str] = []
        self._stack = ExitStack()
        self._executors: list[Executor] = []
        try:
            for system in systems:
                self._add(MachineExecutor(system, mode, cpl, cpuid))
            if host and mode != 16:
                try:
                    self._add(HostExecutor(mode))
                except HostError as error:
                    self.left_out.append(str(error))
        except BaseException:
            self.close()
            raise

    def _add(self, executor: Executor) -> None:
        self._executors.append(executor)
        self._stack.callback(executor.close)

    def close(self) -> None:
        """Close all executors; twice does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The executors' names."""
        return tuple(executor.name for executor in self._executors)

    def outcomes(self, case: InstructionCase) -> dict[str, Outcome]:
        """The case on all executors that accept it.

        Of a case at CPL 0 the host executes the CPL 3 twin, which is asked when two machines disagree.
        """
        return {each.name: each.execute(case) for each in self._executors if each.accepts(case)}

    def judge(self, case: InstructionCase) -> Verdict:
        """Run the case and compare everybody with the first executor, the model.

        A case at CPL 0 that no other machine can execute agrees if its CPL 3 twin on the host does.
        """
        outcomes = self.outcomes(case)
        model, *others = outcomes.items()
        return self._verdict(case, model[1], dict(others))

    def _verdict(self, case: InstructionCase, model: Outcome, others: dict[str, Outcome]) -> Verdict:
        if model.failure == "unsupported":
            return Verdict(Kind.MISSING)
        undefined = 0
        if model.vector is None:
            undefined = self.oracle.undefined_flags(case.mode, case.code, case.registers)
        words: dict[str, str] = {}
        known: Known | None = None
        agreeing = set()
        for who, outcome in others.items():
            if outcome.failure == "unsupported":
                continue
            text = difference(model, outcome, undefined=undefined, host=who == "host")
            if text is None:
                agreeing.add(who)
                continue
            found = explanation(who, case, model, outcome)
            if found is None:
                words[who] = text
            else:
                known = found
        if not (words or known or agreeing):
            twin = self._twin(case)
            return Verdict(Kind.AGREE if twin is not None and _alike(model, twin, undefined) else Kind.ALONE)
        if not words:
            return Verdict(Kind.AGREE if known is None else Kind.KNOWN, {}, known)
        return Verdict(self._kind(case, model, others, words, agreeing, undefined), words)

    def _kind(
        self,
        case: InstructionCase,
        model: Outcome,
        others: dict[str, Outcome],
        words: dict[str, str],
        agreeing: set[str],
        undefined: int,
    ) -> Kind:
        if "host" in others:
            if "host" not in words:
                return Kind.KVM
            return Kind.HOST if agreeing else Kind.MODEL
        twin = self._twin(case)
        if twin is not None and _alike(model, twin, undefined):
            return Kind.KVM
        return Kind.OPEN

    def _twin(self, case: InstructionCase) -> Outcome | None:
        """The case at CPL 3 on the host."""
        other = replace(case, cpl=3)
        for each in self._executors:
            if each.name == "host" and each.accepts(other):
                return each.execute(other)
        return None


def _alike(model: Outcome, host: Outcome, undefined: int) -> bool:
    return difference(model, host, undefined=undefined, host=True) is None
