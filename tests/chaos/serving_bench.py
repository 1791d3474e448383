"""Versions of a tiny program to harm, a service on them, and the judge of its answers."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.chaos.observe import Seen
from tests.unit.samples_table import samples_spec
from usr_ray.serving.encode import Profile, UserEvents, ValueIndex
from usr_ray.serving.model import request_shapes
from usr_ray.serving.ranker import Ranker, iso_time
from usr_ray.serving.runtime import FEATURE_SPEC, MANIFEST, REQUEST
from usr_ray.serving.runtime import FORMAT as EXPORT_FORMAT
from usr_ray.serving.service import OverloadError
from usr_ray.serving.stores import put_items, put_users
from usr_ray.serving.versions import (
    FORMAT,
    GOLDEN,
    MODEL,
    VERSION,
    VERSIONS,
    VOCABULARY_FOLDER,
    open_encoder,
    version_files,
    vocabulary_paths,
)

NOW_US = 1_767_225_600_000_000
SPEC = samples_spec()
OUTPUTS = ("p_ctr", "p_ctcvr", "p_ctr_global", "p_ctcvr_global")
NUM_CLIENTS, NUM_REQUESTS = 3, 12
HARMLESS = (200, 422, 429)


class Answers(Protocol):
    """A service, here or elsewhere."""

    def submit(self, body: bytes, *, ranked: bool) -> Any:
        """A future of (status, answer)."""


def write_version(registry: Path, name: str, weight: float, *, is_empty: bool = False) -> Path:
    """A version whose probabilities are a sigmoid of `weight` times a sum over all its inputs; its folder."""
    folder = registry / VERSIONS / name
    (folder / MODEL).mkdir(parents=True)
    (folder / VOCABULARY_FOLDER).mkdir()
    _write_program(folder / MODEL, weight)
    for feature, path in vocabulary_paths(folder, SPEC).items():
        size = SPEC.sparse_feature(feature).num_embeddings - 2
        ValueIndex.write(path, [f"{feature}-{n}" for n in range(size)], np.arange(2, 2 + size))
    encoder, rng = open_encoder(folder), np.random.default_rng(0)
    items, users = ([] if is_empty else [f"{kind}-{n}" for n in range(20)] for kind in ("item_id", "user_id"))
    brands = rng.integers(2, 8, (len(items), 1)).astype(np.int32)
    put_items(folder, items, Profile(brands, rng.normal(size=(len(items), 1)).astype(np.float32)), encoder)
    ages = rng.normal(size=(len(users), 1)).astype(np.float32)
    put_users(folder, users, [_events(rng) for _ in users], Profile(np.empty((len(users), 0), np.int32), ages))
    about = {"format": FORMAT, "version": name, "model_id": name, "as_of": iso_time(NOW_US)}
    about["rules"] = {"click_window": 86_400_000_000, "order_window": 86_400_000_000}
    seal(folder, about, [])
    ranker = Ranker.open(folder)
    seal(folder, about, [{"request": r, "items": ranker.score(r)["items"]} for r in requests()[:4]])
    return folder


def seal(folder: Path, about: dict[str, Any], golden: list[Any]) -> None:
    """Write golden requests and, last, the sums of all files."""
    (folder / GOLDEN).write_text(json.dumps(golden))
    (folder / VERSION).write_text(json.dumps(about | {"files": version_files(folder)}))


def _events(rng: np.random.Generator) -> UserEvents:
    number = int(rng.integers(1, 9))
    time = np.sort(NOW_US - rng.integers(1, 86_400_000_000, number))
    scenario, action = (rng.integers(low, low + 2, number).astype(np.uint8) for low in (0, 1))
    item, query = (rng.integers(2, 12, number).astype(np.int32) for _ in range(2))
    return UserEvents(time, time, scenario, action, item, query, rng.integers(1, 1 << 62, number).astype(np.uint64))


def _write_program(folder: Path, weight: float) -> None:
    inputs, nodes, terms = [], [], []
    shapes = {n: [s or "items" for s in shape] for n, (_, shape) in request_shapes(SPEC).items()}
    for number, (name, (dtype, _)) in enumerate(request_shapes(SPEC).items()):
        kind = TensorProto.FLOAT if str(dtype) == "torch.float32" else TensorProto.INT64
        inputs.append(helper.make_tensor_value_info(name, kind, shapes[name]))
        nodes.append(helper.make_node("Cast", [name], [f"{name}:f"], to=TensorProto.FLOAT))
        is_row = len(shapes[name]) == 1
        nodes.append(
            helper.make_node("Identity", [f"{name}:f"], [f"{name}:s"])
            if is_row
            else helper.make_node("ReduceSum", [f"{name}:f", "axes"], [f"{name}:s"], keepdims=0)
        )
        nodes.append(helper.make_node("Mul", [f"{name}:s", f"w{number}"], [f"{name}:w"]))
        terms.append(f"{name}:w")
    nodes.append(helper.make_node("Sum", terms, ["sum"]))
    constants = [helper.make_tensor("axes", TensorProto.INT64, [1], [1])]
    for number, name in enumerate(request_shapes(SPEC)):
        part = 1e-6 if name.endswith("ages_s") else 0.01 * (number + 1)
        constants.append(helper.make_tensor(f"w{number}", TensorProto.FLOAT, [1], [weight * part]))
    nodes += [helper.make_node("Sigmoid", ["sum"], [name]) for name in OUTPUTS]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["items"]) for name in OUTPUTS]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / REQUEST)
    (folder / FEATURE_SPEC).write_text(SPEC.to_json())
    described = [
        {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": shapes[name]}
        for name, (dtype, _) in request_shapes(SPEC).items()
    ]
    manifest = {"inputs": [], "request_inputs": described, "outputs": [{"name": name} for name in OUTPUTS]}
    manifest |= {"format": EXPORT_FORMAT, "scenarios": list(SPEC.scenarios), "vocabulary": {"kind": "fit"}}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": version_files(folder)}))


def requests() -> list[dict[str, Any]]:
    """Requests of the versions' users, and of one whom no version knows."""
    rng = np.random.default_rng(1)
    return [
        {
            "scenario": SPEC.scenarios[n % 2],
            "user_id": f"user_id-{n}" if n else "nobody",
            "time": iso_time(NOW_US + n),
            "candidates": [f"item_id-{i}" for i in rng.integers(0, 25, 6)],
        }
        for n in range(NUM_REQUESTS)
    ]


