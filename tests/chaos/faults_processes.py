"""Faults of processes: workers, drivers, nodes, slow and hanging ranks, a changing number of workers."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from tests.chaos.bench import GOES_ON, NUM_EPOCHS, RESUMES, STRIKE_STEP, Bench, Fault, kill_driver, note_struck
from tests.chaos.inside import ANY_RANK, Strike
from tests.chaos.observe import Seen, note_rows
from usr_ray.training.checkpoint import CheckpointStore


def unbroken(bench: Bench) -> Seen:
    """The yardstick itself: every row once, and nothing skipped or repeated."""
    seen = Seen()
    case = bench.unbroken()
    note_rows(seen, case, case / "run", num_epochs=NUM_EPOCHS)
    stores = CheckpointStore(case / "run" / "checkpoints").steps()
    seen.note("steps", len(stores) > 0, f"{stores[-1]} steps on two workers")
    return seen


def worker_killed(bench: Bench) -> Seen:
    """Rank 1 is killed between two checkpoints; Ray starts the group again."""
    return _struck(bench, "worker-killed", Strike(kind="kill_self", step=STRIKE_STEP, rank=1))


def main_worker_killed(bench: Bench) -> Seen:
    """Rank 0, which writes the files, is killed in the second epoch."""
    return _struck(bench, "main-worker-killed", Strike(kind="kill_self", step=2 * STRIKE_STEP, rank=0))


def driver_killed(bench: Bench) -> Seen:
    """The driver is killed between two checkpoints, and its workers with it."""
    case = bench.cut("driver-killed")
    return bench.compare(Seen(), case, bench.train(case))


def node_killed(bench: Bench) -> Seen:
    """A node with a rank on it goes away as by a power cut; the other two have room for its rank."""
    if not bench.is_local:
        return Seen(skipped="kills a node of your cluster: stop one by hand during a run, and compare its result")
    return _struck(bench, "node-killed", Strike(kind="kill_node", step=STRIKE_STEP, rank=ANY_RANK))


def slow_rank(bench: Bench) -> Seen:
    """Rank 1 sleeps a tenth of a second in every step."""
    return _struck(bench, "slow-rank", Strike(kind="slow_down", rank=1, options={"seconds": 0.1}), once=False)


def hanging_rank(bench: Bench) -> Seen:
    """Rank 1 stops for good; ray.timeout is 20 seconds."""
    case = bench.case("hanging-rank")
    strike = Strike(kind="hang", step=STRIKE_STEP, rank=1)
    ended = bench.train(case, "ray.timeout='20 s'", strike=strike)
    seen = bench.compare(Seen(), case, ended)
    struck = note_struck(seen, case)
    named = re.search(r"rank 1 \(.*\) (is|was) .*", ended.output)
    seen.note("named", named is not None, f"'{named[0][:90]}'" if named else "the rank is not named")
    if bench.is_local and struck:
        is_gone = not Path(f"/proc/{struck['pid']}").exists()
        seen.note("ended", is_gone, "its process is gone" if is_gone else "its process still lives")
    return seen


def workers_2_1_2(bench: Bench) -> Seen:
    """Two workers, killed; one worker, killed; two workers to the end."""
    case = bench.cut("workers-2-1-2")
    seen = Seen()
    bench.expect_end(seen, bench.train(case, "ray.num_workers=1", strike=kill_driver(STRIKE_STEP * 2)), -signal.SIGKILL)
    seen.words.clear()
    # Two halves are added in another order than one whole, so the last digits of the gradients differ.
    return bench.compare(seen, case, bench.train(case), tolerance=1e-4)


def _struck(bench: Bench, name: str, strike: Strike, *, once: bool = True) -> Seen:
    case = bench.case(name)
    seen = bench.compare(Seen(), case, bench.train(case, strike=strike))
    if once:
        note_struck(seen, case)
    return seen


FAULTS = (
    Fault("unbroken", "nothing happens", "every row once an epoch", unbroken),
    Fault("worker-killed", f"SIGKILL of rank 1 before step {STRIKE_STEP + 1}", GOES_ON, worker_killed),
    Fault("main-worker-killed", "SIGKILL of rank 0 in the second epoch", GOES_ON, main_worker_killed),
    Fault("driver-killed", f"SIGKILL of the driver before step {STRIKE_STEP + 1}", RESUMES, driver_killed),
    Fault("node-killed", "loss of a whole node with a rank on it", GOES_ON, node_killed),
    Fault("slow-rank", "rank 1 sleeps 0.1 s in each step", "batches, rows and weights as unbroken", slow_rank),
    Fault("hanging-rank", "rank 1 stops for good, ray.timeout = 20 s", f"named and ended; {GOES_ON}", hanging_rank),
    Fault(
        "workers-2-1-2",
        "2 workers, killed; 1, killed; 2 to the end",
        "batches and rows as unbroken, weights within 1e-4",
        workers_2_1_2,
    ),
)
