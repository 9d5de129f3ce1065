"""`make serve`, as a stranger runs it: comes up, reads digits, does what README and docs say, stops without a trace."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from sklearn.datasets import load_digits

from tests.cluster.conftest import wait_for
from tests.docs.blocks import blocks, commands, module_name, pages, served
from tests.ports import free_port

TOKEN = "a-secret-token-of-tests"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def get(url, body=None, headers=None):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def grpc_port():
    return free_port()


@pytest.fixture(scope="module")
def serving(tmp_path_factory, grpc_port):
    """The running command: (process, url of predictions, url of the page, environment, its output file)."""
    folder = tmp_path_factory.mktemp("serve")
    port, page_port = free_port(), free_port()
    env = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder),
        "XDG_STATE_HOME": str(folder),
        "SHADECAST_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    env.pop("RAY_ADDRESS", None)
    log = (folder / "log").open("w+")
    command = [sys.executable, "-m", "serve_app", "serve", "--port", str(port), "--page-port", str(page_port)]
    command += ["--workers", "2", "--replicas", "2", "--grpc-port", str(grpc_port)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        wait_for(lambda: process.poll() is not None or "Ctrl-C stops" in (folder / "log").read_text(), 180, "ready")
        assert process.poll() is None, (folder / "log").read_text()
        yield process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{page_port}", env, folder / "log"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def test_it_reads_digits_rightly(serving):
    _, url, *_ = serving
    pixels, labels = load_digits(return_X_y=True)
    body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [50, 64], "data": pixels[:50].ravel().tolist()}]}
    outputs = {o["name"]: o for o in json.loads(get(f"{url}/v2/models/digits/infer", body))["outputs"]}
    assert outputs["digit"]["datatype"] == "INT64"
    assert outputs["digit"]["shape"] == [50]
    assert outputs["probabilities"]["shape"] == [50, 10]
    assert np.mean(np.array(outputs["digit"]["data"]) == labels[:50]) >= 0.97


def test_status_shows_nodes_and_replicas(serving):
    *_, env, _ = serving
    run = [sys.executable, "-m", "serve_app", "status"]

    def is_shown():
        """The application runs a moment before its router has told the coordinator of the second replica."""
        status = json.loads(
            subprocess.run([*run, "--json"], env=env, capture_output=True, check=True, timeout=60).stdout
        )
        found = [d for d in status["deployments"] if d["deployment"] == "default/digits"]
        states = [r["state"] for d in found for r in d["replicas"]]
        levels = {r["level"] for d in found for r in d["routers"]}
        return (len(status["nodes"]), states, levels) == (3, ["active", "active"], {"table"})

    wait_for(is_shown, 30, "three nodes, two active replicas, routers that go by a table")
    shown = subprocess.run(run, env=env, capture_output=True, check=True, timeout=60, text=True).stdout
    assert "default/digits" in shown


def test_explain_tells_of_a_request_that_is_asked_for_in_advance_and_of_its_replica(serving):
    _, url, page, env, _ = serving
    body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}]}
    get(f"{url}/v2/models/digits/infer", body)
    command = [sys.executable, "-m", "serve_app", "explain", "--request", "mine", "--wait", "60s", "--json"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as asking:
        while asking.poll() is None:  # until the routers know of the question and one of these is kept
            get(f"{url}/v2/models/digits/infer", body, {"X-Request-ID": "mine"})
            time.sleep(0.2)
        told = json.loads(asking.stdout.read())
    decision = told["decisions"][0]
    assert (decision["request_id"], decision["deployment"]) == ("mine", "default/digits")
    assert decision["chosen"] in {c["replica_id"] for c in decision["candidates"]}
    why = run_in(env, "explain", "--replica", decision["chosen"])
    assert (why.returncode, why.stderr) == (0, "")
    assert "It may get any request" in why.stdout
    asked = json.loads(get(f"{page}/api/explain?what=replica&target={decision['chosen']}"))
    assert asked["state"] == "active"


def run_in(env, *arguments):
    command = [sys.executable, "-m", "serve_app", *arguments]
    return subprocess.run(command, env=env, capture_output=True, timeout=60, text=True, check=False)


def test_watch_goes_on_until_ctrl_c_and_ends_well(serving, tmp_path):
    *_, env, _ = serving
    with (tmp_path / "out").open("w+") as out:
        command = [sys.executable, "-m", "serve_app", "status", "--watch"]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        wait_for(lambda: (tmp_path / "out").read_text().count("Nodes: ") >= 2, 60, "it shows the status twice")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_an_order_by_a_short_id_is_written_down_and_an_unknown_one_ends_with_1(serving):
    *_, env, _ = serving

    def nodes():
        return [n for n in json.loads(run_in(env, "nodes", "--json").stdout)["nodes"] if n["replicas"]]

    wait_for(lambda: nodes()[0]["state"] == "ok", 60, "a node with a forecast")
    node = nodes()[0]
    done = [
        run_in(env, what, node["node_id"][:12], *more)
        for what, *more in (["announce", "--for", "9m"], ["announce", "--cancel"])
    ]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    unknown = run_in(env, "drain", "nowhere")
    assert unknown.returncode == 1
    assert len(unknown.stderr.strip().splitlines()) == 1
    written = [
        json.loads(line) for line in (Path(env["XDG_STATE_HOME"]) / "shadecast/audit.jsonl").read_text().splitlines()
    ]
    assert [(each["order"], each["outcome"]) for each in written[-2:]] == [("announce", "done"), ("cancel", "done")]
    assert {each["target"] for each in written[-2:]} == {node["node_id"]}
    assert {each["who"]["by"] for each in written[-2:]} == {"command line"}


def test_no_process_of_the_cluster_has_the_token_and_no_output_shows_it(serving):
    process, *_, log = serving
    assert TOKEN not in log.read_text()
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) > 5
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert TOKEN not in " ".join(each.cmdline())
            assert TOKEN not in each.environ().values()
    for file in Path(ray_session(started)).rglob("*"):
        if file.is_file() and file.stat().st_size < 10_000_000:
            assert TOKEN.encode() not in file.read_bytes(), file


def ray_session(processes):
    """The folder of Ray's logs, as its own processes name it."""
    words = [word for each in processes if each.is_running() for word in each.cmdline()]
    return next(
        word.partition("=")[2] for word in words if word.startswith(("--log_dir=", "--logs-dir=", "--logs_dir="))
    )


