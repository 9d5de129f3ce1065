"""What we use of Ray's alpha and private router API, one claim each: when Ray moves, these say what broke."""

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import ray
from ray.serve._private import controller, replica_result
from ray.serve._private.common import RequestMetadata
from ray.serve._private.request_router import request_router as module
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.router import AsyncioRouter
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator
from ray.serve.request_router import LocalityMixin, MultiplexMixin, PendingRequest, RequestRouter

from serve_app import ray_api
from serve_app.router import ObservingRouter, PredictiveRouter
from serve_app.routing import request_router

RAY = tuple(int(part) for part in version("ray").split(".")[:2])
SUPPORTED = [(2, minor) for minor in range(57, 61)]
ROOT = Path(__file__).resolve().parents[2]
ROUTER_SOURCE = "".join(
    map(inspect.getsource, (module, inspect.getmodule(LocalityMixin), inspect.getmodule(MultiplexMixin)))
)
RESULT_SOURCE = inspect.getsource(replica_result.ActorReplicaResult)
CORE_WORKER = getattr(ray._private.worker, "CoreWorker", None) or ray._raylet.CoreWorker


def is_set_by(source):
    return lambda name: f"self.{name} " in source or f"self.{name}:" in source or f"def {name}(" in source


def has(owner):
    return lambda name: hasattr(owner, name)


CLAIMS = {
    # what `serve_app/ray_api.py` names: whether Ray still has it, and what we need it for
    "_common": (has(ray), "the control plane is pinned to the head"),
    "HEAD_NODE_RESOURCE_NAME": (lambda _: ray_api.HEAD_NODE_RESOURCE.startswith("node:"), "the same"),
    "_internal_kv_get": (has(ray.experimental.internal_kv), "the secret that session ids are hashed with"),
    "_internal_kv_put": (has(ray.experimental.internal_kv), "the same"),
    "internal_kv": (has(ray.experimental), "the same, and operators' holds"),
    "internal_kv_get_gcs_client": (has(ray.experimental.internal_kv), "nodes that Ray is about to take away"),
    "get_draining_nodes": (
        lambda name: hasattr(ray._raylet.InnerGcsClient, name) or hasattr(ray._private.state.state, name),
        "the same",
    ),
    "_private": (has(ray), "where Serve's router lives"),
    "_get_serve_request_context": (has(ray.serve.context), "calls that one request makes are known by its id"),
    "_get_serve_batch_request_context": (has(ray.serve.context), "the same, for batches"),
    "_internal_request_id": (lambda _: ray_api.current_request_ids() == [""], "the same"),
    "_init": (has(ray.serve.handle.DeploymentHandle), "a gateway routes in its own loop"),
    "_choose_replica_for_request": (has(RequestRouter), "the usual choice is made at once"),
    "_get_pending_request_matching_internal_request_id": (has(RequestRouter), "calls of one request share its id"),
    "_record_queue_wait_time": (has(RequestRouter), "Serve's metric of the time in the queue stays true"),
    "_fulfill_pending_requests": (has(RequestRouter), "before Ray 2.60 its tasks drop requests"),
    "_cancel_routing_task_for_pending_request": (
        lambda name: hasattr(RequestRouter, name) or RAY < (2, 60),
        "from then on they do not",
    ),
    "_get_next_pending_request_to_route": (has(RequestRouter), "our own such task"),
    "_choose_replicas_with_backoff": (has(RequestRouter), "the same"),
    "_select_from_candidate_replicas": (has(RequestRouter), "the same"),
    "_fulfill_next_pending_request": (has(RequestRouter), "the same"),
    "_maybe_start_routing_tasks": (has(RequestRouter), "the same"),
    "_routing_tasks": (is_set_by(ROUTER_SOURCE), "the same"),
    "_pending_requests_to_fulfill": (is_set_by(ROUTER_SOURCE), "the same"),
    "_pending_requests_to_route": (is_set_by(ROUTER_SOURCE), "who waits is served first"),
    "_event_loop": (is_set_by(ROUTER_SOURCE), "callbacks of other threads come back to it"),
    "_deployment_id": (is_set_by(ROUTER_SOURCE), "reports are by deployment"),
    "_replica_queue_len_cache": (is_set_by(ROUTER_SOURCE), "a full replica is not sent more"),
    "_prefer_local_node_routing": (is_set_by(ROUTER_SOURCE), "Serve's locality is kept"),
    "_prefer_local_az_routing": (is_set_by(ROUTER_SOURCE), "the same"),
    "_self_node_id": (is_set_by(ROUTER_SOURCE), "the same"),
    "_self_availability_zone": (is_set_by(ROUTER_SOURCE), "the same"),
    "_by_reference": (has(RequestMetadata("r", "i")), "how an answer can be watched"),
    "_reserved_slot_token": (has(RequestMetadata("r", "i")), "a reserved place is another's"),
    "_get_replica_wrapper": (has(RunningReplica), "large copies are sent from a thread"),
    "_on_ready": (
        lambda name: hasattr(ray.ObjectRef, name) or RAY < (2, 60),
        "outcomes without fetching answers; before Ray 2.60 the end of the call tells",
    ),
    "_obj_ref_gen": (is_set_by(RESULT_SOURCE), "before Ray 2.60 an answer's object is looked at ahead of its caller"),
    "_obj_ref": (is_set_by(RESULT_SOURCE), "the same"),
    "_is_streaming": (is_set_by(RESULT_SOURCE), "the same"),
    "_get_next_ref_n": (has(ray.ObjectRefGenerator), "the same"),
    "_on_completed": (has(ray.ObjectRef), "errors of user code"),
    "_fetch_future_result_async": (
        lambda name: hasattr(DeploymentResponse, name) and hasattr(DeploymentResponseGenerator, name),
        "the gateway times acceptance apart from the answer",
    ),
    "core_worker": (
        lambda _: all(map(has(CORE_WORKER), ("get_local_object_locations", "get_objects"))),
        "where an answer lies",
    ),
    "get_deployment_config": (has(controller.ServeController), "settings that `serve deploy` changes"),
}


