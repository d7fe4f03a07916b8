"""The coverage table: which opcode forms were hit, in which modes, with how many shapes of operands."""

from __future__ import annotations

from pykvm.crosscheck.instructions.campaign import Report, Room
from pykvm.crosscheck.instructions.forms import FORMS


def room_name(room: Room) -> str:
    """``64-bit, CPL 3``."""
    return "real mode" if room.mode == 16 else f"{room.mode}-bit, CPL {room.cpl}"


def markdown(report: Report) -> str:
    """A page with a row for each form: cases, and in brackets the shapes of operands among them."""
    lines = [
        "# Coverage of the instruction cross-check",
        "",
        f"{report.cases:,} cases. A cell tells how many cases of the form ran, and in brackets how many "
        "shapes of operands they had (register or memory, by operand size); a dash where the form does not "
        "exist.",
        "",
        "| form | instruction | " + " | ".join(room_name(room) for room in report.rooms) + " |",
        "|---|---|" + "---|" * len(report.rooms),
    ]
    names: dict[str, str] = {}
    for form in FORMS:
        names.setdefault(form.id, form.name)
    for form_id, name in names.items():
        cells = [_cell(room, form_id) for room in report.rooms]
        lines.append(f"| {form_id} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(room: Room, form_id: str) -> str:
    exists = any(form.id == form_id and form.exists(room.mode, room.cpl) for form in FORMS)
    if not exists:
        return "-"
    shapes = [count for (form, _), count in room.coverage.items() if form == form_id]
    return f"{sum(shapes)} ({len(shapes)})"
