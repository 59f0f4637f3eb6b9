"""How a fleet finds an endpoint's limit and shares it, on a simulated clock."""

from __future__ import annotations

import msgspec
import pytest
from fleet_simulation import Bucket, Endpoint, Simulation, Window, constant, exponential

from gym_bus.models.fleet import Fleet, Member, Partner, fair_places, fair_rates
from gym_bus.models.pacing import Measure, Pacing, Trial
from gym_bus.models.throttle import RAMP_FLOOR, Backoff, End, Throttle

LATENCIES = {"constant": constant, "exponential": exponential}


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("workers", [1, 4, 16])
@pytest.mark.parametrize(("limit", "seconds"), [(64, 60.0), (1000, 40.0)])
def test_the_endpoint_is_kept_busy_and_seldom_refuses(limit: int, seconds: float, workers: int, latency: str) -> None:
    fleet = Simulation(Endpoint(limit, LATENCIES[latency](2.0)), workers, 3 * limit // workers)
    fleet.run(5.0)

    load = fleet.run(seconds)

    assert load.taken_per_s >= 0.9 * limit / 2.0
    assert load.refused_share < 0.02


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_few_places_are_found_and_go_round(workers: int) -> None:
    fleet = Simulation(Endpoint(8, constant(0.5)), workers, 40)
    fleet.run(5.0)

    load = fleet.run(65.0)

    assert load.taken_per_s >= 0.9 * 16
    assert load.refused_share < 0.02
    assert all(worker.throttle.taken_at > 40 for worker in fleet.workers)


@pytest.mark.parametrize("latency", LATENCIES)
def test_fewer_places_than_workers_are_put_to_use(latency: str) -> None:
    fleet = Simulation(Endpoint(8, LATENCIES[latency](2.0)), 16, 8)
    fleet.run(10.0)

    load = fleet.run(130.0)

    assert load.taken_per_s >= 0.8 * 4  # one per cent of so few calls finds out little of a limit in two minutes
    assert load.refused_share < 0.02


def test_a_worker_that_joins_takes_what_others_give_up() -> None:
    fleet = Simulation(Endpoint(64, constant(2.0)), 2, 200)
    fleet.run(20.0)

    joined = [fleet.join() for _ in range(2)]
    load = fleet.run(30.0)

    assert load.refused <= 5
    assert sum(worker.throttle.in_flight for worker in joined) >= 24


def test_the_places_of_a_killed_worker_come_back() -> None:
    fleet = Simulation(Endpoint(64, constant(2.0)), 4, 200)
    fleet.run(20.0)

    for worker in fleet.workers[:2]:
        worker.alive = False
    fleet.run(28.0)

    assert fleet.run(38.0).taken_per_s >= 0.9 * 32


@pytest.mark.parametrize("workers", [1, 4])
def test_a_limit_that_changes_is_followed(workers: int) -> None:
    endpoint = Endpoint(64, constant(2.0))
    fleet = Simulation(endpoint, workers, 400)
    fleet.run(20.0)

    endpoint.most = 200
    fleet.run(50.0)
    risen = fleet.run(60.0)
    endpoint.most = 50
    fleet.run(100.0)
    fallen = fleet.run(120.0)

    assert risen.taken_per_s >= 0.9 * 100
    assert fallen.taken_per_s >= 0.8 * 25
    assert fallen.refused_share < 0.05


@pytest.mark.parametrize("workers", [1, 16])
def test_an_endpoint_that_takes_nothing_is_asked_seldom_and_found_again(workers: int) -> None:
    endpoint = Endpoint(64, constant(1.0))
    fleet = Simulation(endpoint, workers, 200)
    fleet.run(20.0)

    endpoint.closed = True
    storm = fleet.run(50.0)
    endpoint.closed = False
    fleet.run(80.0)

    assert storm.refused <= 2 * 64 + 12 * workers  # places are tried twice; against 200 waiting calls of each worker
    assert fleet.run(90.0).taken_per_s >= 0.8 * 64


def test_an_endpoint_that_never_refuses_is_not_held_back() -> None:
    fleet = Simulation(Endpoint(10**6, constant(2.0)), 1, 4000)

    fleet.run(4.0)

    assert fleet.fleet.limit is None
    assert fleet.endpoint.peak == 4000


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_refusals_at_random_do_not_hold_the_work_up(noise: float, workers: int) -> None:
    fleet = Simulation(Endpoint(10**6, exponential(1.0), noise=noise), workers, 200 // workers)
    fleet.run(10.0)

    assert fleet.run(60.0).taken_per_s >= 0.9 * 200


@pytest.mark.parametrize("most", [10**6, 128])
@pytest.mark.parametrize("workers", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_an_endpoint_that_refuses_a_fifth_at_random_is_not_taken_for_a_full_one(workers: int, most: int) -> None:
    fleet = Simulation(Endpoint(most, exponential(1.0), noise=0.2), workers, 208 // workers)
    fleet.run(60.0)

    assert fleet.run(120.0).taken_per_s >= 0.5 * min(most, 208)


@pytest.mark.parametrize("retry_after_s", [None, 1.0])
@pytest.mark.parametrize("workers", [1, 4, 16])
@pytest.mark.parametrize("counted", [Bucket, Window])
def test_an_endpoint_that_counts_the_calls_of_a_second_is_put_to_use(
    counted: type[Bucket | Window], workers: int, retry_after_s: float | None
) -> None:
    endpoint = counted(64, exponential(0.5))
    endpoint.retry_after_s = retry_after_s
    fleet = Simulation(endpoint, workers, 128 // workers + 4)
    fleet.run(40.0)

    load = fleet.run(100.0)

    assert load.taken_per_s >= 0.9 * 64
    assert load.refused_share < 0.03  # a trial of the other way included


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_few_short_calls_per_second_are_found_where_one_place_is_too_many(workers: int) -> None:
    fleet = Simulation(Bucket(20, exponential(0.02)), workers, 8)
    fleet.run(40.0)

    load = fleet.run(100.0)

    assert load.taken_per_s >= 0.8 * 20
    assert load.refused_share < 0.05


@pytest.mark.parametrize("workers", [1, 4])
def test_places_come_back_where_an_endpoint_no_longer_counts_calls_per_second(workers: int) -> None:
    fleet = Simulation(Window(64, exponential(0.5)), workers, 256 // workers)
    fleet.run(40.0)
    paced = fleet.fleet.pace

    busy, fleet.endpoint = fleet.endpoint.busy, Endpoint(64, exponential(0.5))
    fleet.endpoint.busy = busy
    fleet.run(400.0)

    assert paced > 0
    assert fleet.fleet.pace == 0
    assert fleet.run(440.0).taken_per_s >= 0.9 * 128


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("workers", [1, 16])
def test_a_trial_of_the_other_way_costs_little(workers: int, latency: str) -> None:
    fleet = Simulation(Endpoint(64, LATENCIES[latency](0.5)), workers, 192 // workers)
    fleet.run(10.0)

    load = fleet.run(70.0)

    assert fleet.fleet.pacing.trials > 0
    assert load.taken_per_s >= 0.93 * 128
    assert load.refused_share < 0.02


def test_a_refusal_counts_when_the_next_call_is_refused_too() -> None:
    full = throttle(places=4)
    now = 1.0
    full.end(full.start(now), now, End.REFUSED)
    assert (full.tally.refused, full.tally.odd) == (1, 0)
    full.end(full.start(now), now, End.TAKEN)
    full.end(full.start(now), now, End.REFUSED)
    full.end(full.start(now), now, End.REFUSED)
    assert (full.tally.refused, full.tally.odd) == (3, 1)


def throttle(places: int | None = None) -> Throttle:
    made = Throttle(Backoff(first_s=1.0, most_s=8.0, most_asked_s=30.0), places=0)
    made.begin(RAMP_FLOOR)
    made.places = places
    return made


def test_what_is_taken_opens_the_ramp() -> None:
    ramp = throttle()

    first = [ramp.start(0.0) for _ in range(RAMP_FLOOR) if ramp.room(0.0)]

    assert len(first) == RAMP_FLOOR and not ramp.room(0.01)
    assert ramp.room_at(0.01) == pytest.approx(0.05)
    assert ramp.room(0.051)


def test_the_wish_of_an_endpoint_that_takes_nothing_is_honoured() -> None:
    closing = throttle(places=4)
    now = 0.0
    for _ in range(3):
        assert closing.room(now)
        closing.end(closing.start(now), now + 0.01, End.REFUSED, retry_after_s=20.0)
        now += 1.0

    assert not closing.room(now + 17.0)
    assert closing.room_at(now) == pytest.approx(now - 1.0 + 0.01 + 20.0)
    assert closing.room(now + 21.0)


def test_a_wish_for_too_long_is_not() -> None:
    closing = throttle(places=4)
    for now in (0.0, 1.0, 2.0):
        assert closing.room(now)
        closing.end(closing.start(now), now, End.REFUSED, retry_after_s=86_400.0)

    assert closing.room(2.0 + 31.0)


def test_many_timeouts_take_a_third_of_the_calls_and_a_single_one_takes_none() -> None:
    slow = throttle(places=None)
    tickets = []
    for _ in range(100):
        slow._ramp = 1000.0
        tickets.append(slow.start(0.0))

    slow.end(tickets.pop(), 10.0, End.TIMED_OUT)
    assert slow.places is None
    while tickets and slow.places is None:
        slow.end(tickets.pop(), 10.0, End.TIMED_OUT)

    assert slow.places == int(0.7 * (len(tickets) + 1))


def test_without_the_record_a_worker_goes_on_with_what_it_has() -> None:
    alone = throttle(places=0)
    partner = Partner("w", alone)

    partner.go_alone()
    assert alone.room(0.0)
    partner.stored(partner.settle(Fleet(limit=4), 9, 1.0), 1.0)
    before = alone.places
    partner.go_alone()

    assert alone.places == before == 4


def test_the_record_survives_the_wire() -> None:
    pacing = Pacing(pace=2.5, way=Measure(1.5, 3, 1), trial=Trial(before=Measure(9.0, 40, 2), places=4))
    fleet = Fleet(limit=3, members={"w": Member(beat=2, places=3, wants=9)}, trial=(4, 0.5, 1), pacing=pacing)

    assert msgspec.json.decode(msgspec.json.encode(fleet), type=Fleet) == fleet


@pytest.mark.parametrize(
    ("limit", "wants", "turn", "shares"),
    [
        (10, {"a": 9, "b": 9}, 0, {"a": 5, "b": 5}),
        (10, {"a": 2, "b": 50}, 0, {"a": 2, "b": 8}),
        (7, {"a": 9, "b": 9, "c": 9}, 0, {"a": 3, "b": 2, "c": 2}),
        (7, {"a": 9, "b": 9, "c": 9}, 1, {"a": 2, "b": 3, "c": 2}),
        (2, {"a": 9, "b": 9, "c": 9}, 0, {"a": 1, "b": 1, "c": 0}),
        (2, {"a": 9, "b": 9, "c": 9}, 1, {"a": 1, "b": 0, "c": 1}),
        (10, {"a": 1, "b": 1}, 0, {"a": 5, "b": 5}),
        (10, {}, 0, {}),
    ],
)
def test_places_are_shared_fairly(limit: int, wants: dict[str, int], turn: int, shares: dict[str, int]) -> None:
    assert fair_places(limit, wants, turn) == shares


def test_a_slow_pace_goes_to_some_at_a_time() -> None:
    wants = dict.fromkeys("abcd", 5)

    assert fair_rates(40.0, wants, 0) == dict.fromkeys("abcd", 10.0)
    assert fair_rates(8.0, wants, 0) == {"a": 4.0, "b": 4.0}
    assert fair_rates(8.0, wants, 1) == {"c": 4.0, "d": 4.0}
