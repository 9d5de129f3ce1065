"""Serves one model class behind handle calls: loads `module:Class`, calls its `infer` and `generate`.

Runs in the replicas that requests are routed between. What a model class looks like is said in docs/protocol.md; it
needs nothing of this project.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import inspect
import sys
import sysconfig
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from serve_app.gateway.outputs import as_declared
from serve_app.gateway.tensors import Array, PackedBytes, RawJson, TensorSpec
from serve_app.protocol_error import InvalidInput, ProtocolError
from shadecast.errors import ConfigError

RESUME = "had"
"""Parameter of a model's `generate` that takes the items which the client has had, where it can go on after them."""
_MANY_OBJECTS = 8 * 1024
"""Elements of a BYTES output from which on it is packed: so many take 1 ms to pickle."""
BUILT_IN: Mapping[str, str] = {"digits": "serve_app.gateway.digits:Digits"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A model's answer to input that it cannot take: sent back as a value, since the replica did not fail."""

    reason: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the gateway knows about the model before any request: read from the class, not from a replica."""

    name: str
    version: str = "1"
    platform: str = "python"
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    infers: bool = True
    generates: bool = False
    safe_to_repeat: bool = True
    """Whether a request may be sent twice: copied to a replica on trial, or retried when its replica died."""
    resumes: bool = False
    """Whether another replica can go on with a stream after the items that it has given."""

    @classmethod
    def of(cls, model: type, name: str | None = None) -> Self:
        """Reads the optional class attributes; raises ConfigError where one has the wrong form."""
        infers = callable(getattr(model, "infer", None))
        generates = callable(getattr(model, "generate", None))
        if not infers and not generates:
            raise ConfigError(
                f"model = {model.__module__}:{model.__qualname__}: needs a method "
                "`infer(inputs: dict[str, ndarray]) -> dict[str, ndarray]` or `generate(request: dict)`"
            )
        return cls(
            name=_text(model, "name", model.__name__.lower()) if name is None else _checked("model_name", name),
            version=_text(model, "version", "1"),
            platform=_text(model, "platform", "python"),
            inputs=_specs(model, "inputs"),
            outputs=_specs(model, "outputs"),
            infers=infers,
            generates=generates,
            safe_to_repeat=bool(getattr(model, "safe_to_repeat", True)),
            resumes=_takes(getattr(model, "generate", None), RESUME),
        )

    def check_served(self, name: str, version: str | None) -> None:
        """Raises ProtocolError (404) for another model or version than this one; no version is any."""
        if name != self.name:
            raise ProtocolError(404, f"unknown model {name[:80]!r}; this server serves {self.name!r}")
        if version is not None and version != self.version:
            raise ProtocolError(404, f"unknown version {version[:80]!r} of {name!r}; there is {self.version!r}")

    def describe(self) -> dict[str, Any]:
        """The protocol's model metadata."""
        return {
            "name": self.name,
            "versions": [self.version],
            "platform": self.platform,
            "inputs": [spec.describe() for spec in self.inputs],
            "outputs": [spec.describe() for spec in self.outputs],
        }


def load_class(path: str) -> type:
    """The class at `module:Class` (or a built-in name). Raises ConfigError that says what is missing."""
    module_name, _, class_name = BUILT_IN.get(path, path).partition(":")
    known = ", ".join(BUILT_IN)
    if not module_name or not class_name:
        raise ConfigError(f"model = {path!r}: must be one of {known}, or 'module:Class' of a class of yours")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if path in BUILT_IN:
            raise ConfigError(
                f"model = {path!r}: the example needs {error.name!r}: pip install 'shadecast[control]', or name a "
                "class of yours as 'module:Class'"
            ) from None
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ConfigError(f"model = {path!r}: importing {module_name} needs {error.name!r}: {error}") from error
        raise ConfigError(
            f"model = {path!r}: no module {error.name!r} on the import path; start from the folder that holds it, or "
            "name that folder in the runtime environment (working_dir)"
        ) from None
    for part in class_name.split("."):
        found = getattr(found, part, None)
    found = getattr(found, "func_or_class", found)  # a class behind @serve.deployment
    if not inspect.isclass(found):
        raise ConfigError(f"model = {path!r}: module {module_name} has no class {class_name!r}")
    return found


def import_folder(path: str) -> str | None:
    """The folder from which `module:Class` was imported; None for what is installed.

    Replicas inherit the import path of whoever started Serve, not of whoever deploys, and a package of another name
    there may hide the user's. A replica on the same machine imports from this folder first; on other machines the
    code has to come with the runtime environment (`--working-dir`), as for every Serve application.
    """
    module = sys.modules[BUILT_IN.get(path, path).partition(":")[0].partition(".")[0]]
    places = [module.__file__] if module.__file__ else list(getattr(module, "__path__", ()))
    installed = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    if path in BUILT_IN or not places:
        return None
    place = Path(places[0])
    folder = str(place.parent.parent if place.name == "__init__.py" else place.parent)
    return None if folder in installed else folder


class ModelServer:
    """One replica of a model. Its methods are called by the gateway through a deployment handle."""

    def __init__(
        self,
        path: str,
        arguments: Mapping[str, Any] | None = None,
        max_ongoing: int = 8,
        folder: str | None = None,
    ) -> None:
        if folder is not None and Path(folder).is_dir():
            sys.path.insert(0, folder)
        model = load_class(path)(**dict(arguments or {}))
        self._model = model
        self._infer = getattr(model, "infer", None)
        self._generate = getattr(model, "generate", None)
        self._outputs = _specs(type(model), "outputs")
        self._with_parameters = _takes(self._infer, "parameters")
        self._resumes = _takes(self._generate, RESUME)
        self._is_async = inspect.iscoroutinefunction(self._infer)
        self._threads = ThreadPoolExecutor(max_workers=max_ongoing, thread_name_prefix="infer")

    async def infer(
        self,
        inputs: Mapping[str, Array | PackedBytes],
        parameters: Mapping[str, Any] | None = None,
        budget_s: float | None = None,
    ) -> dict[str, Array | PackedBytes] | Refusal:
        """The model's outputs for `inputs`. `budget_s` is the time left to the client when the call was sent."""
        if self._infer is None:
            raise TypeError("the model has no method infer")
        inputs = {name: await self._own(array) for name, array in inputs.items()}
        args: tuple[Any, ...] = (inputs, dict(parameters or {})) if self._with_parameters else (inputs,)
        try:
            async with asyncio.timeout(budget_s):
                if self._is_async:
                    outputs = await self._infer(*args)
                else:
                    outputs = await self._in_thread(self._infer, *args)
        except InvalidInput as error:
            return Refusal(str(error))
        arrays = as_declared(outputs, self._outputs)
        return {name: await self._light(array) for name, array in arrays.items()}

    async def _own(self, array: Array | PackedBytes) -> Array:
        """The model's own: what Ray hands out lies in memory that others read."""
        if isinstance(array, PackedBytes):
            unpacked: Array = await self._in_thread(array.unpack)
            return unpacked
        return array if not isinstance(array, np.ndarray) or array.flags.writeable else array.copy()

    async def _light(self, array: Array) -> Array | PackedBytes:
        """What the gateway takes without a stop: not a large array of objects."""
        if array.dtype.kind != "O" or array.size < _MANY_OBJECTS:
            return array
        packed: PackedBytes = await self._in_thread(PackedBytes.of, array)
        return packed

    async def generate(self, request: dict[str, Any] | RawJson, had: Sequence[Any] = ()) -> AsyncIterator[Any]:
        """The model's stream for one request, after the items `had`; a generator function or an asynchronous one."""
        if self._generate is None:
            raise TypeError("the model has no method generate")
        if isinstance(request, RawJson):
            request = await self._in_thread(request.load)
        try:
            produced = self._generate(request, **({RESUME: list(had)} if self._resumes else {}))
            if inspect.isawaitable(produced):
                produced = await produced
            if hasattr(produced, "__aiter__"):
                async for item in produced:
                    yield item
            else:
                async for item in self._drain(iter(produced)):
                    yield item
        except InvalidInput as error:
            yield Refusal(str(error))

    async def check_health(self) -> None:
        """Serve's health check: the model's own `check_health`, where it has one."""
        check = getattr(self._model, "check_health", None)
        if check is not None:
            found = check()
            if inspect.isawaitable(found):
                await found

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, call, *args)

    async def _drain(self, items: Iterator[Any]) -> AsyncIterator[Any]:
        """Items of a synchronous generator, each made in a thread."""
        end = object()
        while (item := await self._in_thread(next, items, end)) is not end:
            yield item


