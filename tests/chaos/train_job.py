"""jobs/train.py for a chaos run: `python tests/chaos/train_job.py CASE <arguments of jobs/train.py>`.

The same job, but for two things: its workers are those of inside.py, and it ends itself by SIGKILL once a worker asks
for it, as a driver does whose machine goes away.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from usr_ray.cli import run_job
from usr_ray.launch.environment import prepare_environment


def _die_when_asked(case: Path, file: str) -> None:
    while not (case / file).exists():
        time.sleep(0.05)
    (case / file).unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> None:
    prepare_environment(dashboard=False)
    from jobs import train
    from tests.chaos import inside
    from usr_ray.launch import trainer

    trainer.train_worker = inside.train_worker
    case = Path(argv[0])
    (case / inside.KILL_DRIVER).unlink(missing_ok=True)
    threading.Thread(target=_die_when_asked, args=(case, inside.KILL_DRIVER), daemon=True).start()
    train.main(argv[1:])


if __name__ == "__main__":
    sys.exit(run_job(main))
