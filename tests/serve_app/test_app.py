"""Arguments and model classes: what `build` takes, what it refuses in one line, what it deploys."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from serve_app.app import ROUTER_CLASS, AppArgs, ArgumentError, build, router_config
from serve_app.gateway.model_server import ModelInfo, ModelServer, Refusal, load_class
from serve_app.gateway.tensors import TensorSpec
from serve_app.protocol_error import InvalidInput
from shadecast.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Doubler:
    """A user's model: nothing of this project in it."""

    inputs = (("x", "FP64", [-1]), {"name": "flag", "datatype": "BOOL", "shape": [1]})
    outputs = (("y", "FP64", [-1]),)
    version = "7"

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * self.factor}


class Writer:
    """A user's model that only generates, and may not be called twice."""

    safe_to_repeat = False

    def generate(self, request: dict[str, Any]) -> Iterator[str]:
        yield from request["text_input"].split()


class Odd:
    """Other shapes that a model's methods may have."""

    async def infer(self, inputs: dict[str, Any], parameters: dict[str, Any]) -> Any:
        if parameters.get("refuse"):
            raise InvalidInput("not this")
        if parameters.get("wait"):
            await asyncio.Event().wait()
        return parameters.get("answer", {"thread": [threading.current_thread() is threading.main_thread()]})

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[Any]:
        yield 1
        raise InvalidInput("no more")


class Counter:
    """Goes on with a stream after what another replica has given."""

    def generate(self, request: dict[str, Any], had: Sequence[str] = ()) -> Iterator[str]:
        yield from (f"{i} after {list(had)}" for i in range(len(had), request["up_to"]))


class Slow:
    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"main": np.array([threading.current_thread() is threading.main_thread()])}


class Nothing:
    pass


def path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__name__}"


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"replicas": "0"}, "replicas = '0': input should be greater than or equal to 1"),
        ({"replicas": "many"}, "replicas = 'many': input should be a valid integer"),
        ({"replica": 3}, "replica = 3: unknown argument; known are"),
        ({"router": "fast"}, "router = 'fast': input should be 'predictive' or 'default'"),
        ({"request_timeout_s": "nan"}, "request_timeout_s = 'nan': input should be a finite number"),
        ({"request_timeout_s": 0}, "request_timeout_s = 0: input should be greater than 0"),
        ({"max_body_bytes": 10}, "max_body_bytes = 10: input should be greater than or equal to 1024"),
        ({"retry_fraction": 2}, "retry_fraction = 2: input should be less than or equal to 1"),
        ({"session_cookie": "a b"}, "session_cookie = 'a b'"),
        ({"allow_origins": "app.example.org"}, "allow_origins = 'app.example.org': 'app.example.org' is no origin"),
        ({"allow_origins": ["https://a.org/path"]}, "'https://a.org/path' is no origin: give e.g. https://"),
        ({"config": "{"}, "config = '{': must be a mapping, as JSON on the command line"),
        ({"config": {"balance": {"slots": -1}}}, "balance.slots = -1: must be a number from 0 to 4096"),
        ({"config": {"balanse": {}}}, "balanse = {}: unknown section"),
        ({"config": {"trial": {"copy_methods": "infer"}}}, "must be a list of method names"),
        (
            {"config": {"balance": {"resume": "had"}}},
            "balance.resume = 'had': leave it out; a model whose `generate` has",
        ),
        (
            {"model": path(Counter), "config": {"balance": {"resume": "after"}}},
            "balance.resume = 'after': leave it out; a model whose `generate` has a parameter `had` has it set",
        ),
        ({"autoscaling": {"min_replicas": 5, "max_replicas": 2}}, "max_replicas (2) must be greater"),
        ({"autoscaling": {"max_replica": 5}}, "max_replica: unknown setting of Serve's autoscaling; known are aggreg"),
        ({"model": "digit"}, "model = 'digit': must be one of digits, or 'module:Class'"),
        ({"model": "no_such_module:X"}, "no module 'no_such_module' on the import path"),
        ({"model": "json.nothing:X"}, "no module 'json.nothing' on the import path"),
        ({"model": "json:Nothing"}, "module json has no class 'Nothing'"),
        ({"model": "json:dumps"}, "module json has no class 'dumps'"),
        ({"model": path(Nothing)}, "Nothing: needs a method `infer(inputs"),
        ({"model_name": "a/b"}, "model_name = 'a/b'"),
    ],
)
def test_a_wrong_argument_stops_the_start_with_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        build(AppArgs.model_validate(given))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_from_the_command_line_is_enough() -> None:
    args = AppArgs.model_validate({"replicas": "3", "config": '{"trial": {"margin": 1.2}}', "num_cpus": "0.25"})
    assert (args.replicas, args.num_cpus, args.config) == (3, 0.25, {"trial": {"margin": 1.2}})


def test_serve_run_prints_the_line_and_nothing_else() -> None:
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "serve_app.app:build", "replicas=0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == ("Error: replicas = '0': input should be greater than or equal to 1")
    assert "Traceback" not in done.stderr


def test_every_argument_is_documented() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    assert [name for name in AppArgs.model_fields if f"`{name}`" not in text and f"`{name}=" not in text] == []


def deployments(**given: Any) -> dict[str, Any]:
    app = build(AppArgs.model_validate(given))
    gateway = app._bound_deployment
    model = gateway.init_args[0]._bound_deployment
    return {"gateway": gateway, "model": model}


