"""The bench's command line; see docs/benchmarks.md.  Started by ``scripts/bench/run``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # a checkout that is not installed

from measure import Effort, Row  # noqa: E402
from table import document, render  # noqa: E402
from yardstick import YardstickError, load  # noqa: E402

from pykvm.errors import PykvmError  # noqa: E402

ITEMS = {
    "exits": "exit round trip in C, and what a handler in Python adds",
    "rings": "dirty ring: harvest and reset per entry",
    "dirtylog": "KVM_GET_DIRTY_LOG and conversion to gfns",
    "tracking": "trackers beside KVM's dirty bitmap",
    "lifecycle": "create, run and destroy a VM",
    "migration": "live migration against C copying the same memory",
    "sparse": "a 1 TiB guest with 1000 dirty pages",
    "emulator": "the reference machine beside KVM's emulator and unicorn",
    "mmu": "the model of KVM's MMU beside real KVM",
}

Measure = Callable[[Any, Effort], Iterator[Row]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    items = "\n".join(f"  {name:10} {text}" for name, text in ITEMS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/bench/run",
        description="Measure pykvm against yardstick.c, a C program that makes the same ioctls. Both take\n"
        "turns within one run, and only the ratios count; nothing is compared with earlier runs.",
        epilog=f"items:\n{items}\n\nThe keys of --json are in docs/benchmarks.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under a minute in total")
    parser.add_argument(
        "--only", action="append", choices=ITEMS, metavar="ITEM", help="only this item; repeatable"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, the table on standard error"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 when a target is missed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    began = time.monotonic()
    rows: list[Row] = []
    try:
        yardstick = load()
        for name in options.only or ITEMS:
            print(f"== {name}: {ITEMS[name]}", file=sys.stderr)
            measure = cast(Measure, import_module(name).measure)
            rows += measure(yardstick, Effort(quick=options.quick))
    except (YardstickError, PykvmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, PykvmError) else 2
    print(render(rows), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(document(rows, quick=options.quick, seconds=time.monotonic() - began)))
    return int(options.check and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
