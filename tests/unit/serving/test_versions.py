"""A registry's pointer, its moves by jobs/publish.py, and what is refused there."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.publish import main as publish_job
from jobs.serve import main as serve_job
from tests.unit.changed_json import refusals
from usr_ray.config import UserError
from usr_ray.serving.encode import micros_of
from usr_ray.serving.events import KEPT_DAYS, Rules
from usr_ray.serving.versions import (
    FORMAT,
    PRUNED_AFTER_S,
    Pointer,
    RegistryError,
    in_use,
    move_pointer,
    read_pointer,
    roll_back,
    stable_folder,
    verified_version,
    version_files,
    with_canary,
    with_shadow,
)

pytestmark = pytest.mark.unit


def write_version(registry, name, as_of):
    """A version that says how old it is, and no more."""
    folder = registry / "versions" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version.json").write_text(json.dumps({"format": FORMAT, "version": name, "as_of": as_of}))


def test_a_rollback_says_how_old_its_version_is_and_where_the_log_of_events_no_longer_reaches_it(tmp_path, capsys):
    today = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for hours, is_whole in ((0, True), (-1, False)):
        as_of = (today - dt.timedelta(days=KEPT_DAYS) + dt.timedelta(hours=hours)).isoformat()
        write_version(tmp_path, "1-a", as_of)
        Pointer("2-b", ("1-a",)).write(tmp_path)
        publish_job(["--registry", str(tmp_path), "--rollback"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].startswith(f"it knows its users up to {as_of}; what came later")
        assert len(lines) == 2 if is_whole else lines[2].startswith("warning: the log of posted events goes back to ")
        first = (today - dt.timedelta(days=KEPT_DAYS)).isoformat()
        assert is_whole or f" {first} at most, so histories lack what happened from {as_of} to then" in lines[2]
    (tmp_path / "versions" / "1-a" / "version.json").write_text("{")
    Pointer("2-b", ("1-a",)).write(tmp_path)
    with pytest.raises(RegistryError, match=r"1-a: holds no readable version.json; publish one"):
        publish_job(["--registry", str(tmp_path), "--rollback"])
    assert read_pointer(tmp_path).stable == "2-b"  # no service would open it


def test_changes_of_the_pointer_at_once_are_all_kept(tmp_path):
    """A nightly publication and an operator who changes the canary's share must not undo one another."""
    names = [f"{n}-a" for n in range(40)]
    for name in ("first-a", "canary-b", *names):
        (tmp_path / "versions" / name).mkdir(parents=True)
    Pointer("first-a", canary="canary-b", share=0.1).write(tmp_path)

    def change(n):
        if n % 4 == 3:
            with_shadow(tmp_path, names[n])
        else:
            move_pointer(tmp_path, names[n])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(40)))
    pointer = read_pointer(tmp_path)
    moved = {name for n, name in enumerate(names) if n % 4 != 3}
    assert {*pointer.before, pointer.stable} == {"first-a"} | moved
    assert len(pointer.before) == len(moved)
    assert (pointer.canary, pointer.share) == ("canary-b", 0.1)
    assert pointer.shadow in set(names) - moved


def test_flags_that_would_do_nothing_are_refused(tmp_path):
    run, lake = ["--run-dir", str(tmp_path)], ["--lake", str(tmp_path)]
    write_version(tmp_path, "one", "2026-01-01T00:00:00+00:00")
    Pointer("two", ("one",), canary="one", share=0.5).write(tmp_path)
    for words, flag in (
        ([*run, *lake, "--for-gpu", "--rollback"], "--run-dir"),
        ([*lake, "--rollback"], "--lake"),
        (["--for-gpu", "--rollback"], "--for-gpu"),
        ([*run, *lake, "--stable"], "--run-dir"),
        (["--stable", "--users", "redis://127.0.0.1:1/0"], "--users"),
    ):
        message = rf"^{flag}: is for a new version, and --(rollback|stable) serves one that is there; leave it out"
        with pytest.raises(UserError, match=message):
            publish_job(["--registry", str(tmp_path), *words])
    for words in (["--canary", "0.1"], ["--prune"]):
        with pytest.raises(UserError, match=r"^--for-gpu: is for a new version; name its --run-dir and --lake, or lea"):
            publish_job(["--registry", str(tmp_path), "--for-gpu", *words])
    with pytest.raises(UserError, match=r"^--run-dir is missing"):
        publish_job(["--registry", str(tmp_path), *lake, "--canary", "0.1"])
    assert read_pointer(tmp_path) == Pointer("two", ("one",), canary="one", share=0.5)
    with pytest.raises(UserError, match=r"^--replicas: --alone is one process; leave one of them out"):
        serve_job(["--registry", str(tmp_path), "--alone", "--replicas", "2"])


