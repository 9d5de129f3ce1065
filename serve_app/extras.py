"""What must be installed beside a user's replica: one error that names the extra, before anything is half started.

`pip install shadecast` brings what a replica needs. The rest comes by the extras of pyproject.toml, of which `MODULES`
lists what is imported; tests/test_extras.py holds the two together. Standard library only: this is asked first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec

from shadecast.errors import NotInstalledError

_CONTROL = (
    *("fastapi", "pandas", "prometheus_client", "psutil", "pyarrow", "pydantic"),
    *("rich", "safetensors", "torch", "typer", "uvicorn"),
)
_GATEWAY = ("click", "fastapi", "google.protobuf", "grpc", "pydantic")
MODULES: Mapping[str, tuple[str, ...]] = {
    "control": _CONTROL,
    "gateway": _GATEWAY,
    "train": (*_CONTROL, "fsspec", "matplotlib", "sklearn", "tensorboardX"),
    "gpu": ("pynvml",),
}
"""By extra: what is imported of it, or what Ray imports of its own extras."""
_BRINGS = {
    "control": "the control plane's packages",
    "gateway": "the gateway's packages",
    "train": "the packages of training",
    "gpu": "NVIDIA's library",
}


def require(extra: str, what: str) -> None:
    """Raises NotInstalledError where something of an extra is missing; imports nothing. `what` needs it."""
    require_modules(MODULES[extra], extra, what)


def require_modules(modules: Iterable[str], extra: str, what: str) -> None:
    """The same for some of its modules."""
    if missing := [name for name in modules if not _is_there(name)]:
        raise NotInstalledError(
            f"{what} needs {_BRINGS[extra]}: pip install 'shadecast[{extra}]' (missing: {', '.join(missing)})"
        )


def _is_there(module: str) -> bool:
    try:
        return module in sys.modules or find_spec(module) is not None
    except (ImportError, ValueError):  # of `google.protobuf`, where there is no `google`
        return False