class Judge:
    """Knows the right answers of every version, whole and without history, and compares.

    Args:
        folders: of the versions, before they are harmed.
        asked: the requests.
        harmless: statuses that an answer may have.
    """

    def __init__(
        self,
        folders: list[Path],
        asked: list[dict[str, Any]] | None = None,
        *,
        harmless: tuple[int, ...] = HARMLESS,
    ) -> None:
        self._harmless = harmless
        self.asked = requests() if asked is None else asked
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()
        self._right: dict[tuple[str, bool], list[list[float]]] = {}
        for folder in folders:
            ranker = Ranker.open(folder)
            whole = [[item["p_ctr"] for item in ranker.score(request)["items"]] for request in self.asked]
            self._right[folder.name, False] = whole
            self._right[folder.name, True] = [_without_history(ranker, request) for request in self.asked]

    def ask(self, service: Answers, place: int) -> None:
        """Ask the request at `place`, and judge its answer."""
        try:
            body = json.dumps(self.asked[place]).encode()
            status, answer = service.submit(body, ranked=False).result(60)
        except OverloadError:
            status, answer = 429, {}
        except Exception as error:  # the network would say 500
            status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        word = f"{status}"
        if status == 200:
            right = self._right[answer["version"], answer["degraded"]][place]
            word = f"degraded {answer['version']}" if answer["degraded"] else answer["version"]
            gap = max(abs(item["p_ctr"] - p) for item, p in zip(answer["items"], right, strict=True))
            if not gap <= 1e-6:
                word = "wrong"
                self._note(f"request {place} of version {answer['version']} is {gap} off")
        elif status not in self._harmless:
            self._note(f"{status}: {answer.get('error')}")
        with self._lock:
            self.counts[word] += 1

    def _note(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)

    def ask_all(self, service: Answers) -> None:
        """Each request once, from several threads."""
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            list(pool.map(lambda place: self.ask(service, place), range(len(self.asked))))

    def note(self, seen: Seen, *needed: str) -> Seen:
        """Note that nothing was wrong, and that each of `needed` was among the answers and nothing else."""
        found = ", ".join(f"{number} {word}" for word, number in sorted(self.counts.items()))
        seen.note("answers", not self.wrong, found if not self.wrong else f"{found}: {self.wrong[0]}")
        seen.note("kinds", set(self.counts) == set(needed), f"answers are {', '.join(sorted(self.counts))}")
        return seen


def _without_history(ranker: Ranker, raw: dict[str, Any]) -> list[float]:
    """p_ctr of a request whose user nothing is known of, from the encoder and the program alone."""
    encoder, request = ranker.encoder, ranker.checked(raw)
    ids, of_items, _ = ranker._items.find(request.candidates, encoder)
    inputs = encoder.inputs(
        scenario=request.scenario,
        time_us=request.time_us,
        user_id=request.user_id,
        query=None,
        user=encoder.nothing("user"),
        context=request.context,
        events=UserEvents.none(),
        items=(ids, of_items),
    )
    found: list[float] = ranker.predict(inputs)["p_ctr"].tolist()
    return found
