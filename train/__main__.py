"""`python -m train`."""

import signal
import sys

from train.job import main

signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as on Ctrl-C: the snapshot is removed
sys.exit(main())
