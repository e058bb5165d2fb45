"""`python -m fused_margin` runs the program `fused-margin`."""

import sys

from fused_margin.cli import main

sys.exit(main())
