"""`python -m sva.cli` is `sva`."""

import sys

from sva.cli.main import main

sys.exit(main())
