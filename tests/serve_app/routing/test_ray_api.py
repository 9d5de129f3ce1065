"""What we use of Ray's alpha and private router API, one claim each: when Ray moves, these say what broke."""

import inspect
from importlib.metadata import version

import pytest
import ray
from ray.serve._private import replica_result
from ray.serve._private.request_router import request_router as module
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.router import AsyncioRouter
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter

from serve_app.router import PredictiveRouter

SUPPORTED = (2, 60)


def test_this_is_a_supported_ray():
    found = tuple(int(part) for part in version("ray").split(".")[:2])
    assert found == SUPPORTED, (
        f"Ray {found} is not supported yet: run the tests, then widen pyproject.toml and SUPPORTED"
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("__init__", ["deployment_id", "handle_source", "use_replica_queue_len_cache"]),
        ("initialize_state", []),
        ("choose_replicas", ["candidate_replicas", "pending_request"]),
        ("on_request_routed", ["pending_request", "replica_id", "result"]),
        ("on_request_completed", ["replica_id", "internal_request_id"]),
        ("on_replica_actor_died", ["replica_id"]),
        ("update_replicas", ["replicas"]),
        ("_add_pending_request_to_indices", ["pending_request"]),
        ("_remove_pending_request_from_indices", ["pending_request"]),
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
    for method in ("choose_replicas", "on_request_routed", "on_request_completed", "update_replicas"):
        ours, theirs = (
            list(inspect.signature(getattr(k, method)).parameters) for k in (PredictiveRouter, RequestRouter)
        )
        assert ours == theirs, f"{method}: Serve passes {theirs}, PredictiveRouter takes {ours}"


@pytest.mark.parametrize(
    ("where", "text", "why"),
    [
        (AsyncioRouter._route_and_send_request_once, "on_request_routed(", "outcomes start there"),
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


def test_a_router_still_keeps_what_we_read():
    source = inspect.getsource(module)
    for name in (
        *("_replicas", "_replicas_list", "_replica_queue_len_cache", "_event_loop", "_deployment_id"),
        *("_pending_requests_to_route", "num_routing_tasks_in_backoff"),
    ):
        assert f"self.{name}" in source or f"def {name}(" in source, f"RequestRouter.{name} is gone"
    for name in ("_prefer_local_node_routing", "_prefer_local_az_routing", "_self_node_id", "_self_availability_zone"):
        assert f"self.{name}" in source, f"LocalityMixin.{name} is gone"


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


def test_an_object_can_still_be_looked_at_without_fetching_it():
    core_worker = (
        ray._private.worker.CoreWorker if hasattr(ray._private.worker, "CoreWorker") else ray._raylet.CoreWorker
    )
    for name in ("get_local_object_locations", "get_objects"):
        assert hasattr(core_worker, name), f"CoreWorker.{name} is gone: outcomes are watched the slower way"
    assert hasattr(ray.ObjectRef, "_on_ready"), "ObjectRef._on_ready is gone: outcomes are watched the slower way"
    assert hasattr(ray.ObjectRef, "_on_completed"), "ObjectRef._on_completed is gone: errors of user code go unseen"


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
    from ray.serve._private.common import RequestMetadata  # noqa: PLC0415

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
