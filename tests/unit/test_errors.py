"""The exception tree: one class and one exit status for each thing that can go wrong."""

from __future__ import annotations

import errno

import pytest

from pykvm import errors

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.PykvmError)
]


@pytest.mark.parametrize("cls", ALL)
def test_every_error_says_what_it_means_and_has_a_status(cls: type[errors.PykvmError]) -> None:
    assert cls.__doc__
    assert 1 <= cls.exit_status <= 125


def test_an_errno_becomes_the_documented_class_with_its_advice() -> None:
    table = {errno.EEXIST: (errors.SlotOverlapError, "move one.")}
    error = errors.from_errno(errno.EEXIST, "KVM_X", table)
    assert type(error) is errors.SlotOverlapError
    assert error.errno == errno.EEXIST
    assert error.operation == "KVM_X"
    assert str(error) == "KVM_X failed with EEXIST (File exists): move one."


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENOTTY, errno.EIO, errno.EFAULT])
def test_common_errnos_come_with_advice(number: int) -> None:
    error = errors.from_errno(number, "KVM_X", {})
    assert type(error) is errors.KvmError
    assert ": " in str(error)


def test_an_unknown_errno_still_makes_a_sentence() -> None:
    assert str(errors.from_errno(9999, "KVM_X")).startswith("KVM_X failed with 9999")
