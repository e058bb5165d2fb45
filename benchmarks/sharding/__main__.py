"""`python -m benchmarks.sharding`. Workers import :mod:`.measured`, which they could not do if it were this module."""

import os

from .measured import main

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
