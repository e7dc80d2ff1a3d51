"""Several sweeps on one cluster: who may run how much, and that all get on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sharing import LOOK_SECONDS, TURN_SECONDS, Claim, Sharing, dealt, helped, makes_room, read_claim
from orchestrator.vacating import AGAIN_SECONDS, STARVED_SECONDS, Vacating
from storage.store import Store
from tests.faults.quick import spec
from tests.faults.runs import Sweep, quick
from tests.sweeps import assert_invariants, committed

amounts = st.fixed_dictionaries({"CPU": st.integers(1, 4)}, optional={"GPU": st.sampled_from([0.25, 0.5, 1.0])})
claims = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=2),
    st.builds(Claim, amounts, st.integers(0, 20), st.sampled_from([0.5, 1.0, 2.0, 3.0])),
    min_size=1,
    max_size=5,
)


@given(claims, st.fixed_dictionaries({"CPU": st.integers(0, 24), "GPU": st.integers(0, 4)}))
def test_shares(claims: dict[str, Claim], capacity: dict[str, float]) -> None:
    """Nobody gets more than it wants, all together no more than there is, and nothing stays free that somebody
    could use; every driver that counts alike comes to the same."""
    held = dealt(capacity, claims)
    used = {r: sum(n * claims[name].shard.get(r, 0) for name, n in held.items()) for r in capacity}
    assert all(held[name] <= claims[name].wants for name in claims)
    assert all(used[r] <= capacity[r] + 1e-6 for r in capacity)
    for name, claim in claims.items():
        fits = all(capacity.get(r, 0) - used.get(r, 0) >= amount for r, amount in claim.shard.items())
        assert held[name] == claim.wants or not fits
    assert dealt(capacity, dict(reversed(claims.items()))) == held


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
def test_shares_go_by_priority(slots: int, a: int, b: int) -> None:
    """Where both want everything, slots go as the priorities are to each other, to within one."""
    held = dealt({"CPU": slots}, {"a": Claim({"CPU": 1}, 99, a), "b": Claim({"CPU": 1}, 99, b)})
    assert sum(held.values()) == slots
    assert abs(held["a"] - slots * a / (a + b)) <= 1


def test_shares_by_hand() -> None:
    """What is not wanted goes to the others; who cannot use GPUs is not in the way of who can."""
    cpu = {"CPU": 1.0}
    assert dealt({"CPU": 8}, {"a": Claim(cpu, 99), "b": Claim(cpu, 1)}) == {"a": 7, "b": 1}
    assert dealt({"CPU": 4}, {"a": Claim(cpu, 9), "b": Claim(cpu, 9), "c": Claim(cpu, 9)}) == {"a": 2, "b": 1, "c": 1}
    assert dealt({"CPU": 9, "GPU": 1}, {"a": Claim({"CPU": 1, "GPU": 0.5}, 9), "b": Claim(cpu, 99)}) == {"a": 2, "b": 7}
    assert dealt({"CPU": 1}, {"a": Claim(cpu, 9), "b": Claim(cpu, 9)}) == {"a": 1, "b": 0}


def test_turns_are_taken_where_they_help() -> None:
    """A place is given up for a claim that would fit into it, not for one that nothing here can satisfy."""
    cpu, gpu, all_cpus = Claim({"CPU": 1}, 9), Claim({"CPU": 1, "GPU": 1}, 9), Claim({"CPU": 2}, 9)

    def helps(capacity: dict[str, float], **claims: Claim) -> dict[str, set[str]]:
        held = dealt(capacity, claims)
        return {name: set(found) for name in claims if (found := helped(name, capacity, claims, held))}

    assert helps({"CPU": 2}, a=cpu, b=cpu) == {}
    assert helps({"CPU": 2}, a=cpu, b=cpu, c=cpu) == {"a": {"c"}, "b": {"c"}}
    assert helps({"CPU": 2}, a=cpu, b=cpu, c=gpu) == {}
    assert helps({"CPU": 4, "GPU": 1}, a=gpu, b=gpu, c=cpu) == {"a": {"b"}}
    assert helps({"CPU": 2}, a=cpu, b=all_cpus) == {"a": {"b"}}


def test_how_many_make_room() -> None:
    """As many as take what a shard of the other asks for of what both ask for."""
    seventh, whole, two = Claim({"CPU": 1, "GPU": 0.1428}, 9), Claim({"CPU": 1, "GPU": 1}, 9), Claim({"CPU": 2}, 9)
    assert [makes_room(seventh, whole), makes_room(whole, seventh)] == [8, 1]
    assert [makes_room(seventh, two), makes_room(two, seventh), makes_room(two, two)] == [2, 1, 1]


class Shown:
    """A board that is only a mapping, and may fail."""

    def __init__(self) -> None:
        self.claims: dict[str, Claim] = {}

    def exchange(self, name: str, claim: Claim) -> dict[str, Claim]:
        self.claims[name] = claim
        return {other: one for other, one in self.claims.items() if other != name}

    def forget(self, name: str) -> None:
        self.claims.pop(name, None)


def test_a_claim_of_another_version_stops_nobody() -> None:
    """What is not understood is nobody's claim; what is there besides is left out."""
    shown = {"shard": {"CPU": 2}, "wants": 3, "priority": 2.0}
    assert read_claim(json.dumps(shown | {"later": 1}).encode()) == Claim({"CPU": 2.0}, 3, 2.0)
    for one in (None, b"", b"{", b"[]", json.dumps(shown | {"shard": {}}).encode(), json.dumps({"wants": 3}).encode()):
        assert read_claim(one) is None
    assert read_claim(json.dumps(shown | {"priority": 0}).encode()) is None


