"""Which fields the operators' schemas have, as far as our manifests use them: python tests/unit/crd_fields.py DIR.

DIR holds the CustomResourceDefinitions as their charts ship them (`helm show crds`, or the `crds` folder of the chart):
kuberay-operator 1.7.0 and spark-operator 2.5.2. They are megabytes, so crd_fields.json keeps the type of every field
that we write, and a test refuses any other. With USR_RAY_CRDS=DIR the test validates against the whole schemas instead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "cluster" / "kubernetes"
FIELDS_FILE = Path(__file__).with_suffix(".json")
KINDS = ("RayCluster", "RayJob", "RayService", "SparkApplication", "ScheduledSparkApplication")
SOURCES = "kuberay-operator 1.7.0 (ray.io/v1), spark-operator 2.5.2 (sparkoperator.k8s.io/v1beta2)"


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, document) of every manifest."""
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for document in yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader):
            yield path.name, document


def custom_resources() -> list[dict[str, Any]]:
    """The documents that an operator understands."""
    return [document for _, document in documents() if document["kind"] in KINDS]


def read_crds(folder: Path) -> dict[str, dict[str, Any]]:
    """ "<kind> <apiVersion>" -> its schema, with unknown fields refused as the API server prunes or refuses them."""
    schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader):
            for version in crd["spec"]["versions"]:
                schema = version["schema"]["openAPIV3Schema"]
                _make_strict(schema["properties"]["spec"])
                schemas[f"{crd['spec']['names']['kind']} {crd['spec']['group']}/{version['name']}"] = schema
    return schemas


def _make_strict(schema: Any) -> None:
    for part in schema if isinstance(schema, list) else [schema]:
        if not isinstance(part, dict):
            continue
        if part.pop("x-kubernetes-int-or-string", False):
            part.pop("type", None)
            part["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if "properties" in part and "additionalProperties" not in part:
            part["additionalProperties"] = bool(part.get("x-kubernetes-preserve-unknown-fields"))
        for value in part.values():
            if isinstance(value, dict | list):
                _make_strict(value)


def problems(document: dict[str, Any], schemas: dict[str, dict[str, Any]]) -> list[str]:
    """What the whole schema says against a document."""
    schema = schemas[f"{document['kind']} {document['apiVersion']}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors]


def paths(value: Any, path: str = "spec") -> Iterator[tuple[str, Any]]:
    """(path, value) of every field below; `[]` for the elements of a list, ~1 for a slash inside a name."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, f"{path}/{key.replace('/', '~1')}")
    elif isinstance(value, list):
        for inner in value:
            yield from paths(inner, f"{path}/[]")


def fields(schema: dict[str, Any], value: Any, path: str = "spec") -> Iterator[tuple[str, str]]:
    """(path, type) of the schema for every field of the value; `*` for the free keys of a map."""
    yield path, schema.get("type", "integer or string")
    if isinstance(value, list):
        for inner in value:
            yield from fields(schema["items"], inner, f"{path}/[]")
    for key, inner in value.items() if isinstance(value, dict) else ():
        known = schema.get("properties", {})
        if key in known:
            yield from fields(known[key], inner, f"{path}/{key}")
        else:
            yield from fields(schema["additionalProperties"], inner, f"{path}/*")


def leaves(found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Without the objects and lists, which the paths below them imply."""
    return {path: kind for path, kind in found if kind not in ("object", "array")}


def main(folder: str) -> None:
    """Write crd_fields.json from the schemas in `folder`."""
    schemas = read_crds(Path(folder))
    found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for document in custom_resources():
        schema = schemas[f"{document['kind']} {document['apiVersion']}"]["properties"]["spec"]
        found[document["kind"]] |= leaves(fields(schema, document["spec"]))
    ordered = {kind: dict(sorted(entries.items())) for kind, entries in found.items()}
    FIELDS_FILE.write_text(json.dumps({"source": SOURCES, **ordered}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
