"""A real engine under `ray.serve.llm` behind our router: prompts find their caches, answers survive a replica's death.

Needs vLLM's CPU build (`examples/llm/install.sh FOLDER`), pytest, pytest-timeout, pytest-xdist and hypothesis there,
and that Python for the tests.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from bench.llm_real.engines import find_engines
from bench.llm_real.engines import served as had_by
from examples.llm.serving import MODEL, missing
from tests.ports import free_port

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing().split("\n", maxsplit=1)[0]),
]

INSTRUCTION = "Answer as a lighthouse keeper would, and mention the weather of the day. " * 16
SERVE = """
import json, os, signal, sys, threading
from pathlib import Path
import ray
from ray import serve
from bench.llm_real.server import FIRST, FOLDER
from examples.llm.model import make_model
from examples.llm.serving import application, environment
from serve_app.launch.control_plane import start_control_plane

folder, port = Path(sys.argv[1]), int(sys.argv[2])
os.environ.update(environment(), **{FOLDER: str(folder), FIRST: "2"})
make_model(folder / "model", exact=True)
env = {**environment(), FOLDER: str(folder), FIRST: "2"}
ray.init(address="local", num_cpus=8, include_dashboard=False, namespace="shadecast", object_store_memory=200_000_000,
         runtime_env={"env_vars": env}, log_to_driver=False)
start_control_plane(page_port=0)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(application(folder / "model", 2, server="bench.llm_real.server:MeasuredServer", env=env,
                      exact=True))
(folder / "up").touch()
signal.sigwait([signal.SIGTERM])
serve.shutdown()
ray.shutdown()
"""


class Served:
    """An application in a process of its own."""

    def __init__(self, folder, **env):
        self.folder, self.port = Path(folder), free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(folder), str(self.port)],
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **env},
            cwd=Path(__file__).resolve().parents[2],
        )

    def wait(self):
        deadline_s = time.monotonic() + 240.0
        while not (self.folder / "up").exists():
            assert self.process.poll() is None, "the application ended while it started"
            assert time.monotonic() < deadline_s, "the application did not start"
            time.sleep(0.2)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def engines(self):
        return find_engines(self.folder)

    def stream(self, messages, tokens, number, on_text=lambda _: None):
        """The text, as it comes; `on_text` is told all so far."""
        body = {
            "model": MODEL,
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "user": str(number),
        }
        url, text = f"http://127.0.0.1:{self.port}/v1/chat/completions", ""
        with httpx.stream("POST", url, json=body, timeout=90.0) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    for choice in chunk["choices"]:
                        text += choice["delta"].get("content") or ""
                        on_text(text)
        return text


def asked(question, *, instruction=INSTRUCTION):
    return [{"role": "system", "content": instruction}, {"role": "user", "content": question}]


def hits(engines):
    return sum(engine.counters()["hits"] for engine in engines)


def tokens(engines):
    return sum(engine.counters()["prompt_tokens"] for engine in engines)


def until(what):
    """Whether it comes true within ten seconds: an engine counts a moment after it has answered."""
    deadline_s = time.monotonic() + 10.0
    while not (true := what()) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return true


@pytest.fixture(scope="module")
def served():
    with tempfile.TemporaryDirectory(prefix="llm-") as folder:
        app = Served(folder)
        try:
            app.wait()
            yield app
        finally:
            app.stop()


def test_prompts_that_begin_alike_find_what_was_computed_of_them(served):
    for number in range(90, 94):  # what an engine does first takes long, and makes it look slow for a moment
        served.stream(asked("Warm?", instruction="Warm up."), 4, number)
    before = hits(served.engines())
    for number in range(4):
        asked_before = tokens(served.engines())
        assert len(served.stream(asked(f"Question {number}?"), 4, number)) == 4
        until(lambda asked_before=asked_before: tokens(served.engines()) > asked_before)
    wanted = 3 * (len(INSTRUCTION) - 256)  # three of four had the instruction, but for a block that it shares
    assert until(lambda: hits(served.engines()) - before >= wanted)


def test_the_deployment_tells_how_large_its_cache_is(served):
    engines = find_engines(served.folder)
    text = httpx.get(f"http://127.0.0.1:{engines[0].port}/metrics", timeout=10.0).text
    assert "vllm:kv_cache_usage_perc" in text
    assert "vllm:cache_config_info" in text


def test_a_greedy_answer_whose_replica_is_killed_is_the_same(served):
    talk = asked("Tell me of the sea.", instruction="Speak at length.")
    whole = served.stream(talk, 200, 100)
    assert len(whole) == 200
    killed = []

    def kill(text):
        if len(text) >= 60 and not killed:
            for engine in served.engines():
                if any(number == 101 for number, _ in had_by(served.folder, engine.place)):
                    os.kill(engine.pid, signal.SIGKILL)
                    killed.append(engine.place)

    assert served.stream(talk, 200, 101, kill) == whole
    assert killed, "a replica was killed while it answered"


def test_direct_streaming_finds_caches_and_uses_both_replicas(tmp_path):
    app = Served(
        tmp_path,
        RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING="1",
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY="1",
    )
    try:
        app.wait()
        for number in range(12):
            alike = asked(f"Question {number}?", instruction=f"{number % 4} {INSTRUCTION}")
            assert len(app.stream(alike, 4, number)) == 4
        counted = [engine.counters() for engine in app.engines()]
        assert all(each["prompt_tokens"] > 0 for each in counted), "both replicas are used"
        assert sum(each["hits"] for each in counted) >= 8 * (len(INSTRUCTION) - 256)
    finally:
        app.stop()
