"""The measured work as a model of the gateway's: what `bench.live.workload.Work` does, asked over HTTP."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import ray

from bench.live.workload import burn, right_answer
from serve_app.gateway.tensors import TensorSpec


class Burn:
    """Burns the CPU seconds that a request asks for."""

    name = "burn"
    inputs = (TensorSpec("x", "INT64", (1,)), TensorSpec("cpu_s", "FP64", (1,)))
    outputs = (TensorSpec("value", "INT64", (1,)), TensorSpec("node", "BYTES", (1,)))

    def __init__(self) -> None:
        self._node_id = ray.get_runtime_context().get_node_id()

    async def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The answer and the node that gave it."""
        burn(float(inputs["cpu_s"][0]))
        node = np.array([self._node_id.encode()], dtype=object)
        return {"value": np.array([right_answer(int(inputs["x"][0]))]), "node": node}


def body(x: int, cpu_s: float) -> bytes:
    """A request of the Open Inference Protocol."""
    tensors = (("x", "INT64", x), ("cpu_s", "FP64", cpu_s))
    return json.dumps(
        {"inputs": [{"name": name, "shape": [1], "datatype": kind, "data": [value]} for name, kind, value in tensors]}
    ).encode()


def read(answer: dict[str, Any]) -> tuple[str, int]:
    """(node id, value) of an answer."""
    found = {output["name"]: output["data"][0] for output in answer["outputs"]}
    return str(found["node"]), int(found["value"])