def test_the_page_shows_the_same_and_takes_orders_only_with_the_token(serving):
    _, _, page, *_ = serving
    assert b"<html" in get(page + "/").lower()
    status = json.loads(get(page + "/api/status"))
    replica = status["deployments"][0]["replicas"][0]["replica_id"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(page + "/api/drain", {"target": replica})
    assert refused.value.code == 401
    get(page + "/api/drain", {"target": replica}, {"Authorization": f"Bearer {TOKEN}"})

    def drained():
        replicas = json.loads(get(page + "/api/status"))["deployments"][0]["replicas"]
        return {r["replica_id"]: r["state"] for r in replicas}[replica] in ("draining", "inactive")

    wait_for(drained, 20, "the replica drains")
    get(page + "/api/release", {"target": replica}, {"Authorization": f"Bearer {TOKEN}"})


# ---------------------------------------------------------------- what README and docs tell to do


@pytest.fixture(scope="module")
def reader(serving, grpc_port, tmp_path_factory):
    """Runs a block as its reader would, who has the files of the pages; tells what was printed."""
    _, url, page, env, log = serving
    folder = tmp_path_factory.mktemp("reader")
    for block in (block for name in pages() for block in blocks(name)):
        if block.language == "python" and (name := module_name(block)):
            (folder / f"{name}.py").write_text(block.text)
    state = folder / ".local/state/shadecast"
    state.mkdir(parents=True)
    (state / "operate-token").write_text(TOKEN)
    address = next(line.partition("RAY_ADDRESS=")[2] for line in log.read_text().splitlines() if "RAY_ADDRESS=" in line)
    bin_first = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    token = env.get(
        "RAY_AUTH_TOKEN_PATH", str(Path.home() / ".ray" / "auth_token")
    )  # the cluster's, in its starter's home
    ours = {**env, "PATH": bin_first, "HOME": str(folder), "RAY_ADDRESS": address.strip(), "RAY_AUTH_TOKEN_PATH": token}

    def run(block):
        status = json.loads(get(page + "/api/status"))
        digits = next(each for each in status["deployments"] if each["deployment"] == "default/digits")
        meant = {
            "localhost:8000": url.removeprefix("http://"),
            "localhost:9000": f"localhost:{grpc_port}",
            "localhost:8266": page.removeprefix("http://"),
            "127.0.0.1:8266": page.removeprefix("http://"),
            "seq 3000": "seq 20",
            "REPLICA": digits["replicas"][0]["replica_id"],
            "NODE": status["nodes"][0]["node_id"],
        }
        text = block.text
        for written, here in meant.items():
            text = text.replace(written, here)
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
        return subprocess.run(
            [*command, text], env=ours, cwd=folder, capture_output=True, timeout=120, text=True, check=False
        )

    return run


SERVED = [pytest.param(block, id=block.where) for block in served("docs/try.md", "docs/adopt.md")]


@pytest.mark.parametrize("block", SERVED)
def test_what_the_documentation_says_to_run_runs_and_prints_what_it_says(reader, block):
    tools = {command[0] for command in commands(block.text)} if block.language == "sh" else set()
    if missing := [tool for tool in tools & {"curl", "jq"} if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)}: not installed")
    ran = reader(block)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert '{"error"' not in ran.stdout, ran.stdout
    told = "".join(ran.stdout.split())
    for line in block.text.splitlines():
        if line.startswith("# ") and not line.endswith(".py"):
            assert "".join(line.removeprefix("# ").split()) in told, ran.stdout
    if "--request my-test" in block.text:
        assert "my-test: predict of mine/Model" in ran.stdout, ran.stdout + ran.stderr


def test_up_says_which_options_a_control_plane_that_runs_was_not_started_with(serving, tmp_path):
    *_, env, _ = serving
    told = run_in(env, "up", "--telemetry-log", str(tmp_path), "--link-bytes-per-s", "0")
    assert told.returncode == 0, told.stderr
    assert "--telemetry-log not taken" in told.stderr
    assert "link" not in told.stderr


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = subprocess.run(
            [sys.executable, "-m", "serve_app", "serve", "--port", port],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1
    assert port in ran.stderr


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--model", "nowhere:Class", ["model", "nowhere"]), ("--router", "magic", ["router", "magic", "predictive"])],
)
def test_a_wrong_argument_stops_the_start_with_one_line(option, value, words):
    command = [sys.executable, "-m", "serve_app", "serve", option, value]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    for word in words:
        assert word in ran.stderr


def test_ctrl_c_stops_everything_that_was_started(serving):
    process, url, _, _, log = serving
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) > 5
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, log.read_text()
    deadline_s = time.monotonic() + 20
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    left = [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
    with pytest.raises(urllib.error.URLError):
        get(url + "/v2/health/live")
    assert "Traceback" not in log.read_text()
