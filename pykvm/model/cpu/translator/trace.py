"""Following guest code from one instruction on, within its page."""

from __future__ import annotations

from typing import Final, NamedTuple

from pykvm.model.cpu import decode
from pykvm.model.cpu.instruction import Instruction
from pykvm.model.cpu.translator.branches import BRANCHES
from pykvm.model.cpu.translator.emitter import Emitter, Function, Mode, NoTemplate, compiled
from pykvm.model.cpu.translator.strings import STRINGS, copy, fill
from pykvm.model.cpu.translator.templates import TEMPLATES

_PAGE: Final = 0x1000
_LONGEST: Final = 64
_TEMPLATES: Final = TEMPLATES | BRANCHES | STRINGS


class Block(NamedTuple):
    """Translated code: valid while bytes ``first`` to ``last`` of its page are ``code``.

    ``run(cpu, limit, views)`` executes at most ``limit`` instructions, of which there must be room for
    ``length``, and returns how many it did: 0 where the first one is the interpreter's.
    """

    run: Function
    length: int
    first: int
    last: int
    code: bytes


def _decoded(decoder: decode.Decoder, page: memoryview, offset: int) -> Instruction | None:
    """The instruction at an offset of a page, None where there is none that lies in the page."""
    try:
        return decoder.decode(bytes(page[offset : offset + decode.MAX_LENGTH]))
    except (
        decode.InvalidEncodingError,
        decode.TooLongError,
        decode.TruncatedError,
        decode.UnknownInstructionError,
    ):
        return None


def translate(decoder: decode.Decoder, mode: Mode, page: memoryview, rip: int, offset: int) -> Block | None:
    """A block for the code at ``rip``, which lies at ``offset`` of ``page``; None where the first instruction
    has no template already."""
    emitter = Emitter(mode, rip)
    start, first, last = rip - offset, offset, offset
    seen: set[int] = set()
    at: int | None = rip
    while at is not None:
        insn = None
        if at not in seen and len(seen) < _LONGEST and 0 <= at - start < _PAGE:
            insn = _decoded(decoder, page, at - start)
        if insn is None or not _fits(insn, mode, at):
            emitter.finish(at)
            break
        template = _TEMPLATES.get(insn.name)
        try:
            if template is None:
                raise NoTemplate
            following = emitter.translate(insn, at, template)
        except NoTemplate:
            emitter.finish(at)
            break
        seen.add(at)
        first, last = min(first, at - start), max(last, at - start + insn.length)
        at = following
    if not seen:
        return None
    return Block(
        compiled(emitter, {"fill": fill, "copy": copy}), len(seen), first, last, bytes(page[first:last])
    )


def _fits(insn: Instruction, mode: Mode, rip: int) -> bool:
    """Whether the whole instruction may be fetched, with the next one's address in range."""
    return (
        mode.code_first <= rip
        and rip + insn.length - 1 <= mode.code_last
        and (
            rip + insn.length < 1 << (mode.canonical_shift if mode.bits == 64 else 32)
            or (mode.bits == 64 and rip >= 1 << 63 and rip + insn.length < 1 << 64)
        )
    )
