"""Keeps large JSON off the gateway's event loop: it is read and written by processes of their own.

A thread would not do: `json` and numpy hold the interpreter's lock while they work, for hundreds of milliseconds at
12 MiB, and every other request waits for that lock. So each thread of a small pool owns a process and talks to it
through pipes, which needs the lock only to copy. Small JSON stays on the loop, and binary data, which is not parsed.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

from serve_app.gateway.oip import (
    EncodedResponse,
    InferRequest,
    RequestedOutput,
    decode_request,
    encode_response,
    json_part,
    parse_json_object,
)
from serve_app.gateway.tensors import Array, PackedBytes, RawJson, TensorSpec
from serve_app.protocol_error import ProtocolError

OFF_LOOP_BYTES = 64 * 1024
"""JSON from this size on is read by a process. 64 KiB keep the loop for 0.6 ms, which other requests do not notice; by
way of a process they take 0.25 ms longer. `python -m bench.micro_gateway` shows what they notice at 12 MiB."""
OFF_LOOP_ELEMENTS = 8 * 1024
"""Tensors that leave as JSON, from this many elements (about as many bytes of text as above) on."""
_CALL_PARAMETERS = ("timeout", "sequence_id")
"""What `model_call` reads of a request's parameters; a model gets them all."""
_WORKERS = 2
"""Processes at most: started with the first large requests. More requests wait for one of them."""


class _WorkerDiedError(Exception):
    """The process ended before it answered."""


class Codec:
    """Decodes requests and encodes answers, on the loop where that is quick and in a process where it is not."""

    def __init__(self, timeout_s: float, workers: int = _WORKERS) -> None:
        """`timeout_s`: how long a large request may wait for a process and its work."""
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="codec")
        self._local = threading.local()

    async def decode(
        self, body: bytes, header_length: str | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> InferRequest:
        """`decode_request`; BYTES inputs of a large request come as `PackedBytes`."""
        if len(body) < OFF_LOOP_BYTES:
            return decode_request(body, header_length, inputs, outputs)
        header = json_part(body, header_length)
        if len(header) < OFF_LOOP_BYTES and b'"BYTES"' not in bytes(header):
            return decode_request(body, header_length, inputs, outputs)
        decoded: InferRequest = await self._away(_decode, body, header_length, tuple(inputs), tuple(outputs))
        return decoded

    async def parse(self, body: bytes) -> tuple[dict[str, Any], dict[str, Any] | RawJson]:
        """The object of a generate request: what the gateway reads of it, and what goes to the model."""
        if len(body) < OFF_LOOP_BYTES:
            asked = parse_json_object(body)
            return asked, asked
        return await self._away(_head, body), RawJson(body)

    async def encode(
        self, request: InferRequest, outputs: Mapping[str, Array | PackedBytes], name: str, version: str
    ) -> EncodedResponse:
        """`encode_response`."""
        if elements_to_write(request, outputs) < OFF_LOOP_ELEMENTS:
            return encode_response(request, outputs, name, version)
        bare = InferRequest({}, request.id, {}, request.outputs, request.binary_by_default)
        encoded: EncodedResponse = await self._away(encode_response, bare, dict(outputs), name, version)
        return encoded

    async def _away(self, work: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._threads, self._ask, work, args)
        except TimeoutError:
            raise ProtocolError(
                503, f"no process was free for this large request within {self._timeout_s:g} s", {"Retry-After": "1"}
            ) from None

    def _ask(self, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """In a thread of the pool: the answer of the thread's own process, which is replaced where it has died."""
        for _ in range(2):
            worker = getattr(self._local, "worker", None)
            if worker is None:
                worker = self._local.worker = _Worker()
            try:
                return worker.ask(work, args)
            except _WorkerDiedError:
                self._local.worker = None
        raise ProtocolError(503, "the process that reads large requests died twice; memory may be short")

    def close(self) -> None:
        """Lets the threads go; their processes end with them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """A process that ends with its input: when its owner lets it go, or dies."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )

    def ask(self, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The result of `work` there; raises its ProtocolError, or `_WorkerDiedError`."""
        requests, answers = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        try:
            pickle.dump((work.__name__, args), requests, protocol=5)
            requests.flush()
            good, answer = pickle.load(answers)  # noqa: S301 - of our own process
        except (OSError, EOFError, pickle.UnpicklingError):
            self._end()
            raise _WorkerDiedError from None
        if good:
            return answer
        raise ProtocolError(*answer)

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __del__(self) -> None:
        self._end()


def elements_to_write(request: InferRequest, outputs: Mapping[str, Array | PackedBytes]) -> int:
    """About how many numbers, or eights of characters, the answer holds as JSON, or are looked at for classes."""
    if request.outputs is None:
        chosen = [] if request.binary_by_default else list(outputs.values())
    else:
        chosen = [outputs[want.name] for want in request.outputs if _is_work(want) and want.name in outputs]
    return sum(_elements(array) for array in chosen)


def _is_work(want: RequestedOutput) -> bool:
    return not want.binary or bool(want.class_count)


def _elements(array: Array | PackedBytes) -> int:
    if isinstance(array, PackedBytes):
        return OFF_LOOP_ELEMENTS
    if array.dtype.kind != "O" or array.size >= OFF_LOOP_ELEMENTS:
        return int(array.size)
    return int(array.size) + sum(len(item) for item in array.flat if isinstance(item, (bytes, str))) // 8


# ---------------------------------------------------------------- in the process


def _decode(body: bytes, *args: Any) -> InferRequest:
    return decode_request(body, *args).packed()


def _head(body: bytes) -> dict[str, Any]:
    """What the gateway itself reads of a generate request."""
    asked = parse_json_object(body)
    found: dict[str, Any] = {key: asked[key] for key in ("id", "parameters") if key in asked}
    if isinstance(found.get("parameters"), dict):
        found["parameters"] = {key: value for key, value in found["parameters"].items() if key in _CALL_PARAMETERS}
    return found


_WORK: dict[str, Callable[..., Any]] = {work.__name__: work for work in (_decode, _head, encode_response)}


def main() -> None:
    """Answers one request after the other until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            name, args = pickle.load(requests)  # noqa: S301 - from the gateway that started this process
        except EOFError:
            return
        try:
            answer = True, _WORK[name](*args)
        except ProtocolError as error:
            answer = False, (error.status, error.reason, error.headers)
        except Exception as error:
            answer = False, (500, f"the gateway failed: {type(error).__name__}", {})
        pickle.dump(answer, answers, protocol=5)
        answers.flush()
        del args, answer


if __name__ == "__main__":
    main()
