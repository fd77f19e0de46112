"""``python -m lsm_cuda.cli`` is ``lsm``."""

import sys

from . import main

sys.exit(main())
