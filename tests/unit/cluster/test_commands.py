"""Every command in the documents and the cluster's files is one that the jobs and scripts take: file, flags, keys."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.crd_fields import custom_resources
from usr_ray.cli import job_dates
from usr_ray.config import load_config

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "cluster").rglob("*"))]
TEXTS += sorted((ROOT / "examples").glob("*/README.md"))
TEXTS = [path for path in TEXTS if path.suffix in (".md", ".yaml", ".yml", ".py", ".conf", ".sh", ".Dockerfile")]
PLACEHOLDER = re.compile(r"[A-Z][A-Z_:.]*|\.\.\.|A:B|.*[<{$].*")


_COMMAND = re.compile(
    r"(?:python|spark-submit|--)\s[^`|]*?(?<![\w/])((?:/opt/usr-ray/)?(?:jobs|cluster)/[\w/]+\.py)([^`|]*)"
)


@dataclass(frozen=True)
class Interface:
    """What a script's argparse calls say."""

    flags: set[str] = field(default_factory=set)
    required: set[str] = field(default_factory=set)
    switches: set[str] = field(default_factory=set)
    choices: set[str] = field(default_factory=set)
    """Of its positional argument."""


def interface(path: Path) -> Interface:
    found = Interface(flags={"--help"})
    text = path.read_text(encoding="utf-8")
    texts = [text] + ([(ROOT / "usr_ray" / "cli.py").read_text(encoding="utf-8")] if "job_parser(" in text else [])
    for node in (n for t in texts for n in ast.walk(ast.parse(t))):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".add_argument", ".add_place"))):
            continue
        if not isinstance(node.args[0], ast.Constant):  # inside of add_place
            continue
        first = ast.literal_eval(node.args[0])
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if not first.startswith("--"):
            found.choices.update(re.findall(r"'(\w+)'", options.get("choices", "")) or {"s3", "gcs", "abfs"})
            continue
        found.flags.add(first)
        if options.get("required") == "True":
            found.required.add(first)
        if options.get("action", "").startswith("'store_"):
            found.switches.add(first)
    return found


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script, arguments) of every command that calls a job or a cluster script by its path."""
    # Commands stand behind # in configuration files, and go on over lines that end with a backslash.
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    for line in joined.splitlines():
        for found in _COMMAND.finditer(line):
            # In a table a command ends where the columns of blanks begin.
            arguments = re.split(r"\s{3,}\w|&&|;", found[2], maxsplit=1)[0]
            try:
                # [--flag X] is optional; [0, 1] behind an equals sign is a value
                plain = re.sub(r"(=\[[^\]]*\])|[\[\]]", lambda found: found[1] or " ", arguments)
                words = shlex.split(plain, comments=True)
            except ValueError:  # prose with an apostrophe
                words = arguments.split()
            yield found[1].removeprefix("/opt/usr-ray/"), words


def check(script: str, words: list[str], *, where: str, whole: bool) -> None:
    """AssertionError unless the script is there and takes these words."""
    path = ROOT / script
    assert path.is_file(), f"{where}: {script} is not there"
    takes = interface(path)
    flags = [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
    assert set(flags) <= takes.flags, f"{where}: {script} has no {sorted(set(flags) - takes.flags)}"
    if whole:
        assert takes.required <= set(flags), f"{where}: {script} needs {sorted(takes.required - set(flags))}"
    settings = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
    load_config(None, [word for word in settings if not PLACEHOLDER.fullmatch(word) and word != "a.b=c"])
    for position, word in enumerate(words):
        if word == "--dates" and not PLACEHOLDER.fullmatch(words[position + 1]):
            job_dates(words[position + 1], where=where)
    if takes.choices and words and not words[0].startswith("-"):
        assert words[0] in takes.choices, f"{where}: {script} takes {sorted(takes.choices)}, not {words[0]}"


def all_commands() -> list[Any]:
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        for number, (script, words) in enumerate(commands(text)):
            name = f"{path.relative_to(ROOT).as_posix()}-{number}-{Path(script).stem}"
            found.append(pytest.param(script, words, id=name))
    return found


@pytest.mark.parametrize(("script", "words"), all_commands())
def test_every_command_that_is_written_down_can_be_given(script: str, words: list[str]) -> None:
    # Prose names a job with one flag only; a whole command is one that names its lake or its run.
    check(script, words, where=" ".join([script, *words]), whole=False)


def test_the_commands_of_the_documents_are_found() -> None:
    by_script = {parameter.values[0] for parameter in all_commands()}
    assert {
        "jobs/train.py",
        "jobs/build_samples.py",
        "cluster/local_ray.py",
        "cluster/ray_nodes.py",
        "cluster/spark/standalone.py",
    } <= by_script
    folded = "#   ray job submit -- \\\n#     python jobs/train.py --lake s3a://x --run-dir /runs/1 "
    folded += "--set ray.num_workers=4\n"
    words = ["--lake", "s3a://x", "--run-dir", "/runs/1", "--set", "ray.num_workers=4"]
    assert list(commands(folded)) == [("jobs/train.py", words)]


@pytest.mark.parametrize("words", [["--lak", "x"], ["--set", "train.learning_rat=1"], ["--dates", "2026-02-30"]])
def test_a_wrong_flag_key_or_date_would_be_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"lak|learning_rat|2026-02-30"):
        check("jobs/build_samples.py", words, where="here", whole=False)


def test_the_manifests_give_whole_commands_on_paths_of_the_images() -> None:
    specs = {document["kind"]: document["spec"] for document in custom_resources()}
    for spec in (specs["SparkApplication"], specs["ScheduledSparkApplication"]["template"]):
        script = spec["mainApplicationFile"].removeprefix("local:///opt/usr-ray/")
        check(script, spec["arguments"], where="SparkApplication", whole=True)
    (command,) = commands(specs["RayJob"]["entrypoint"])
    check(*command, where="RayJob", whole=True)
    for side in ("spark", "ray"):
        text = (ROOT / "cluster" / "images" / f"{side}.Dockerfile").read_text(encoding="utf-8")
        assert "WORKDIR /opt/usr-ray\n" in text
        assert "COPY jobs jobs\n" in text
    overrides = re.findall(r"--set (\S+)", specs["RayJob"]["entrypoint"])
    config = load_config(None, overrides)
    assert config.ray.use_gpu
    assert config.data.eval_dates == "2026-01-07"


def test_both_sides_name_the_same_lake_and_configuration() -> None:
    specs = {document["kind"]: document["spec"] for document in custom_resources()}
    lists = [
        specs["SparkApplication"]["arguments"],
        specs["ScheduledSparkApplication"]["template"]["arguments"],
        shlex.split(specs["RayJob"]["entrypoint"]),
    ]
    for flag in ("--lake", "--config"):
        assert len({words[words.index(flag) + 1] for words in lists}) == 1


def anchors(page: Path) -> set[str]:
    """Where a link into a page can lead: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
    for path in [*pages, ROOT / "benchmarks" / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
            file, _, anchor = target.partition("#")
            page = path.parent / file if file else path
            assert page.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(page), f"{path.name}: {target}"
    for path in (ROOT / "docs" / "cluster.md", ROOT / "docs" / "security.md", ROOT / "docs" / "monitoring.md"):
        for named in re.findall(r"`((?:cluster|jobs|docs|tests)/[\w./-]+\.\w+)`", path.read_text(encoding="utf-8")):
            assert (ROOT / named).exists(), f"{path.name}: {named}"


def test_tests_that_the_threat_page_names_are_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]*test_\w+\.py)`", text))
    assert len(named) > 5
    for test in named:
        assert [p for p in (ROOT / "tests").rglob(Path(test).name) if p.as_posix().endswith(f"/{test}")], test


def test_yaml_of_the_cluster_is_read_the_same_by_everybody() -> None:
    """yes, no, on and 1:30 are words to a person and values to YAML 1.1."""
    for path in sorted((ROOT / "cluster").rglob("*.y*ml")):
        for document in yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader):
            assert document is not None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            value = line.partition(": ")[2].partition(" #")[0].strip()
            assert value.lower() not in ("yes", "no", "on", "off"), f"{path.name}:{number}"
            assert not re.fullmatch(r"\d+:\d+", value), f"{path.name}:{number}"
