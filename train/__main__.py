"""`python -m train`: a process of our own, so our own installation comes first."""

import signal
import sys

from serve_app.launch import own_installation

own_installation.put_first()

from serve_app import extras  # noqa: E402 - not before our installation is first
from shadecast.errors import NotInstalledError  # noqa: E402 - as above

try:
    extras.require("train", "training")
except NotInstalledError as error:
    print(f"train: {error}", file=sys.stderr)
    sys.exit(2)

from train.job import main  # noqa: E402 - as above

signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as on Ctrl-C: the snapshot is removed
sys.exit(main())
