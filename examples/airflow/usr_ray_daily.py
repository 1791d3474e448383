"""The daily run as an Airflow DAG: one task a step of jobs/daily.py, so that each has its own retries and its own log.

Put this file into Airflow's DAG folder on a machine that has the project and its virtual environment, and set the
Airflow variables below. `max_active_runs=1` and `depends_on_past` keep the days in order, and the lock of jobs/daily.py
keeps a run by hand out.
"""

from __future__ import annotations

import datetime as dt

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

STEPS = ("build", "restate", "train", "judge", "export", "publish", "score")  # usr_ray.operations.daily.STEPS
# The day before the run, whichever timetable Airflow makes of the schedule.
DAY = "{{ macros.ds_add(data_interval_end | ds, -1) }}"
COMMAND = (
    "cd {{ var.value.usr_ray_home }} && . .venv/bin/activate && "
    "python jobs/daily.py --config {{ var.value.usr_ray_config }} --logs {{ var.value.usr_ray_logs }} "
    "--lake {{ var.value.usr_ray_lake }} --work {{ var.value.usr_ray_work }} "
    f"--date {DAY} --step STEP"
)
# 3 says that the new model was held back: every step from the verdict on ends with it, and the day is done.
WRAP = "COMMAND; code=$?; case $code in 3) echo 'the new model was held back'; exit 0;; *) exit $code;; esac"

with DAG(
    dag_id="usr_ray_daily",
    schedule="30 2 * * *",  # UTC, once the logs of the day before are complete
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    catchup=False,
    max_active_runs=1,
    default_args={"depends_on_past": True, "retries": 2, "retry_delay": dt.timedelta(minutes=10)},
    tags=["usr-ray"],
) as dag:
    previous = None
    for step in STEPS:
        task = BashOperator(
            task_id=step,
            bash_command=WRAP.replace("COMMAND", COMMAND.replace("STEP", step)),
            execution_timeout=dt.timedelta(hours=12 if step == "train" else 6),
        )
        if previous is not None:
            previous >> task
        previous = task