def test_the_default_application_routes_the_model_hop_and_declares_inference_safe_to_copy() -> None:
    model = deployments()["model"]
    router = model._deployment_config.request_router_config
    assert router.request_router_class == ROUTER_CLASS
    assert router.request_router_kwargs == {"config": {"trial": {"copy_methods": ["infer"]}}}
    assert model.name == "digits"


def test_the_gateway_takes_no_cpu_and_serves_own_router_is_one_word_away() -> None:
    built = deployments(router="default", replicas=4, max_ongoing_requests=3)
    assert built["gateway"].ray_actor_options["num_cpus"] == 0
    assert "PredictiveRouter" not in str(built["model"]._deployment_config.request_router_config.request_router_class)
    assert built["model"]._deployment_config.max_ongoing_requests == 3
    assert built["model"].num_replicas == 4


def test_what_the_user_says_about_copies_goes_before_the_default() -> None:
    info = ModelInfo.of(Doubler)
    assert router_config({"trial": {"copy_methods": []}}, info)["trial"]["copy_methods"] == []
    assert router_config({"trial": {"margin": 1.3}}, info)["trial"] == {"margin": 1.3, "copy_methods": ["infer"]}
    assert router_config({}, ModelInfo.of(Writer)) == {}


def test_the_example_config_file_is_valid() -> None:
    document = yaml.safe_load((ROOT / "examples" / "serve_config.yaml").read_text())
    (application,) = document["applications"]
    assert application["import_path"] == "serve_app.app:build"
    build(AppArgs.model_validate(application["args"]))


def test_the_gateway_and_the_application_load_no_torch_and_no_foreign_names() -> None:
    """A user's application may have folders named `models` and `train` of its own."""
    code = (
        "import sys; import serve_app.gateway.ingress, serve_app.app; "
        "print([m for m in ('torch', 'models', 'train', 'actors', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- model classes


def test_a_class_is_read_with_what_it_declares() -> None:
    info = ModelInfo.of(Doubler, "doubler-prod")
    assert info.name == "doubler-prod"
    assert info.version == "7"
    assert info.inputs == (TensorSpec("x", "FP64", (-1,)), TensorSpec("flag", "BOOL", (1,)))
    assert (info.infers, info.generates, info.safe_to_repeat) == (True, False, True)
    assert (ModelInfo.of(Writer).generates, ModelInfo.of(Writer).safe_to_repeat) == (True, False)


@pytest.mark.parametrize(
    "declared", [[("x",)], [("x", "FP8", [1])], [("x", "FP32", [-2])], [("", "FP32", [1])], 3, ["x"],
                 [("x", "FP32", [1]), ("x", "FP32", [2])]]
)  # fmt: skip
def test_wrong_declarations_are_named(declared: Any) -> None:
    wrong = type("Wrong", (Doubler,), {"inputs": declared})
    with pytest.raises(ConfigError, match=r"Wrong\.inputs"):
        ModelInfo.of(wrong)


def test_a_class_whose_module_cannot_import_something_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing needs_more needs 'not_installed_anywhere'"):
        load_class("needs_more:Model")


def test_constructor_arguments_reach_the_class_and_lists_become_arrays() -> None:
    server = ModelServer(path(Doubler), {"factor": 3.0})
    answer = asyncio.run(server.infer({"x": np.array([1.0])}))
    assert isinstance(answer, dict)
    assert answer["y"].tolist() == [3.0]


def test_a_blocking_model_runs_in_a_thread_and_an_asynchronous_one_does_not() -> None:
    assert asyncio.run(ModelServer(path(Slow)).infer({}))["main"].tolist() == [False]  # type: ignore[index]
    assert asyncio.run(ModelServer(path(Odd)).infer({}))["thread"].tolist() == [True]  # type: ignore[index]


def test_invalid_input_is_a_value_not_a_failure_of_the_replica() -> None:
    assert asyncio.run(ModelServer(path(Odd)).infer({}, {"refuse": True})) == Refusal("not this")


def test_a_model_that_overruns_the_clients_time_is_stopped() -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(ModelServer(path(Odd)).infer({}, {"wait": True}, budget_s=0.01))


def test_a_model_that_returns_no_dict_is_told_so() -> None:
    with pytest.raises(TypeError, match="must return a dict of arrays"):
        asyncio.run(ModelServer(path(Odd)).infer({}, {"answer": [1]}))


def test_streams_of_both_kinds_are_passed_on() -> None:
    async def drain(server: ModelServer, request: dict[str, Any]) -> list[Any]:
        return [item async for item in server.generate(request)]

    assert asyncio.run(drain(ModelServer(path(Writer)), {"text_input": "a b"})) == ["a", "b"]
    assert asyncio.run(drain(ModelServer(path(Odd)), {})) == [1, Refusal("no more")]


def test_a_model_whose_generate_takes_what_was_had_has_its_streams_go_on_elsewhere() -> None:
    async def drain(**had: Any) -> list[Any]:
        return [item async for item in ModelServer(path(Counter)).generate({"up_to": 3}, **had)]

    assert asyncio.run(drain()) == [f"{i} after []" for i in range(3)]
    assert asyncio.run(drain(had=["a", "b"])) == ["2 after ['a', 'b']"]
    assert router_config({}, ModelInfo.of(Counter)) == {"balance": {"resume": "had"}}
    assert router_config({"balance": {"slots": 1}}, ModelInfo.of(Writer)) == {"balance": {"slots": 1}}
