"""Commands as they are printed: a shell takes each line of the pages, heads and docstrings as it stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = "python|spark-submit|kubectl|make|docker|pip|ray|curl|scp|usr-ray|prometheus|promtool"
COMMAND = re.compile(rf"(?:#|\$)?\s*((?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) .*)")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
FILES = re.compile(r"(?:^| )((?:jobs|benchmarks|cluster|examples|docs)/[\w./-]+\.(?:py|ya?ml|toml|conf|Dockerfile))")


def folders(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def printed() -> Iterator[tuple[str, str]]:
    """(file and line, command) of every command that a page, the head of a file, or a docstring shows as one."""
    for path in folders("README.md", "docs/*.md", "examples/*/README.md", "benchmarks/README.md"):
        lines, is_fenced = path.read_text(encoding="utf-8").splitlines(), False
        for number, line in enumerate(lines, 1):
            is_fenced ^= line.startswith("```")
            if is_fenced or line.startswith("    "):
                yield f"{path.relative_to(ROOT)}:{number}", line
    for path in folders("cluster/**/*.y*ml", "cluster/**/*Dockerfile", "cluster/**/*.conf", "jobs/**/*.toml"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("#   "):
                yield f"{path.relative_to(ROOT)}:{number}", line
    for path in folders("jobs/*.py", "benchmarks/*.py", "cluster/**/*.py", "examples/**/*.py", "tests/*/__main__.py"):
        for line in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines():
            yield str(path.relative_to(ROOT)), line


def commands() -> list[tuple[str, str]]:
    found = [(place, COMMAND.fullmatch(line.strip())) for place, line in printed()]
    return [(place, match[1]) for place, match in found if match is not None]


def faults(command: str) -> str:
    """What a shell would take otherwise than it is meant; '' where there is nothing.

    An explanation belongs behind a '#': else its words are arguments. Blanks may put options and scripts in columns.
    """
    words = QUOTED.sub("Q", command).partition(" #")[0]
    if found := re.search(r"\S {2,}(?![-\[|\\&>{]|(?:python )?[\w./]+\.py\b|[a-z]+ --|Q)(\S.*)", words):
        return f"the shell would take {found[1]!r} as arguments"
    if re.search(r"(?<!\$)\(", words):
        return "a bracket, which the shell takes as its own"
    if "pip install 'usr-ray" in command:
        return "no package index has usr-ray; name the checkout: '.[serve]'"
    return ""


@pytest.mark.integration
def test_a_shell_takes_every_printed_command_as_it_is_meant() -> None:
    assert len(commands()) > 150
    assert [f"{place}: {found}" for place, command in commands() if (found := faults(command))] == []


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("kubectl apply -f job.yaml      one build", "the shell would take 'one build' as arguments"),
        ("make chaos     every fault", "the shell would take 'every fault' as arguments"),
        ("python a.py --lake LAKE        (or needs)", "the shell would take '(or needs)' as arguments"),
        ("python a.py --lake LAKE (or needs)", "a bracket, which the shell takes as its own"),
        ("pip install 'usr-ray[serve]'", "no package index has usr-ray; name the checkout: '.[serve]'"),
        ("kubectl apply -f job.yaml      # one build (of two)", ""),
        ("python jobs/train.py    --config FILE [--set a.b=c]", ""),
        (
            'curl -d \'{"query": "red  shoes"}\'  http://127.0.0.1',
            "the shell would take 'http://127.0.0.1' as arguments",
        ),
        ('export X="$(date)"', ""),
    ],
)
def test_an_explanation_without_a_hash_is_found(command: str, fault: str) -> None:
    assert faults(command) == fault


def test_files_and_targets_of_printed_commands_are_there() -> None:
    named = {(place, name) for place, command in commands() for name in FILES.findall(QUOTED.sub("Q", command))}
    assert len(named) > 100
    assert [(place, name) for place, name in named if not (ROOT / name).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    made = [
        (place, re.findall(r"(?<!\S)[a-z-]+(?!\S)", command.partition(" #")[0])[1:])
        for place, command in commands()
        if command.startswith("make ")
    ]
    assert made
    assert [(place, names) for place, names in made if not set(names) <= targets] == []
