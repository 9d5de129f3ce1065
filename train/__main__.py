"""`python -m train`: a process of our own, so our own installation comes first."""

import signal
import sys

from serve_app.launch import own_installation

own_installation.put_first()

from train.job import main  # noqa: E402 - not before our installation is first

signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as on Ctrl-C: the snapshot is removed
sys.exit(main())
