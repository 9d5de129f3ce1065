"""`python -m train`."""

import sys

from train.job import main

sys.exit(main())
