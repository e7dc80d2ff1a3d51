"""`make chaos MINUTES=10`: random faults against quick sweeps, round after round; says what it did and what held.

Each round is a sweep of its own, run by one or two drivers, inline or on embedded Ray, while faults come
at random moments; then one undisturbed resume, after which every invariant of docs/reliability.md must
hold. A round that fails keeps its folder, and its seed repeats what was done, though not when.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from storage.machine import is_alive
from tests.faults.quick import spec
from tests.faults.runs import Sweep, end_group, quick
from tests.sweeps import assert_invariants, committed

ROUND_SECONDS = 40.0
HELD = "rows that held"


@dataclass
class Round:
    """A sweep, its drivers, and what was done to them."""

    sweep: Sweep
    order: random.Random
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    def start_driver(self) -> None:
        """Another driver on the sweep, inline or on embedded Ray."""
        how = ["--inline"] if self.order.random() < 0.5 else []
        self.drivers.append(self.sweep.start("run", "quick.yaml", *how))

    def alive(self) -> list[subprocess.Popen[str]]:
        return [driver for driver in self.drivers if driver.poll() is None]

    # -- faults: each says whether it could be done ------------------------------------------------

    def kill_a_worker(self) -> bool:
        return self._signal_a_worker(signal.SIGKILL)

    def freeze_a_worker(self) -> bool:
        """Stopped for a moment, then continued."""
        notes = [n for n in self.sweep.notes().values() if is_alive(n["pid"], n["process_started"])]
        if not notes:
            return False
        pid = self.order.choice(notes)["pid"]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.order.uniform(0, 2))
        os.kill(pid, signal.SIGCONT)
        return True

    def kill_a_driver(self) -> bool:
        return self._with_a_driver(lambda driver: (driver.kill(), driver.wait(30)))

    def kill_a_driver_and_all(self) -> bool:
        return self._with_a_driver(end_group)

    def stop_a_driver(self) -> bool:
        """As a scheduler does: SIGTERM, and it ends within its grace."""

        def stop(driver: subprocess.Popen[str]) -> None:
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(60) in (130, 0, 3, -signal.SIGTERM), driver.returncode

        return self._with_a_driver(stop)

    def start_another_driver(self) -> bool:
        if len(self.alive()) > 1:
            return False
        self.start_driver()
        return True

    def compact(self) -> bool:
        if not self.sweep.store.exists():
            return False
        code, said = self.sweep.run("compact")
        assert code == 0, said
        return True

    def plant_a_torn_file(self) -> bool:
        """What a dying disk leaves: some other bytes, or half of a row file."""
        names = self.sweep.store.row_file_names()
        if not names:
            return False
        try:
            content = self.sweep.store.read(self.order.choice(names))
        except FileNotFoundError:
            return False
        content = self.order.choice([content[: len(content) // 2], b"", b"PAR1" + self.order.randbytes(100)])
        self.sweep.store.commit(f"rows/torn-{self.order.randrange(10**9)}.parquet", content)
        return True

    def damage_the_dense_weights(self) -> bool:
        names = self.sweep.store.names("dense")
        if not names:
            return False
        Path(self.sweep.store.root, "dense", self.order.choice(names)).write_bytes(b"damaged")
        return True

    def lose_scratch(self) -> bool:
        """It may vanish at any time."""
        shutil.rmtree(Path(self.sweep.store.root, "scratch"), ignore_errors=True)
        return True

    def query(self) -> bool:
        """Every count a reader sees: nothing committed is ever missing, nothing is counted twice."""
        if not self.sweep.store.exists():
            return False
        found = self.sweep.store.sql("select task_id from rows where status = 'done'").fetchall()
        assert len(found) == len(set(found)), "a task twice in the view rows"
        now = {task_id for (task_id,) in found}
        assert self.seen <= now, f"{len(self.seen - now)} rows are lost"
        self.seen = now
        return True

    def _signal_a_worker(self, number: signal.Signals) -> bool:
        notes = [n for n in self.sweep.notes().values() if is_alive(n["pid"], n["process_started"])]
        if not notes:
            return False
        os.kill(self.order.choice(notes)["pid"], number)
        return True

    def _with_a_driver(self, work: Callable[[subprocess.Popen[str]], object]) -> bool:
        alive = self.alive()
        if not alive:
            return False
        work(self.order.choice(alive))
        return True


FAULTS: tuple[Callable[[Round], bool], ...] = (
    Round.kill_a_worker,
    Round.kill_a_worker,
    Round.freeze_a_worker,
    Round.kill_a_driver,
    Round.kill_a_driver_and_all,
    Round.stop_a_driver,
    Round.start_another_driver,
    Round.compact,
    Round.plant_a_torn_file,
    Round.damage_the_dense_weights,
    Round.lose_scratch,
    Round.query,
    Round.query,
    Round.query,
)


def play(folder: Path, seed: int) -> Counter[str]:
    """One round; what was done. Raises AssertionError where something did not hold."""
    order = random.Random(seed)
    resources = f"candidates_per_shard: {order.randint(1, 6)}, workers: {order.randint(1, 2)}"
    text = spec(count=order.randint(5, 45), seeds=order.randint(1, 3), resources=resources)
    at = Round(quick(folder, text, seconds=order.choice([0.05, 0.2, 0.5])), order)
    at.start_driver()
    end = time.monotonic() + ROUND_SECONDS
    try:
        while time.monotonic() < end:
            time.sleep(order.uniform(0, 2))
            fault = order.choice(FAULTS)
            if fault(at):
                at.did[fault.__name__] += 1
            if not at.alive():
                if order.random() < 0.3:
                    break
                at.start_driver()
    finally:
        for driver in at.alive():
            end_group(driver)
    at.query()
    before = committed(at.sweep.store)
    code, said = at.sweep.run("run", "quick.yaml", "--inline")
    assert code == 0, said
    assert_invariants(at.sweep.store, "quick", before, at.sweep.reference())
    at.did[HELD] += len(committed(at.sweep.store))
    return at.did


def main() -> None:
    """Rounds until the time is over; exit code 1 if anything did not hold."""
    minutes, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    end, did, rounds, failed = time.monotonic() + minutes * 60, Counter[str](), 0, 0
    while time.monotonic() < end:
        folder = Path(tempfile.mkdtemp(prefix="prunesweep-chaos-"))
        rounds += 1
        try:
            done = play(folder, seed)
            did += done
            print(f"round {rounds}, seed {seed}: held, {done.total() - done[HELD]} faults and queries")
            shutil.rmtree(folder)
        except Exception:
            failed += 1
            print(f"round {rounds}, seed {seed}: DID NOT HOLD; its folder is {folder}")
            traceback.print_exc()
        sys.stdout.flush()
        seed += 1
    print(f"\n{rounds} rounds, {rounds - failed} held, {failed} did not. What was done:")
    for name, times in did.most_common():
        print(f"  {times:6} {name.replace('_', ' ')}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
