"""What the source makes of a destination that speaks out of turn."""

from __future__ import annotations

import pytest

from pykvm.errors import ChannelError, WireError
from pykvm.migrate import pair
from pykvm.migrate.messages import Accept, Failed, Mismatch, Ready, Verified
from pykvm.migrate.session import PeerFailedError, Session

DIGEST = "00" * 16


def test_silence_is_what_a_busy_source_wants() -> None:
    here, there = pair()
    with here, there:
        Session(here).check_peer()


def test_a_destination_that_gave_up_is_heard_while_the_source_sends() -> None:
    here, there = pair()
    with here, there:
        Failed("disk full", False).send(there)
        with pytest.raises(PeerFailedError, match="disk full") as caught:
            Session(here).check_peer()
        assert not caught.value.started


def test_a_destination_that_is_gone_is_noticed_while_the_source_sends() -> None:
    here, there = pair()
    with here:
        there.close()
        with pytest.raises(ChannelError):
            Session(here).check_peer()


def test_chatter_is_an_error() -> None:
    here, there = pair()
    with here, there:
        Ready().send(there)
        with pytest.raises(WireError, match="READY where nothing was due"):
            Session(here).check_peer()


def test_an_answer_of_another_kind_is_an_error() -> None:
    here, there = pair()
    with here, there:
        Ready().send(there)
        with pytest.raises(WireError, match="READY where ACCEPT was due"):
            Session(here).expect(Accept)


def test_one_of_two_answers() -> None:
    here, there = pair()
    with here, there:
        Verified(DIGEST).send(there)
        Mismatch(DIGEST, 1, (7,)).send(there)
        session = Session(here)
        assert session.expect_either(Verified, Mismatch) == Verified(DIGEST)
        assert session.expect_either(Verified, Mismatch) == Mismatch(DIGEST, 1, (7,))


def test_a_broken_connection_is_explained_by_the_last_words_of_the_destination() -> None:
    here, there = pair()
    with here:
        Failed("out of memory", False).send(there)
        there.close()
        assert "out of memory" in str(Session(here).why(ChannelError("broken pipe")))


def test_without_last_words_it_stays_what_it_was() -> None:
    here, there = pair()
    with here:
        there.close()
        error = ChannelError("broken pipe")
        assert Session(here).why(error) is error