def test_a_rollback_leaves_the_model_behind_and_not_only_its_newest_publication(tmp_path, capsys):
    """The 10th good; the 11th bad, and published again on the 12th and 13th, as jobs/daily.py does on held days."""
    good, *bad = ("20260110T030000-900d", "20260111T030000-0bad", "20260112T030000-0bad", "20260113T030000-0bad")
    for name in (good, *bad):
        write_version(tmp_path, name, "2999-01-01T00:00:00+00:00")
        move_pointer(tmp_path, name)
        wanted = {good, name}
        assert in_use(tmp_path) == wanted, "whose users stay in Redis"
    publish_job(["--registry", str(tmp_path), "--rollback"])
    assert capsys.readouterr().out == (
        f"{tmp_path}: {good} is stable again, without canary and shadow (model 900d in the place of 0bad)\n"
        "it knows its users up to 2999-01-01T00:00:00+00:00; what came later is in their histories as far as it was "
        "posted\n"
    )
    assert read_pointer(tmp_path) == Pointer(good)
    # Where all are of one model, the one before; one whose folder was removed cannot be served.
    Pointer(bad[2], (bad[0], bad[1])).write(tmp_path)
    shutil.rmtree(tmp_path / "versions" / bad[1])
    publish_job(["--registry", str(tmp_path), "--rollback"])
    assert capsys.readouterr().out.splitlines()[0].endswith("(no other model was stable before)")
    assert read_pointer(tmp_path) == Pointer(bad[0])


def test_pruning_leaves_what_is_served_what_a_rollback_would_serve_and_what_is_a_day_old(tmp_path, capsys):
    old = time.time() - PRUNED_AFTER_S - 60
    words = ["--registry", str(tmp_path), "--prune"]
    with pytest.raises(RegistryError, match=r"holds no readable current\.json"):
        publish_job(words)  # nobody knows what is in use
    folders = ("1-a", "2-b", "3-b", "4-b", "5-c", "6-d", "7-e", ".tmp-killed", ".tmp-now")
    for name in folders:
        write_version(tmp_path, name, "2026-01-01T00:00:00+00:00")
        if name not in ("7-e", ".tmp-now"):
            os.utime(tmp_path / "versions" / name, (old, old))
    # 4-b is stable, a rollback goes to the model before, 1-a; 5-c is the canary, 6-d the shadow.
    Pointer("4-b", ("1-a", "2-b", "3-b"), canary="5-c", share=0.1, shadow="6-d").write(tmp_path)
    publish_job(words)
    assert capsys.readouterr().out == f"{tmp_path}: deleted .tmp-killed, 2-b, 3-b\n"
    left = {path.name for path in (tmp_path / "versions").iterdir()}
    assert left == {"1-a", "4-b", "5-c", "6-d", "7-e", ".tmp-now"}
    publish_job([*words, "--rollback"])  # 2-b and 3-b are passed over; then nothing but 1-a is in use
    assert read_pointer(tmp_path).stable == "1-a"
    assert {path.name for path in (tmp_path / "versions").iterdir()} == {"1-a", "7-e", ".tmp-now"}
    capsys.readouterr()
    publish_job(words)
    assert capsys.readouterr().out == f"{tmp_path}: deleted nothing: no version is out of use for a day\n"
    with pytest.raises(UserError, match="--users: is for a new version"):
        publish_job([*words, "--users", "redis://127.0.0.1:1/0"])
    with pytest.raises(UserError, match="--lake is missing"):
        publish_job([*words, "--run-dir", str(tmp_path)])


def test_the_pointer_moves_and_goes_back(tmp_path):
    with pytest.raises(RegistryError, match=r"holds no readable current.json; publish one"):
        stable_folder(tmp_path)
    for name in ("one", "two", "three"):
        (tmp_path / "versions" / name).mkdir(parents=True)
        move_pointer(tmp_path, name)
    move_pointer(tmp_path, "three")  # once more
    with_canary(tmp_path, "four", 0.25)
    assert read_pointer(tmp_path) == Pointer("three", ("one", "two"), "four", 0.25)
    move_pointer(tmp_path, "four")  # what was the canary has become stable
    assert read_pointer(tmp_path) == Pointer("four", ("one", "two", "three"))
    with_canary(tmp_path, "five", 0.25)
    assert roll_back(tmp_path) == "three"
    assert read_pointer(tmp_path) == Pointer("three", ("one", "two"))
    with_canary(tmp_path, "five", 0.0)
    assert read_pointer(tmp_path).canary is None
    assert (roll_back(tmp_path), roll_back(tmp_path)) == ("two", "one")
    assert stable_folder(tmp_path).name == "one"
    with pytest.raises(RegistryError, match="no version was stable before one"):
        roll_back(tmp_path)
    move_pointer(tmp_path, "gone")
    with pytest.raises(RegistryError, match=r"names gone, which is not there"):
        stable_folder(tmp_path)
    for strange in ('{"stable": "x", "before": [], "share": 2}', '{"stable": "x", "before": [], "x": 1}', "[]"):
        (tmp_path / "current.json").write_text(strange)
        with pytest.raises(RegistryError, match=r"holds no readable current\.json"):
            read_pointer(tmp_path)
    (tmp_path / "current.json").write_text('{"stable": "../x", "before": []}')
    with pytest.raises(RegistryError, match=r"names '../x', which is no version"):
        stable_folder(tmp_path)


