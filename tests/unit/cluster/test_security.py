"""What docs/security.md promises, held by tests: nothing unpickled, no names that escape, no secret written down."""

from __future__ import annotations

import ast
import contextlib
import datetime as dt
import functools
import importlib.metadata
import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.samples_table import samples_spec, write_samples
from usr_ray.config import Config, ConfigError, UserError, check_address, load_config
from usr_ray.data.manifest import DataError, build_manifest, join_path
from usr_ray.runs.plan import plan_run
from usr_ray.serving.archive import ArchiveError, refuse_pickles

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(path for folder in ("etl", "usr_ray", "jobs", "cluster") for path in (ROOT / folder).rglob("*.py"))
SAFE_LOAD = {"usr_ray/serving/archive.py"}
"""Reads with weights_only=True, and only to refuse what needs more."""
TRUSTED_LOAD = {"usr_ray/serving/runtime.py": "torch.export.load"}
"""Behind refuse_pickles, and behind the checksums of the directory."""


def test_the_page_says_of_every_table_with_raw_ids_how_a_user_is_deleted_from_it() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    places = re.findall(r"^\| ([^|]+) \|", page.partition("## Deleting a user")[2].partition("\n## ")[0], re.M)
    sections = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8").split("\n## ")[1:]
    raw = re.compile(r"^\| `(?:user_id|value|key|row)` \|.*\b(?:as logged|as in the logs|the row as JSON)", re.M)
    tables = [section.partition("\n")[0] for section in sections if raw.search(section)]
    assert tables == ["samples", "vocabularies", "counters", "rejects", "state"]
    assert [name for name in tables if f"`{name}`" not in "".join(places)] == []


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def dotted(node: ast.expr) -> str:
    """Its text; names and attributes, nearly all that is called, without the writer of all of Python's syntax."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


@functools.cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of every call in a file."""
    return [(dotted(node.func), node) for node in nodes(path) if isinstance(node, ast.Call)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def keyword(call: ast.Call, key: str) -> Any:
    values = [ast.literal_eval(k.value) for k in call.keywords if k.arg == key]
    return values[0] if values else None


@pytest.mark.integration
def test_nothing_is_unpickled_or_evaluated() -> None:
    forbidden = re.compile(
        r"(pickle|cPickle|dill|cloudpickle|marshal|shelve|joblib)\.\w+|(pd|pandas)\.read_pickle"
        r"|yaml\.(load|load_all|unsafe_load)|eval|exec|os\.system|.*\.extractall"
    )
    for path in SOURCES:
        for called, call in calls(path):
            assert not forbidden.fullmatch(called), f"{name(path)}: {called}"
            assert keyword(call, "allow_pickle") is not True, f"{name(path)}: {called}"
            assert keyword(call, "shell") is not True, f"{name(path)}: {called}"
            if called == "torch.load":
                assert name(path) in SAFE_LOAD
                assert keyword(call, "weights_only") is True
            if called.endswith("export.load") or called in ("torch.jit.load", "torch.package.PackageImporter"):
                assert TRUSTED_LOAD.get(name(path)) == called
        imports = {a.name.split(".")[0] for n in nodes(path) if isinstance(n, ast.Import) for a in n.names}
        assert not imports & {"pickle", "marshal", "shelve", "dill", "joblib"}, name(path)


def test_sql_is_made_of_constants_and_checked_names_only() -> None:
    """Each place that gives Spark text, with what goes into it; another place, or another name, must be added here."""
    known = {
        "etl/lake/tables.py": {"path", "pairs"},  # check_address; constants and texts whose quotes are escaped
        "etl/build/inputs.py": {"c"},  # of constants in the same function
        # A lake's path, whose job calls check_address, and a table's name of schema.py; a number; a constant.
        "etl/lake/maintain.py": {"path", "request.lake.path(shape.table)", "_retain(request)", "inventory"},
    }
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "etl").rglob("*.py")):
        for called, call in calls(path):
            if not re.search(r"(\.sql|\.expr|\.selectExpr)$", called):
                continue
            for argument in call.args:
                names = {ast.unparse(n.value) for n in ast.walk(argument) if isinstance(n, ast.FormattedValue)}
                names |= {argument.id} if isinstance(argument, ast.Name) else set()
                if names:
                    found[name(path)] = found.get(name(path), set()) | names
    assert found == known


