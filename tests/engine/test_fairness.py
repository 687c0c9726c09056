"""The queue is fair among users, and first come first served within one."""

from __future__ import annotations

from ktcore.engine.schedule.fairness import USERS, FairQueue
from ktcore.engine.schedule.sequence import Sequence
from ktcore.ops.sampling import SamplingParams


class Arrivals:
    def __init__(self) -> None:
        self.queue = FairQueue()
        self.count = 0

    def __call__(self, user: str) -> Sequence:
        sequence = Sequence([1, 2, 3], SamplingParams(temperature=0), 4, user=user, arrival=self.count)
        self.count += 1
        self.queue.add(sequence)
        return sequence

    def serve(self, sequence: Sequence, tokens: int = 10) -> None:
        self.queue.take(sequence)
        self.queue.charge(sequence, tokens, drawn=True)


def test_a_user_with_many_requests_does_not_hold_up_one_with_few() -> None:
    arrive = Arrivals()
    many = [arrive("many") for _ in range(6)]
    few = [arrive("few") for _ in range(2)]
    order = []
    while len(arrive.queue):
        first = next(iter(arrive.queue))
        order.append(first)
        arrive.serve(first)
    assert order[:4] == [many[0], few[0], many[1], few[1]]
    assert order[4:] == many[2:]


def test_one_user_is_served_in_the_order_of_arrival() -> None:
    arrive = Arrivals()
    sequences = [arrive("one") for _ in range(5)]
    assert list(arrive.queue) == sequences


def test_being_away_saves_up_no_claim() -> None:
    arrive = Arrivals()
    steady = arrive("steady")
    arrive.queue.charge(steady, 1000, drawn=False)
    late = [arrive("late") for _ in range(3)]
    arrive.serve(late[0], 10)
    # level with the one who was there when it came, not a thousand tokens ahead
    assert next(iter(arrive.queue)) is steady


def test_who_made_room_comes_first() -> None:
    arrive = Arrivals()
    first, second = arrive("a"), arrive("b")
    arrive.serve(first)
    arrive.queue.put_back(first)
    assert list(arrive.queue) == [first, second]
    assert first in arrive.queue
    arrive.queue.take(first)
    assert list(arrive.queue) == [second]


def test_users_who_are_gone_are_not_remembered_for_ever() -> None:
    arrive = Arrivals()
    for i in range(USERS + 50):
        sequence = arrive(str(i))
        arrive.queue.take(sequence)
        arrive.queue.ended(sequence)
    assert len(arrive.queue._served) <= USERS + 1
    assert not arrive.queue._present


def test_a_drawn_token_counts_as_two_of_a_prompts() -> None:
    arrive = Arrivals()
    drawing, reading = arrive("drawing"), arrive("reading")
    arrive.queue.charge(drawing, 10, drawn=True)
    arrive.queue.charge(reading, 19, drawn=False)
    assert list(arrive.queue) == [reading, drawing]
    arrive.queue.charge(reading, 2, drawn=False)
    assert list(arrive.queue) == [drawing, reading]


def test_a_user_is_there_until_the_last_request_has_ended() -> None:
    arrive = Arrivals()
    first, second = arrive("busy"), arrive("busy")
    arrive.queue.charge(first, 100, drawn=False)
    arrive.queue.take(first)
    arrive.queue.ended(first)
    late = arrive("late")  # level with busy, who is there still
    arrive.queue.charge(late, 1, drawn=False)
    assert list(arrive.queue) == [second, late]
    for sequence in (second, late):
        arrive.queue.take(sequence)
        arrive.queue.ended(sequence)
    last = arrive("new")  # nobody is there: nothing to be level with
    assert arrive.queue.rank(last)[0] == 0
