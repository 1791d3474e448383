"""The tiled program under FastAPI with uvicorn, BentoML and LitServe, for benchmarks/serving_load.py.

    python benchmarks/serving_rivals.py fastapi|bentoml|litserve --prepared DIR --port PORT

Runs where the framework is installed; needs numpy and onnxruntime beside it, and nothing of this project. A rival gets
its inputs for nothing: DIR holds model.onnx, and for each request the inputs of its rows, encoded before (NAME.npz). It
reads the body that our service reads, runs the program with one thread, and answers with the same items.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

PREPARED, RIVAL = "USR_RAY_BENCHMARK_PREPARED", "USR_RAY_BENCHMARK_RIVAL"
"""Environment: BentoML and LitServe import this file in processes of their own."""
AT_ONCE = 2


class Scorer:
    """model.onnx with what each request needs, in memory."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.names = [output.name for output in self.session.get_outputs()]
        self.inputs = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        probs = self.session.run(self.names, self.inputs[request["request_id"]])
        rows = zip(*(values.tolist() for values in probs), strict=True)
        items = [
            {"id": item, **dict(zip(self.names, row, strict=True))}
            for item, row in zip(request["candidates"], rows, strict=True)
        ]
        return {"request_id": request["request_id"], "items": items}


def serve_fastapi(port: int) -> None:
    """A plain function, which FastAPI runs in its threads, of which it has AT_ONCE; orjson writes the answer."""
    import anyio.to_thread
    import orjson
    import uvicorn
    from fastapi import FastAPI, Response

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = AT_ONCE
        yield

    scorer, app = Scorer(Path(os.environ[PREPARED])), FastAPI(lifespan=lifespan)

    @app.post("/v1/score")
    def score(request: dict[str, Any]) -> Response:
        return Response(orjson.dumps(scorer.score(request)), media_type="application/json")

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if os.environ.get(RIVAL) == "litserve":
    import litserve

    class Api(litserve.LitAPI):  # type: ignore[misc]
        def setup(self, device: str) -> None:  # noqa: ARG002
            self.scorer = Scorer(Path(os.environ[PREPARED]))

        def predict(self, request: dict[str, Any]) -> dict[str, Any]:
            return self.scorer.score(request)


if os.environ.get(RIVAL) == "bentoml":
    import bentoml

    @bentoml.service(workers=1, threads=AT_ONCE, traffic={"timeout": 60})  # type: ignore[untyped-decorator]
    class Ranking:
        def __init__(self) -> None:
            self.scorer = Scorer(Path(os.environ[PREPARED]))

        @bentoml.api(route="/v1/score")  # type: ignore[untyped-decorator]
        def score(
            self, scenario: str, user_id: str, query: str, time: str, candidates: list[str], request_id: str
        ) -> dict[str, Any]:
            del scenario, user_id, query, time
            return self.scorer.score({"request_id": request_id, "candidates": candidates})


def serve_litserve(port: int) -> None:
    api = Api(api_path="/v1/score")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=AT_ONCE, healthcheck_path="/readyz")
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


def serve_bentoml(port: int) -> None:
    words = ["serve", "serving_rivals:Ranking", "--host", "127.0.0.1", "--port", str(port)]
    sys.exit(subprocess.call([str(Path(sys.executable).parent / "bentoml"), *words], cwd=Path(__file__).parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=["fastapi", "bentoml", "litserve", ""], nargs="?", default="")
    parser.add_argument("--prepared", type=Path, default=Path())
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.framework:  # `make bench` runs every file
        print("started by serving_load.py")
        return
    if RIVAL not in os.environ:
        more = {
            PREPARED: str(arguments.prepared.absolute()),
            RIVAL: arguments.framework,
            "BENTOML_DO_NOT_TRACK": "true",
        }
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **more})
    ways = {"fastapi": serve_fastapi, "litserve": serve_litserve, "bentoml": serve_bentoml}
    ways[arguments.framework](arguments.port)


if __name__ == "__main__":
    main()