def test_every_job_that_gives_spark_a_path_has_checked_it() -> None:
    for path in sorted((ROOT / "jobs").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "Lake(arguments.lake)" in text:
            assert re.search(r"add_place\(\s*\"--lake\", check_(new_)?lake,", text), (
                path.name
            )  # which call check_address


@pytest.mark.parametrize(
    "bad", ["a'b", 'a"b', "a`b", "a b", "a.b", "a:b", "a;b", "${env:HOME}", "a\\b", "a,b", "a\nb", ""]
)
@pytest.mark.parametrize("key", ["user_categories", "context_numbers"])
def test_a_feature_that_could_not_name_a_column_is_refused(bad: str, key: str) -> None:
    with pytest.raises(ConfigError, match=r"features: .* cannot name a column; map it to a plain name"):
        load_config(None, [f"features.{key}={json.dumps([bad])}"])


def test_plain_names_of_features_are_taken_in_any_language() -> None:
    names = ("onehot_feat1", "preis", "größe", "类目", "a-b")
    assert load_config(None, [f"features.item_numbers={json.dumps(names)}"]).features.item_numbers == names


@pytest.mark.parametrize("bad", ["Search", "a/b", "..", "a b", "a`b", "a;drop", "0a", ""])
def test_a_scenario_that_could_leave_a_path_or_a_name_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"scenarios: .* must be lower-case letters, digits and '_'"):
        load_config(None, [f"scenarios={json.dumps([bad])}"])


def test_ordinary_paths_are_taken() -> None:
    for path in (
        "lake",
        "/data/the lake/it's",
        "s3a://shop/lake",
        "abfss://box@shop.dfs.core.windows.net/lake",
        "C:\\lake",
    ):
        check_address(path, flag="--lake")


@pytest.mark.parametrize("path", ["../other/x.parquet", "a/../../x.parquet", "..", "/lake/../etc/x.parquet"])
def test_a_table_whose_log_names_a_file_outside_is_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"names the file .*, which is outside of the table"):
        join_path("/lake/samples", path)


def test_a_file_name_with_dots_is_no_way_out() -> None:
    assert join_path("/lake/samples", "impression_date=2026-01-01/part..0.parquet").startswith("/lake/samples/imp")


# ---- dependencies


def test_what_is_installed_is_what_constraints_name() -> None:
    """`make audit` asks for known flaws of these versions; it would be wrong of others."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
    )
    other = {}
    for package, pinned in pins.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra that is not installed here
            found = importlib.metadata.version(package)
            if found.partition("+")[0] != pinned:  # +cpu: the same version, built otherwise
                other[package] = f"{found}, pinned {pinned}"
    assert other == {}, "run: make setup"


# ---- an exported model


class Bomb:
    """Unpickling it would call print."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def archive(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for entry, content in entries.items():
            made.writestr(f"model/{entry}", content)
    return path


@pytest.fixture
def exported() -> dict[str, bytes]:
    """Entries as torch.export.save writes them; tests/e2e/test_export.py opens real ones through the same door."""
    inputs = io.BytesIO()
    torch.save(((torch.zeros(1, 2),), {}), inputs)
    weight = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": {}}
    return {
        "archive_format": b"pt2",
        "archive_version": b"0",
        "byteorder": b"little",
        ".data/version": b"3",
        ".data/serialization_id": b"0",
        "models/model.json": b"{}",
        "data/weights/weight_0": bytes(8),
        "data/weights/model_weights_config.json": json.dumps({"config": {"weight": weight}}).encode(),
        "data/constants/tensor_0": bytes(8),
        "data/constants/model_constants_config.json": b'{"config": {}}',
        "data/sample_inputs/model.pt": inputs.getvalue(),
    }


def test_an_archive_of_tensors_and_json_is_taken(exported: dict[str, bytes], tmp_path: Path) -> None:
    refuse_pickles(archive(tmp_path / "model.pt2", exported))