def _takes(method: Callable[..., Any] | None, parameter: str) -> bool:
    return callable(method) and parameter in inspect.signature(method).parameters


def _text(model: type, attribute: str, default: str) -> str:
    return _checked(f"{model.__qualname__}.{attribute}", getattr(model, attribute, default))


def _checked(field: str, value: Any) -> str:
    """A name or version as it may stand in a URL; raises ConfigError."""
    if not isinstance(value, str) or not value or "/" in value:
        raise ConfigError(f"{field} = {value!r}: must be a non-empty string without a slash")
    return value


def _specs(model: type, attribute: str) -> tuple[TensorSpec, ...]:
    """Tensor specifications from `TensorSpec`s, `(name, datatype, shape)` tuples or mappings with those keys."""
    declared = getattr(model, attribute, ())
    try:
        specs = tuple(_spec(entry) for entry in declared)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{model.__qualname__}.{attribute} = {declared!r}: must list (name, datatype, shape) of each tensor, e.g. "
            f"('pixels', 'FP32', [-1, 64]): {error}"
        ) from None
    if len({spec.name for spec in specs}) != len(specs):
        raise ConfigError(f"{model.__qualname__}.{attribute}: two tensors have the same name")
    return specs


def _spec(entry: Any) -> TensorSpec:
    if isinstance(entry, TensorSpec):
        return entry
    if isinstance(entry, Mapping):
        return TensorSpec(entry["name"], entry["datatype"], tuple(entry["shape"]), bool(entry.get("finite", False)))
    name, datatype, shape = entry
    return TensorSpec(name, datatype, tuple(shape))