def names_of(path):
    """Every name that a file reads of something, and whether of `self`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for name in [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]:
                yield from ((part, False) for part in name.split("."))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value, False


def is_private(name):
    return name.startswith("_") and not name.endswith("_")


def test_every_private_name_of_ray_has_a_claim():
    used = {name for name, _ in names_of(Path(ray_api.__file__)) if is_private(name)}
    assert used == {name for name in CLAIMS if is_private(name)}


@pytest.mark.parametrize("name", CLAIMS)
def test_ray_still_has(name):
    there, why = CLAIMS[name]
    assert there(name), f"{name} is gone or means something else: {why}; mend it in serve_app/ray_api.py"


def test_no_other_file_touches_what_is_private_to_ray():
    product = [
        path for room in ("shadecast", "models", "actors", "serve_app", "train") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(product) > 50
    for path in product:
        if path != Path(ray_api.__file__):
            foreign = {name for name, own in names_of(path) if is_private(name) and not own and name in CLAIMS}
            assert not foreign, f"{path}: {foreign}"
            text = path.read_text(encoding="utf-8")
            imported = {
                f"{node.module}.{alias.name}"
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.ImportFrom) and node.module
                for alias in node.names
            }
            theirs = {name for name in imported if name.split(".")[0] == "ray"}
            assert not {name for name in theirs if any(is_private(part) for part in name.split("."))}, path
            for where in ("ray._private", "ray.serve._private", "ray._raylet", "ray._common", "internal_kv"):
                assert where not in text, f"{path}: {where} belongs into serve_app/ray_api.py"


def test_our_router_neither_reads_nor_overwrites_a_private_name_of_serves():
    ours = {name for name, own in names_of(Path(request_router.__file__)) if own and is_private(name)}
    assert "_routes" in ours
    assert not {name for name in ours if is_set_by(ROUTER_SOURCE)(name)}


MAKE = """
import asyncio, io, logging, pickle, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]  # PYTHONPATH alone counts
from ray.serve._private.common import DeploymentHandleSource, DeploymentID

heard = io.StringIO()
logging.getLogger("ray.serve").addHandler(logging.StreamHandler(heard))

async def make(kind):
    router = kind(
        deployment_id=DeploymentID("d", "a"),
        handle_source=DeploymentHandleSource.PROXY,
        self_actor_id="a",
        use_replica_queue_len_cache=True,
    )
    router.initialize_state(config={"trial": {"margin": 1.2}})
    assert isinstance(router, kind)
    return [k.__module__ for k in type(router).__mro__]

