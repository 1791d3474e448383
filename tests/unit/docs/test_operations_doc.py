"""docs/operations.md against the code: commands run, the capacity is what its formulae say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import deltalake
import pytest

from benchmarks.capacity import Rates, capacity_table, cost_table, machines, read_rates, wire_bytes_a_row
from tests.unit.export_runs import run_config
from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import parse_dates
from usr_ray.data.manifest import build_manifest
from usr_ray.operations.daily import STEPS
from usr_ray.runs.plan import plan_run

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def block(holds: str) -> str:
    (found,) = [text for text in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) if holds in text]
    return found


@pytest.mark.integration
def test_the_table_goes_back_by_the_command_of_the_page_and_a_run_by_its_setting(tmp_path: Path) -> None:
    write_samples(tmp_path / "lake", samples_spec(), num_rows=300, num_days=4)
    path = tmp_path / "lake" / "samples"
    before = build_manifest(tmp_path / "lake", dates=parse_dates("2026-01-01:2026-01-04", where=""))
    deltalake.DeltaTable(path).delete("impression_date >= '2026-01-02'")  # a build that went wrong
    last = deltalake.DeltaTable(path).version()
    assert last > before.version
    assert "--set data.table_version=$VERSION" in block("jobs/train.py")
    config = run_config()
    plan = plan_run(
        type(config).from_dict(
            {
                **config.to_dict(),
                "data": {**config.to_dict()["data"], "mature_only": False, "table_version": before.version},
            }
        ),
        tmp_path / "lake",
        tmp_path / "run",
    )
    assert plan.train_manifest.version == before.version
    command = block("restore").replace("python -c", f"{sys.executable} -c")
    named = {"LAKE": str(tmp_path / "lake"), "VERSION": str(before.version)}
    subprocess.run(["bash", "-euc", command], env=named, check=True, capture_output=True)
    after = build_manifest(tmp_path / "lake", dates=parse_dates("2026-01-01:2026-01-04", where=""))
    assert after.version == last + 1
    assert (after.num_rows, [f.path for f in after.files]) == (before.num_rows, [f.path for f in before.files])


RATES = Rates(
    build_s=360,
    train_s=36,
    score_s=3.6,
    shuffle_bytes=75,
    table_bytes=70,
    sources={"build_s": "a", "train_s": "b", "score_s": "c"},
)


def test_capacity_is_arithmetic_on_measured_rates() -> None:
    # 1e9 rows: 360,000 s = 100 core-hours; in 2 hours with 4 cores of which 70 % are useful: 17.9 machines.
    assert machines(1e9, 360, 2) == 18
    assert machines(10, 360, 2) == 1
    # 8 workers, 10 new ids a row of the global batch, 16 values: 7 x 10/8 x (8 + 64); 7/8 x 10/8 x (8 + 128).
    assert wire_bytes_a_row(8, 10, 16, sharded=False) == pytest.approx(630)
    assert wire_bytes_a_row(8, 10, 16, sharded=True) == pytest.approx(148.75)
    line = next(line for line in capacity_table(RATES).splitlines() if line.startswith("| 1,000,000,000 |"))
    assert line == "| 1,000,000,000 | 18 | 75.0 | 70.00 | 1 | 69,444 | 630.0 / 148.8 |"
    assert "111 core-hours, so 159 p" in cost_table(RATES)


def test_the_tables_of_the_page_are_those_of_the_recorded_benchmarks() -> None:
    rates = read_rates()
    for name, table in (("capacity", capacity_table(rates)), ("cost", cost_table(rates))):
        found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)
        assert found is not None
        assert found[1] == table, "a benchmark was recorded anew; run: python benchmarks/capacity.py"


class Operator:
    """Airflow's BashOperator, as far as the example uses it."""

    made: ClassVar[list[Operator]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings: dict[str, Any] = settings
        self.after: list[str] = []
        Operator.made.append(self)

    def __rshift__(self, other: Operator) -> None:
        self.after.append(other.settings["task_id"])


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> type[Operator]:
    """Stand-ins for the names that the example imports; apache-airflow (150 packages) is not among the pins."""

    class Dag:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

        def __enter__(self) -> Dag:
            return self

        def __exit__(self, *_: object) -> None: ...

    Operator.made = []
    modules: dict[str, dict[str, Any]] = {
        "airflow": {},
        "airflow.sdk": {"DAG": Dag},
        "airflow.providers": {},
        "airflow.providers.standard": {},
        "airflow.providers.standard.operators": {},
        "airflow.providers.standard.operators.bash": {"BashOperator": Operator},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return Operator


@pytest.mark.integration
@pytest.mark.parametrize(("job_code", "task_code"), [(0, 0), (1, 1), (2, 2), (3, 0)])
def test_the_airflow_example_runs_the_steps_in_order_and_a_held_back_model_is_no_failure(
    airflow: type[Operator], tmp_path: Path, job_code: int, task_code: int
) -> None:
    source = (ROOT / "examples" / "airflow" / "usr_ray_daily.py").read_text(encoding="utf-8")
    content: dict[str, Any] = {}
    exec(compile(source, "usr_ray_daily.py", "exec"), content)
    assert [task.settings["task_id"] for task in airflow.made] == list(STEPS)
    assert [task.after for task in airflow.made] == [[step] for step in STEPS[1:]] + [[]]
    assert content["dag"].settings["max_active_runs"] == 1
    # The command itself, with a python that notes its words.
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}:$PATH\n")
    (tmp_path / "python").write_text(f'#!{shutil.which("bash")}\necho "$@"; exit {job_code}\n')
    (tmp_path / "python").chmod(0o755)
    command = re.sub(
        r"\{\{ var\.value\.(\w+) \}\}",
        lambda m: str(tmp_path) if m[1] == "usr_ray_home" else m[1],
        airflow.made[2].settings["bash_command"],
    )
    command = re.sub(r"\{\{ .*? \}\}", "2026-01-05", command)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == task_code
    assert done.stdout.startswith(
        "jobs/daily.py --config usr_ray_config --logs usr_ray_logs --lake usr_ray_lake --work usr_ray_work "
        "--date 2026-01-05 --step train\n"
    )
