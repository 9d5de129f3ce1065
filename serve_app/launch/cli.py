"""The command `shadecast`: a process of our own, so our own installation comes first."""

import json
import sys

from serve_app.launch import own_installation

_BAD_USE = 2
"""As in `serve_app.launch.commands`, which cannot be imported where something is missing."""


def main() -> None:
    """Run the command line; where something is not installed, one line says which extra brings it."""
    own_installation.put_first()
    from serve_app import extras  # noqa: PLC0415 - not before our installation is first
    from shadecast.errors import NotInstalledError  # noqa: PLC0415 - as above

    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    extra = {"train": "train"}.get(command, "control")
    try:
        extras.require(extra, f"shadecast {command}".strip())
        if command == "serve":
            extras.require("gateway", "shadecast serve")
    except NotInstalledError as error:
        print(f"shadecast: {error}", file=sys.stderr)
        if "--json" in sys.argv[1:]:
            print(json.dumps({"schema": 1, "error": str(error), "exit_code": _BAD_USE}))
        raise SystemExit(_BAD_USE) from None
    from serve_app.launch.commands import run  # noqa: PLC0415 - as above

    run()