def test_a_pointer_or_a_version_that_was_changed_is_one_line(tmp_path):
    folder = tmp_path / "versions" / "1-a"
    folder.mkdir(parents=True)
    (folder / "x").write_text("x")
    rules = {"click_window": 1, "order_window": 2, "clock_skew": 0, "credit_impression": False}
    about = {"version": "1-a", "model_id": "a", "as_of": "2026-01-01T00:00:00+00:00", "rules": rules}
    null_values = {"items": ["", "none"]}
    content = {"format": FORMAT, **about, "null_values": null_values, "files": version_files(folder)}
    (folder / "version.json").write_text(json.dumps(content))
    Pointer("1-a", ("0-z",), canary="2-b", share=0.1, shadow="2-b").write(tmp_path)

    def read():
        read_pointer(tmp_path).bucket("u")
        version = verified_version(folder, *about)
        assert micros_of(version["as_of"])
        assert all(text in ("", "none", "x") for texts in version.get("null_values", {}).values() for text in texts)
        assert Rules(**version["rules"]).click_window + Rules(**version["rules"]).order_window

    for path, least in ((tmp_path / "current.json", 30), (folder / "version.json", 50)):
        lines = refusals(path, read)
        assert len(lines) >= least
        assert all(str(tmp_path) in line and line.endswith("publish one with jobs/publish.py") for line in lines)


def test_the_job_moves_the_pointer_without_a_run(tmp_path):
    write_version(tmp_path, "one", "2026-01-01T00:00:00+00:00")
    Pointer("one").write(tmp_path)
    for words in (["--canary", "0.1"], ["--stable"]):
        with pytest.raises(UserError, match=r"has no canary; publish one with --run-dir"):
            publish_job(["--registry", str(tmp_path), *words])
    with_canary(tmp_path, "two", 0.5)
    (tmp_path / "versions" / "two").mkdir()
    publish_job(["--registry", str(tmp_path), "--canary", "0.1"])
    assert read_pointer(tmp_path) == Pointer("one", canary="two", share=0.1)
    publish_job(["--registry", str(tmp_path), "--stable"])
    assert read_pointer(tmp_path) == Pointer("two", ("one",))
    publish_job(["--registry", str(tmp_path), "--rollback"])
    assert read_pointer(tmp_path) == Pointer("one")
    with pytest.raises(UserError, match="--run-dir is missing"):
        publish_job(["--registry", str(tmp_path), "--shadow"])


@pytest.mark.integration
def test_the_canary_has_its_share_of_the_users_and_keeps_them():
    users = [f"u{n}" for n in range(20_000)]

    def canaries(name, share):
        return {user for user in users if Pointer("one", canary=name, share=share).bucket(user) == "canary"}

    tenth, third = canaries("1-two", 0.1), canaries("1-two", 0.3)
    # Of a binomial's standard deviation, 42 and 65 users, five.
    assert abs(len(tenth) - 2_000) < 5 * 42
    assert abs(len(third) - 6_000) < 5 * 65
    assert tenth < third
    assert canaries("1-two", 1.0) == set(users)
    assert canaries("1-two", 0.0) == set()
    assert canaries("2-two", 0.1) == tenth  # published again the next day
    other = canaries("2-three", 0.1)  # another canary meets other users: of 2,000 some 200
    assert len(tenth & other) < 300


def test_a_version_with_a_changed_file_is_refused(tmp_path):
    with pytest.raises(RegistryError, match=r"holds no readable version.json"):
        verified_version(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    about = {"format": 3, "files": version_files(tmp_path)}
    (tmp_path / "version.json").write_text(json.dumps(about))
    assert list(verified_version(tmp_path)["files"]) == ["a/b"]
    (tmp_path / "a" / "b").write_text("y")
    with pytest.raises(RegistryError, match="b: missing or changed since it was published"):
        verified_version(tmp_path)
    (tmp_path / "version.json").write_text('{"format": 2}')  # its users were under other keys
    with pytest.raises(RegistryError, match=r"format 2, this version reads 3; publish one with jobs/publish\.py"):
        verified_version(tmp_path)
