from __future__ import annotations

from random import Random

import msgspec

from dynctl.protocol.inflight import BusyChange, Inflight, WorkerInflight
from dynctl.protocol.specs import BusySpec
from dynctl.router.active import Footprint, InFlight, RankLoad, Ticket
from dynctl.router.peers import SILENT_S, Peers, PeerState
from dynctl.router.shared import SharedBlocks

W = "decode-0"


def entry(requests: int, worker: str = W, rank: int = 0) -> WorkerInflight:
    return WorkerInflight(worker, 1, rank, requests, requests, 10 * requests, 2 * requests)


def message(
    seq: int, *entries: WorkerInflight, whole: bool = False, who: str = "frontend-1", inc: int = 1
) -> Inflight:
    return Inflight(who, inc, seq, whole, list(entries))


def listening() -> tuple[Peers, RankLoad]:
    peers, load = Peers(), RankLoad(SharedBlocks())
    peers.begin("frontend-0", 1, lambda: None)
    peers.expect(["frontend-1", "frontend-2"])
    peers.attach(W, 1, [load])
    return peers, load


def test_alone_a_frontend_notes_no_change() -> None:
    peers, load = Peers(), RankLoad(SharedBlocks())
    peers.attach(W, 1, [load])
    assert load.on_change is None


def test_a_change_wakes_once_and_is_told_once() -> None:
    peers, load, woken = Peers(), RankLoad(SharedBlocks()), list[int]()
    peers.attach(W, 4, [RankLoad(SharedBlocks()), load])
    peers.begin("frontend-0", 7, lambda: woken.append(1))
    assert peers.changes() is None
    ticket = load.add(Footprint(100, (), 6))
    load.add(Footprint(10, (), 1)).first_token()
    assert len(woken) == 1
    assert peers.changes() == Inflight("frontend-0", 7, 0, False, [WorkerInflight(W, 4, 1, 2, 1, 100, 7)])
    assert peers.changes() is None
    ticket.finish()
    assert len(woken) == 2
    assert peers.whole() == Inflight("frontend-0", 7, 1, True, [WorkerInflight(W, 4, 1, 1, 0, 0, 1)])
    assert peers.changes() is None, "it was in the whole"


def test_a_worker_that_is_gone_is_told_of_no_more() -> None:
    peers, load = listening()
    ticket = load.add(Footprint(1, (), 1))
    peers.detach(W, 1)
    ticket.finish()
    assert peers.changes() is None
    assert peers.whole().entries == []


def test_peers_add_up_and_a_leaving_one_takes_its_part_along() -> None:
    peers, load = listening()
    peers.take(message(0, entry(2)), 0.0)
    peers.take(message(0, entry(3), who="frontend-2"), 0.0)
    assert load.peers == InFlight(5, 5, 50, 10)
    peers.expect(["frontend-2"])
    assert load.peers.requests == 3
    peers.take(message(1, entry(9)), 0.1)
    assert load.peers.requests == 3, "who is no member is not heard"


def test_who_is_not_heard_is_told() -> None:
    peers, _ = listening()
    assert peers.begun
    peers.take(message(0), 0.0)
    (doubt,) = peers.doubts()
    assert doubt.startswith("frontend-2: nothing is heard of it")


def test_a_silent_peer_counts_no_more() -> None:
    peers, load = listening()
    peers.take(message(0, entry(2)), 0.0)
    assert peers.expire(SILENT_S) == []
    assert peers.expire(SILENT_S + 0.1) == ["frontend-1"]
    assert load.peers == InFlight()
    assert peers.states()[0] == PeerState("frontend-1", heard=False, missed=0, requests=0)


def test_a_restarted_peer_starts_from_nothing_and_its_past_is_not_heard() -> None:
    peers, load = listening()
    peers.take(message(50, entry(2)), 0.0)
    peers.take(message(0, inc=2), 0.1)
    assert load.peers.requests == 0
    peers.take(message(51, entry(4)), 0.2)
    assert load.peers.requests == 0


def test_what_is_told_of_a_worker_before_the_membership_is_kept() -> None:
    peers, _ = listening()
    peers.take(message(0, entry(2, worker="decode-1")), 0.0)
    late = RankLoad(SharedBlocks())
    peers.attach("decode-1", 1, [late])
    assert late.peers.requests == 2


def test_a_late_message_does_not_undo_a_newer_one_but_tells_the_rest() -> None:
    peers, load = listening()
    other = RankLoad(SharedBlocks())
    peers.attach("decode-1", 1, [other])
    peers.take(message(2, entry(1)), 0.0)
    peers.take(message(1, entry(5), entry(3, worker="decode-1")), 0.0)
    assert (load.peers.requests, other.peers.requests) == (1, 3)


def test_dropped_delayed_doubled_and_reordered_messages_do_no_lasting_harm() -> None:
    rng = Random(3)
    teller, hearer, woken = Peers(), Peers(), list[int]()
    teller.begin("frontend-1", 1, lambda: woken.append(1))
    hearer.begin("frontend-0", 1, lambda: None)
    hearer.expect(["frontend-1"])
    told = [RankLoad(SharedBlocks()) for _ in range(4)]
    heard = [RankLoad(SharedBlocks()) for _ in range(4)]
    teller.attach(W, 1, told)
    hearer.attach(W, 1, heard)
    tickets: list[Ticket] = []
    late: list[Inflight] = []
    for step in range(2000):
        if tickets and rng.random() < 0.5:
            tickets.pop(rng.randrange(len(tickets))).finish()
        else:
            tickets.append(rng.choice(told).add(Footprint(rng.randrange(100), (), rng.randrange(9))))
        sent = teller.changes()
        assert sent is not None
        late += [sent] * rng.choice((0, 1, 1, 2))
        while late and rng.random() < 0.6:
            hearer.take(late.pop(rng.randrange(len(late))), float(step))
    for left in late:
        hearer.take(left, 2000.0)
    hearer.take(teller.whole(), 2000.0)
    assert [load.peers for load in heard] == [load.own for load in told]
    state = hearer.states()[0]
    assert state.requests == len(tickets)
    assert state.missed > 300


def test_thresholds_changed_anywhere_are_the_latest_everywhere() -> None:
    peers, woken = Peers(), list[int]()
    heard: list[BusySpec] = []
    peers.on_busy = heard.append
    peers.expect(["frontend-1"])
    first, second, third = (BusySpec(prefill_tokens=count) for count in (1, 2, 3))
    peers.set_busy(first, 100.0)  # alone yet
    peers.begin("frontend-0", 1, lambda: woken.append(1))
    told = peers.changes()
    assert told is not None
    assert told.busy == BusyChange(100.0, first)
    assert peers.changes() is None
    for seq, change in enumerate((BusyChange(99.0, second), BusyChange(101.0, second), None)):
        peers.take(msgspec.structs.replace(message(seq), busy=change), 0.0)
    assert heard == [second]
    peers.set_busy(third, 50.0)  # its clock is behind: what is set last is the latest all the same
    assert woken == [1]
    whole = peers.whole()
    assert whole.busy is not None
    assert (whole.busy.busy, whole.busy.since_s > 101.0) == (third, True)
    peers.take(msgspec.structs.replace(message(9), busy=BusyChange(101.0, second)), 0.0)
    assert heard == [second]
    stranger = msgspec.structs.replace(message(0, who="who"), busy=BusyChange(999.0, first))
    peers.take(stranger, 0.0)
    assert heard == [second]


def test_messages_keep_their_form() -> None:
    sent = message(3, entry(2), whole=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Inflight) == sent
