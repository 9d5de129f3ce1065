"""The gateway behind a real HTTP server in this process, the model's replica an object beside it: no Ray."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn

from serve_app.gateway.http_app import make_app
from serve_app.gateway.ingress import InferenceApi
from serve_app.gateway.model_server import ModelInfo, ModelServer
from serve_app.gateway.tensors import TensorSpec
from tests.serve_app.gateway.gateway_fakes import FakeHandle, make_api


class Everything:
    """A model with a tensor of each kind, that gives back what it gets; and generates."""

    name = "everything"
    inputs = (
        TensorSpec("words", "BYTES", (-1,)),
        TensorSpec("half", "FP16", (-1,)),
        TensorSpec("brain", "BF16", (-1,)),
        TensorSpec("flag", "BOOL", (-1,)),
        TensorSpec("scores", "FP32", (-1, 3)),
    )
    outputs = inputs

    def infer(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        self.parameters = parameters
        return inputs

    async def generate(self, request: dict[str, Any]) -> Any:
        for word in str(request.get("text_input", "")).split():
            yield {"text_output": word + " "}


SAMPLE = {
    "words": np.array([b"a", b"\xff\x00", "grün".encode()], object),
    "half": np.array([0.5, 65504], np.float16),
    "brain": np.array([1.0, -2.5], np.float32),
    "flag": np.array([True, False]),
    "scores": np.array([[0.1, 0.7, 0.2], [3, 1, 2]], np.float32),
}


def everything(**settings: Any) -> tuple[InferenceApi, Everything]:
    """The API and the model behind it; calls go through the replica's own code."""
    server = ModelServer(f"{__name__}:Everything")
    handle = FakeHandle(lambda *args: server.generate(*args) if len(args) == 1 else server.infer(*args))
    api = make_api(handle, info=ModelInfo.of(Everything), **settings)
    model: Everything = server._model
    return api, model


@contextmanager
def served(api: InferenceApi) -> Iterator[str]:
    """The host and port at which `api` answers."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(api), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{sock.getsockname()[1]}"  # the socket listens: who connects early waits
    finally:
        server.should_exit = True
        thread.join(10.0)