def at(**places: int) -> dict[str, str]:
    """So many workers at each place: worker -> place."""
    return {f"{place}{i}": place for place, n in places.items() for i in range(n)}


def test_a_driver_gives_way() -> None:
    """Alone all is its own; beside another what is over its share is given up, and taken again afterwards. Where there
    are more drivers than places, a place is held for a while only."""
    board: Any = Shown()
    now = [0.0]
    driver = Sharing("a", board, lambda: {"CPU": 4}, lambda: {"CPU": 4}, lambda: now[0])
    mine, here = Claim({"CPU": 1}, 9), at(x=4)
    assert driver.share(mine, here) == 4 and not driver.gives_way("x0", 4, 0)
    board.claims["b"] = Claim({"CPU": 1}, 9)
    now[0] += LOOK_SECONDS
    assert driver.share(mine, here) == 2 and driver.gives_way("x0", 3, 0) and not driver.gives_way("x0", 2, 0)
    board.claims |= {name: Claim({"CPU": 1}, 9, 9) for name in "cdef"}
    now[0] += LOOK_SECONDS
    assert driver.share(mine, here) == 1 and not driver.gives_way("x0", 1, now[0])
    now[0] += TURN_SECONDS + 1
    assert driver.gives_way("x0", 1, 0)
    for name in "bcdef":
        board.forget(name)
    assert driver.share(mine, here) == 4 and not driver.gives_way("x0", 4, 0)


def test_turns_are_at_what_is_there() -> None:
    """Shares are of what the cluster may grow to; where it does not grow, drivers take turns."""
    board: Any = Shown()
    now = [0.0]
    driver = Sharing("a", board, lambda: {"GPU": 8}, lambda: {"GPU": 1}, lambda: now[0])
    board.claims["b"] = mine = Claim({"GPU": 1}, 9)
    assert driver.share(mine, at(x=1)) == 4
    now[0] += TURN_SECONDS + 1
    assert driver.gives_way("x0", 1, 0)


def test_places_are_left_to_who_has_none() -> None:
    """Parts of each of two GPUs, and a driver that was dealt a whole one and cannot have it: those on the GPU with
    the fewest workers leave, those on the other go on, and nobody begins in their place until it was of use."""
    board: Any = Shown()
    now = [0.0]

    def has() -> dict[str, float]:
        return {"GPU": 2}

    driver = Sharing("a", board, has, has, lambda: now[0])
    mine, places = Claim({"GPU": 0.1428}, 99), at(x=4, y=3)
    board.claims["b"] = Claim({"GPU": 1}, 9, waits=STARVED_SECONDS - 1)
    assert driver.share(mine, places) == 7 and not driver.gives_way("y0", 7, now[0])
    board.claims["b"] = Claim({"GPU": 1}, 9, waits=STARVED_SECONDS)
    now[0] += LOOK_SECONDS
    assert driver.share(mine, places) == 7
    assert {worker for worker in places if driver.gives_way(worker, 7, now[0])} == {"y0", "y1", "y2"}
    del places["y0"]
    assert driver.share(mine, places) == 6
    board.claims["b"] = Claim({"GPU": 1}, 9)
    now[0] += LOOK_SECONDS
    assert driver.share(mine, places) == 7 and not driver.gives_way("y1", 6, now[0])
    assert board.claims["a"].waits == 0
    now[0] += STARVED_SECONDS
    driver.share(mine, {})
    assert board.claims["a"].waits == STARVED_SECONDS


def test_who_needs_all_is_made_room_for() -> None:
    """One GPU, parts of which are dealt first: a driver that asks for all of it is dealt nothing, and yet gets it."""
    board: Any = Shown()
    now = [0.0]

    def has() -> dict[str, float]:
        return {"GPU": 1}

    driver = Sharing("a", board, has, has, lambda: now[0])
    mine, places = Claim({"GPU": 0.25}, 99), at(x=4)
    board.claims["b"] = Claim({"GPU": 1}, 9, waits=STARVED_SECONDS)
    assert driver.share(mine, places) == 4 and all(driver.gives_way(worker, 4, 0) for worker in places)
    assert driver.share(mine, {}) == 0