loaded = set(sys.modules)
kind = pickle.load(sys.stdin.buffer)
assert not any(name.split(".")[0] in ("serve_app", "shadecast") for name in set(sys.modules) - loaded), "to take it"
print(*asyncio.run(make(kind)), "WARNED" if "another version" in heard.getvalue() else "")
"""


def made(router, path):
    """Modules of the classes of a router that Serve has sent by value to a process with this import path."""
    sent = RequestRouterConfig(request_router_class=router)._serialized_request_router_cls
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-P", "-c", MAKE]
    ran = subprocess.run(command, input=sent, capture_output=True, check=False, cwd=path, env=environment)
    assert ran.returncode == 0, ran.stderr.decode()
    return ran.stdout.decode().split()


@pytest.mark.parametrize("router", [PredictiveRouter, ObservingRouter])
def test_a_process_makes_a_router_of_its_own_installation(router):
    found = made(router, ROOT)
    assert "serve_app.routing.request_router" in found
    assert "WARNED" not in found


@pytest.mark.parametrize("there", ["no module", "a module of another version"])
@pytest.mark.parametrize("router", [PredictiveRouter, ObservingRouter])
def test_a_process_with_another_version_takes_the_class_says_so_and_routes_as_serve_does(router, there, tmp_path):
    for package in ("serve_app", "shadecast"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    if there == "a module of another version":
        (tmp_path / "serve_app" / "routing").mkdir()
        (tmp_path / "serve_app" / "routing" / "request_router.py").write_text("from shadecast.config import REPORT_S")
        (tmp_path / "shadecast" / "config.py").touch()
    found = made(router, tmp_path)
    assert "ray.serve._private.request_router.pow_2_router" in found
    assert found[-1] == "WARNED"


def test_this_is_a_supported_ray():
    assert RAY in SUPPORTED, f"Ray {RAY} is not supported yet: run the tests, then widen pyproject.toml and SUPPORTED"


def test_the_versions_that_are_supported_are_those_that_the_package_asks_for_and_the_docs_name():
    (ray_line,) = re.findall(r'"ray\[serve\](.*?)"', (ROOT / "pyproject.toml").read_text())
    assert ray_line == ">={}.{},<{}.{}".format(*SUPPORTED[0], SUPPORTED[-1][0], SUPPORTED[-1][1] + 1)
    rows = re.findall(r"^\| (\d+)\.(\d+)\.\d+ \|", (ROOT / "docs/adopt.md").read_text(), re.MULTILINE)
    assert sorted((int(major), int(minor)) for major, minor in rows) == SUPPORTED


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("__init__", ["deployment_id", "handle_source", "use_replica_queue_len_cache"]),
        ("initialize_state", []),
        ("choose_replicas", ["candidate_replicas", "pending_request"]),
        ("on_replica_actor_died", ["replica_id"]),
        ("update_replicas", ["replicas"]),
        ("_get_pending_request_matching_internal_request_id", ["request_metadata"]),
        ("_choose_replica_for_request", ["pending_request", "is_retry"]),
        ("_record_queue_wait_time", ["pending_request"]),
    ],
)
def test_a_router_still_has_the_hook(method, parameters):
    hook = getattr(RequestRouter, method, None)
    assert hook is not None, f"RequestRouter.{method} is gone: PredictiveRouter overrides or calls it"
    found = inspect.signature(hook).parameters
    for name in parameters:
        assert name in found, f"RequestRouter.{method} lost its parameter {name}; it has {list(found)}"


def test_the_hooks_that_serve_calls_are_those_that_the_router_overrides():
    for method in ("choose_replicas", "update_replicas"):
        ours, theirs = (
            list(inspect.signature(getattr(k, method)).parameters) for k in (PredictiveRouter, RequestRouter)
        )
        assert ours == theirs, f"{method}: Serve passes {theirs}, PredictiveRouter takes {ours}"


@pytest.mark.parametrize(
    ("where", "text", "why"),
    [
        (AsyncioRouter._route_and_send_request_once, "get_rejection_response()", "acceptance tells the queue length"),
        (RequestRouter._choose_replicas_with_backoff, "should_backoff", "full replicas must not make the loop spin"),
        (
            RequestRouter._choose_replicas_with_backoff,
            "for replicas in chosen_replicas",
            "the second rank is made lazily",
        ),
        (
            RequestRouter._fulfill_next_pending_request,
            "_get_pending_request_matching_internal_request_id",
            "shared ids",
        ),
    ],
)
def test_serve_still_does_what_we_rely_on(where, text, why):
    assert text in inspect.getsource(where), f"{where.__qualname__} no longer has `{text}`: {why}"


def test_a_running_replica_still_has_what_we_use():
    for name in ("replica_id", "node_id", "availability_zone", "max_ongoing_requests", "multiplexed_model_ids"):
        assert isinstance(getattr(RunningReplica, name, None), property), f"RunningReplica.{name} is gone"
    assert isinstance(getattr(RunningReplica, "replica_metadata", None), property), "@copy_safe needs replica_metadata"
    assert list(inspect.signature(RunningReplica.try_send_request).parameters) == ["self", "pr", "with_rejection"]
    assert hasattr(RunningReplica, "_get_replica_wrapper"), "large copies are sent from a thread through it"


@pytest.mark.parametrize("kind", [replica_result.ActorReplicaResult, replica_result.gRPCReplicaResult])
def test_a_result_still_can_be_watched(kind):
    for name in ("get", "get_async", "__next__", "__anext__", "cancel", "add_done_callback", "to_object_ref"):
        assert callable(getattr(kind, name, None)), f"{kind.__name__}.{name} is gone"
    assert inspect.iscoroutinefunction(kind.get_async), f"{kind.__name__}.get_async is no coroutine any more"
    assert inspect.iscoroutinefunction(kind.__anext__), f"{kind.__name__}.__anext__ is no coroutine any more"


def test_a_request_still_carries_what_we_read():
    fields = PendingRequest.__dataclass_fields__
    for name in ("args", "kwargs", "metadata", "future", "routing_context", "resolved"):
        assert name in fields, f"PendingRequest.{name} is gone"
    context = fields["routing_context"].default_factory()
    for name in (
        *("should_backoff", "tried_same_node", "tried_same_az"),
        *("tried_first_multiplexed_models", "tried_fewest_multiplexed_models"),
    ):
        assert hasattr(context, name), f"routing_context.{name} is gone"
    assert context.should_backoff is False, "a first try is told from a second one by it"


def test_metadata_still_says_what_a_call_is():
    metadata = RequestMetadata(request_id="r", internal_request_id="i")
    for name in (
        *("call_method", "session_id", "multiplexed_model_id", "is_streaming", "is_http_request", "is_grpc_request"),
        *("_by_reference", "tracing_context"),
    ):
        assert hasattr(metadata, name), f"RequestMetadata.{name} is gone"


def test_a_deployment_still_takes_the_router_by_its_path():
    config = RequestRouterConfig(
        request_router_class="serve_app.router:PredictiveRouter", request_router_kwargs={"config": {}}
    )
    assert config.get_request_router_class() is not None
    assert issubclass(config.get_request_router_class(), RequestRouter)


def test_the_router_can_be_configured_on_an_llm_deployment():
    try:
        from ray.serve.llm import LLMConfig  # noqa: PLC0415 - needs ray[llm], which is large
    except ImportError as missing:
        pytest.skip(f"ray[llm] is not installed: {str(missing).splitlines()[0][:100]}")
    config = LLMConfig(
        model_loading_config={"model_id": "m", "model_source": "m"},
        deployment_config={
            "request_router_config": {
                "request_router_class": "serve_app.router:PredictiveRouter",
                "request_router_kwargs": {"config": {"balance": {"batch_half": 8.0}}},
            }
        },
    )
    assert config.deployment_config["request_router_config"]


def test_the_options_of_an_llm_deployment_make_a_valid_serve_deployment():
    # what `ray.serve.llm` does with `deployment_config`: the options of an ordinary deployment, from plain values
    from ray import serve  # noqa: PLC0415

    options = {
        "max_ongoing_requests": 64,
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 4},
        "request_router_config": {
            "request_router_class": "serve_app.router:PredictiveRouter",
            "request_router_kwargs": {
                "config": {"trial": {"copy_methods": ["chat", "completions"]}, "balance": {"batch_half": 8.0}}
            },
        },
    }

    @serve.deployment
    class Server:
        pass

    made = Server.options(**options)
    assert issubclass(made._deployment_config.request_router_config.get_request_router_class(), RequestRouter)
