"""Statistics as a mapping, and their difference."""

from __future__ import annotations

from pykvm.machine import Statistic, Statistics, StatisticType, StatisticUnit


def snapshot(**values: int | tuple[int, ...]) -> Statistics:
    return Statistics(
        "kvm-1",
        {
            name: Statistic(
                name,
                value if isinstance(value, tuple) else (value,),
                StatisticType.CUMULATIVE,
                StatisticUnit.NONE,
                10,
                0,
                0,
            )
            for name, value in values.items()
        },
    )


def test_the_difference_names_only_what_moved() -> None:
    before = snapshot(pf_taken=3, pf_fixed=2, pages_4k=9, hist=(1, 0, 0))
    after = snapshot(pf_taken=5, pf_fixed=2, pages_4k=7, hist=(1, 2, 1), new=1)
    assert after - before == {"pf_taken": 2, "pages_4k": -2, "hist": 3, "new": 1}


def test_a_statistic_that_the_kernel_lacks_counts_zero() -> None:
    assert snapshot(a=1).value("mmu_shadow_pages") == 0
    assert "mmu_shadow_pages" not in snapshot(a=1)
