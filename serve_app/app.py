"""The Serve application: `serve run serve_app.app:build model=digits replicas=3`, or `serve deploy` with a config file.

No `from __future__ import annotations` here: Serve reads the annotation of `build` to find the argument model.
"""

import dataclasses
import json
import os
import re
from typing import Annotated, Any, Literal, Self

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from serve_app.gateway.ingress import SESSION_HEADER, Gateway, GatewaySettings
from serve_app.gateway.model_server import BUILT_IN, RESUME, ModelInfo, ModelServer, import_folder, load_class
from serve_app.ray_api import rejecting
from shadecast.config import Config
from shadecast.errors import ConfigError

GATEWAY = "Gateway"
ROUTER_CLASS = "serve_app.router:PredictiveRouter"
COPY_METHODS = ("infer",)
"""Safe to call twice, as the contract of a model's `infer` says; the class's `safe_to_repeat = False` takes it back."""

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class ArgumentError(ConfigError, click.ClickException):
    """A wrong argument: one line on `serve run`, without a traceback."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


class AppArgs(BaseModel):
    """Arguments of `build`. From the command line all values are text: mappings are given as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field("digits", description="'digits', or 'module:Class' of a class of yours")
    model_name: str | None = Field(None, description="in URLs; default: the class's `name`")
    model_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")
    replicas: int = Field(2, ge=1, le=10_000, description="replicas of the model")
    autoscaling: dict[str, Any] | None = Field(None, description="Serve's autoscaling_config, instead of replicas")
    num_cpus: float = Field(0.5, ge=0, le=4096, description="cores that each replica reserves")
    num_gpus: float = Field(0, ge=0, le=64, description="GPUs that each replica reserves")
    max_replicas_per_node: int | None = Field(None, ge=1, le=100, description="spreads replicas over nodes")
    max_ongoing_requests: int = Field(8, ge=1, le=100_000, description="requests under way on one replica")
    max_queued_requests: int = Field(256, ge=1, le=1_000_000, description="waiting in a gateway; more get a 503")
    gateway_replicas: int = Field(1, ge=1, le=1000, description="replicas of the gateway")
    gateway_max_ongoing_requests: int = Field(512, ge=1, le=100_000, description="requests under way in one gateway")
    router: Literal["predictive", "default"] = Field("predictive", description="'default' is Serve's own")
    config: dict[str, Any] = Field(default_factory=dict, description="sections of shadecast.config.Config")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, le=2**31, description="of one request, also decompressed")
    max_total_body_bytes: int = Field(512 * 2**20, ge=1024, le=2**40, description="of all requests in one gateway")
    body_idle_timeout_s: Seconds = Field(10.0, description="for the next bytes of a request's body")
    request_timeout_s: Seconds = Field(60.0, description="for an answer, or the next item of a stream")
    queue_timeout_s: Seconds = Field(10.0, description="for a replica to have room; then a 503")
    stream_keepalive_s: float = Field(
        0, ge=0, le=3600, allow_inf_nan=False, description="streams answer at once, with comments this often; 0 is off"
    )
    retry_fraction: float = Field(0.2, ge=0, le=1, description="retries as a fraction of requests")
    session_cookie: str = Field("", pattern=r"^[A-Za-z0-9_.-]{0,64}$", description="cookie that holds a session's id")
    allow_origins: tuple[str, ...] = Field((), description="whose pages may call from a browser; '*' is all")
    access_log: bool = Field(False, description="a log line for every request, from Serve; costs time on each")
    graceful_shutdown_timeout_s: Seconds = Field(60.0, description="for live requests and streams to finish")

    @field_validator("model_args", "autoscaling", "config", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"must be a mapping, as JSON on the command line: {error}") from None

    @field_validator("allow_origins", mode="before")
    @classmethod
    def _origins(cls, value: Any) -> Any:
        origins = [each.strip() for each in value.split(",")] if isinstance(value, str) else value
        for origin in origins if isinstance(origins, (list, tuple)) else ():
            if not re.fullmatch(r"\*|https?://[^/\s*]+", str(origin)):
                raise ValueError(f"{origin!r} is no origin: give e.g. https://app.example.org, or *")
        return origins

    @field_validator("autoscaling")
    @classmethod
    def _for_serve(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value:
            if unknown := sorted(value.keys() - AutoscalingConfig.model_fields.keys()):  # Serve passes them over
                known = ", ".join(sorted(AutoscalingConfig.model_fields))
                raise ValueError(f"{unknown[0]}: unknown setting of Serve's autoscaling; known are {known}")
            try:
                AutoscalingConfig(**value)
            except ValidationError as error:
                raise ValueError(_one_line(error)) from None
        return value

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Validates plain values; raises ArgumentError, one line with field, value and bound."""
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise ArgumentError(_one_line(error)) from None


def build(args: AppArgs) -> Application:
    """The application: `Gateway` before `ModelServer`. Raises ArgumentError before anything is deployed."""
    try:
        info = ModelInfo.of(load_class(args.model), args.model_name)
        config = router_config(args.config, info)
    except ConfigError as error:
        raise ArgumentError(str(error)) from error.__cause__
    common = {
        "graceful_shutdown_timeout_s": args.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"enable_access_log": args.access_log},
    }
    scale = {"autoscaling_config": args.autoscaling} if args.autoscaling else {"num_replicas": args.replicas}
    router = {"request_router_config": _router(config)} if args.router == "predictive" else {}
    model = serve.deployment(ModelServer).options(
        name=_deployment_name(info),
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_replicas_per_node=args.max_replicas_per_node,
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        **scale,
        **router,
        **common,
    )
    gateway = serve.deployment(Gateway).options(
        name=GATEWAY,
        ray_actor_options={"num_cpus": 0},
        num_replicas=args.gateway_replicas,
        max_ongoing_requests=args.gateway_max_ongoing_requests,
        max_queued_requests=args.gateway_max_ongoing_requests,
        **rejecting(retry_after_s=1),
        **common,
    )
    server = model.bind(args.model, args.model_args, args.max_ongoing_requests, import_folder(args.model))
    served: Application = gateway.bind(server, info, _settings(args))
    return served


def router_config(given: dict[str, Any], info: ModelInfo) -> dict[str, Any]:
    """The router's configuration with what the model's class says filled in; raises ConfigError if it is not valid."""
    asked = Config.from_mapping(given).balance.resume
    if asked and not (info.resumes and asked == RESUME):
        raise ConfigError(
            f"balance.resume = {asked!r}: leave it out; a model whose `generate` has a parameter `{RESUME}` has it set"
        )
    sections = {name: dict(given.get(name) or {}) for name in {*given, "trial", "balance"}}
    if info.safe_to_repeat and info.infers:
        sections["trial"].setdefault("copy_methods", list(COPY_METHODS))
    if info.resumes:
        sections["balance"].setdefault("resume", RESUME)
    return {name: values for name, values in sections.items() if values}


def _router(config: dict[str, Any]) -> RequestRouterConfig:
    return RequestRouterConfig(request_router_class=ROUTER_CLASS, request_router_kwargs={"config": config})


def _deployment_name(info: ModelInfo) -> str:
    kept = "".join(char if char.isalnum() or char in "-_" else "-" for char in info.name)
    return "Model" if kept == GATEWAY else kept


def _settings(args: AppArgs) -> GatewaySettings:
    names = [field.name for field in dataclasses.fields(GatewaySettings) if field.name in AppArgs.model_fields]
    header = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", SESSION_HEADER)
    to_zero = (args.autoscaling or {}).get("min_replicas", 1) == 0
    given = {name: getattr(args, name) for name in names}
    return GatewaySettings(**given, session_header=header, scales_to_zero=to_zero)


def _one_line(error: ValidationError) -> str:
    """The first finding as `field = value: bound`."""
    found = error.errors()[0]
    field = ".".join(str(part) for part in found["loc"]) or "arguments"
    if found["type"] == "extra_forbidden":
        return f"{field} = {found['input']!r}: unknown argument; known are {', '.join(sorted(AppArgs.model_fields))}"
    reason = found["msg"].removeprefix("Value error, ")
    return f"{field} = {found['input']!r}: {reason[0].lower()}{reason[1:]}"


__all__ = ["BUILT_IN", "AppArgs", "ArgumentError", "build"]