@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 6), st.integers(1, 40))
def test_all_places_are_left_at_most_once(x: int, y: int, wanted: int, seconds: int) -> None:
    """As many workers at a time as make room, of one place; then more, while that was of no use; then nobody is waited
    for any more."""
    now = [0.0]
    leaving, places, starved = Vacating(lambda: now[0]), at(x=x, y=y), {"b": wanted}
    for _ in range((x + y + 1) * (2 + int(STARVED_SECONDS / seconds))):
        leaving.look(starved, places)
        going = [place for worker, place in places.items() if worker in leaving.leaving]
        assert len(going) <= wanted and len(set(going)) <= 1
        places = {worker: place for worker, place in places.items() if worker not in leaving.leaving}
        now[0] += seconds
    assert places == {}
    now[0] += STARVED_SECONDS
    leaving.look(starved, {})
    leaving.look(starved, at(x=1))
    assert leaving.leaving == frozenset()
    leaving.look({}, at(x=1))
    leaving.look(starved, at(x=1))
    assert leaving.leaving == {"x0"}
    now[0] += STARVED_SECONDS
    leaving.look(starved, {})
    leaving.look(starved, at(y=1))
    assert leaving.leaving == frozenset()
    now[0] += AGAIN_SECONDS
    leaving.look(starved, at(y=1))
    assert leaving.leaving == {"y0"}


@contextmanager
def node(**has: int) -> Iterator[Any]:
    """A cluster of one node, whose tasks take 0.3 s."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICK_SECONDS", "0.3")
        cluster = Cluster(initialize_head=True, head_node_args={**has, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def two() -> Iterator[Any]:
    """A cluster with two CPUs."""
    with node(num_cpus=2) as cluster:
        yield cluster


def at_work(sweep: Sweep) -> int:
    return sum(bool(note["shard"]) for note in sweep.notes().values())


def rows_in(store: Store) -> int:
    return len(committed(store)) if store.exists() else 0


def test_two_sweeps_share_a_cluster(two: Any, tmp_path: Path) -> None:
    """A second sweep gets its place while the first has both, for long; what is given up is run again, and nothing
    twice. --max-workers 1 never has two running. Once the second has ended the first has both places again."""
    first = quick(tmp_path / "a", spec(count=45, seeds=8, resources="candidates_per_shard: 12"))
    second = quick(tmp_path / "b", spec(count=16))
    for sweep in (first, second):
        sweep.folder.mkdir()
    one = first.start("run", "quick.yaml", "--address", two.address)
    other = second.start("run", "quick.yaml", "--address", two.address, "--max-workers", "1", "--priority", "2")
    assert first.wait_for(lambda: rows_in(first.store) > 0, one)
    most, seen, noted = 0, False, set[tuple[float, int]]()
    while other.poll() is None:
        time.sleep(0.05)
        most = max(most, at_work(second))
        noted |= {(note["priority"], note["max_workers"]) for note in second.notes("drivers").values()}
        if not seen and rows_in(second.store) and at_work(second):
            seen = True
            assert at_work(first) <= 1
    assert other.wait() == 0 and seen and most == 1 and noted == {(2, 1)}, second.said()
    assert_invariants(second.store, "quick", committed(second.store), second.reference())
    assert first.wait_for(lambda: at_work(first) == 2, one, 40), "the other one waited for its end"
    one.terminate()
    assert one.wait(60) == 130, first.said()
    ids = [task_id for task_id, _ in committed(first.store)]
    assert 0 < len(ids) == len(set(ids)) < 360


@pytest.mark.slow
def test_a_sweep_that_needs_all_of_a_node(tmp_path: Path) -> None:
    """Each of four processors is at work: a sweep whose shards ask for all of them is made room for, though it was
    dealt nothing; afterwards the first has them again."""
    first = quick(tmp_path / "a", spec(count=45, seeds=40, resources="candidates_per_shard: 5"))
    second = quick(tmp_path / "b", spec(count=10, resources="candidates_per_shard: 10, cpus: 4"))
    for sweep in (first, second):
        sweep.folder.mkdir()
        sweep.environment["QUICK_STARVED"] = "20"
    with node(num_cpus=4) as cluster:
        one = first.start("run", "quick.yaml", "--address", cluster.address)
        assert first.wait_for(lambda: at_work(first) == 4, one)
        code, said = second.run("run", "quick.yaml", "--address", cluster.address)
        assert code == 0, said
        assert first.wait_for(lambda: at_work(first) >= 1, one), first.said()
        one.terminate()
        assert one.wait(60) == 130, first.said()
    assert_invariants(second.store, "quick", committed(second.store), second.reference())
    ids = [task_id for task_id, _ in committed(first.store)]
    assert 0 < len(ids) == len(set(ids)) < 1800