def test_an_archive_that_would_be_unpickled_is_refused_and_not_run(
    exported: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = "data/weights/model_weights_config.json"
    config = json.loads(exported[weights])
    first = next(iter(config["config"]))
    config["config"][first]["use_pickle"] = True
    bomb = pickle.dumps(Bomb())
    saved = io.BytesIO()
    torch.save((Bomb(),), saved)
    tampered = {
        "would unpickle 'weight'": {weights: json.dumps(config).encode(), "data/weights/weight_0": bomb},
        "objects among its sample inputs": {"data/sample_inputs/model.pt": saved.getvalue()},
        "holds 'data/constants/custom_obj_0'": {"data/constants/custom_obj_0": bomb},
        "holds 'data/constants/opaque_obj_0'": {"data/constants/opaque_obj_0": bomb},
        "holds 'data/weights/model.pt'": {"data/weights/model.pt": bomb},  # the older form of an archive
        "holds 'data/aotinductor/model/x.so'": {"data/aotinductor/model/x.so": b"code"},
        "is no archive of torch.export": {weights: b"{"},
    }
    for message, change in tampered.items():
        with pytest.raises(ArchiveError, match=message):
            refuse_pickles(archive(tmp_path / "model.pt2", exported | change))
    (tmp_path / "model.pt2").write_bytes(b"no zip")
    with pytest.raises(ArchiveError, match="is no archive"):
        refuse_pickles(tmp_path / "model.pt2")
    assert "unpickled" not in capsys.readouterr().out


# ---- secrets

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAHUSHHUSH",
    "AWS_SECRET_ACCESS_KEY": "hush-aws",
    "AZURE_STORAGE_ACCOUNT_KEY": "hush-azure",
    "GOOGLE_SERVICE_ACCOUNT_KEY": "hush-google",
    "RAY_AUTH_TOKEN": "hush-ray",
}


def test_a_run_directory_holds_no_secret_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usr_ray.runs.plan import write_plan

    for variable, value in SECRETS.items():
        monkeypatch.setenv(variable, value)
    spec = samples_spec()
    write_samples(tmp_path / "lake", spec)
    config = load_config(
        None,
        ["data.train_dates=2026-01-01:2026-01-03", "train.global_batch_size=64", "model.contrastive.group_size=32"],
    )
    write_plan(plan_run(config, tmp_path / "lake", tmp_path / "run", command=["jobs/train.py"]))
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"config.json", "manifest-train.json"}
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert not [value for value in SECRETS.values() if value in text], path


def test_a_key_in_the_lakes_address_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = load_config(None, ["data.train_dates=2026-01-01"])
    with pytest.raises(UserError, match="an address must hold no key") as caught:
        plan_run(config, "s3://AKIAHUSHHUSH:hush-aws@shop/lake", tmp_path / "run", command=["jobs/train.py"])
    assert "hush" not in str(caught.value).lower()
    assert not (tmp_path / "run").exists()


def test_no_configuration_key_is_a_place_for_a_secret() -> None:
    """Every key is saved with the run and shown in Ray's dashboard."""
    from usr_ray.config import dotted

    keys = dotted(Config().to_dict())
    assert len(keys) > 50
    assert not [key for key in keys if re.search(r"(?i)secret|password|token|access_?key|credential", key)]


@pytest.mark.integration
def test_nothing_prints_or_saves_the_environment() -> None:
    for path in SOURCES:
        for called, call in calls(path):
            if called in ("print", "json.dumps", "write_whole") or called.endswith((".write_text", "_log.warning")):
                inside = {ast.unparse(node) for node in ast.walk(call) if isinstance(node, ast.Attribute | ast.Name)}
                assert not inside & {"os.environ", "environ", "environment"}, f"{name(path)}:{call.lineno}"


def test_a_manifest_is_refused_when_its_table_climbs_out(tmp_path: Path) -> None:
    """A Delta log that names ../: what a hand, or a hostile writer, could put there."""
    write_samples(tmp_path / "lake", samples_spec())
    log = sorted((tmp_path / "lake" / "samples" / "_delta_log").glob("*.json"))[0]
    text = log.read_text(encoding="utf-8")
    (added,) = re.findall(r'"path":"(impression_date=2026-01-01/[^"]+)"', text)[:1]
    log.write_text(text.replace(added, "../../elsewhere/" + added.rpartition("/")[2]), encoding="utf-8")
    with pytest.raises(UserError, match=r"outside of the table|cannot be opened"):
        build_manifest(tmp_path / "lake", dates=(dt.date(2026, 1, 1), dt.date(2026, 1, 1)))
