"""`python -m benchmarks` runs the comparison with peers, and `python -m benchmarks head` the study of whole steps of a head."""

import sys

from .comparison import command as comparison
from .head import command as head

if __name__ == "__main__":
    if sys.argv[1:2] == ["head"]:
        head.main()
    else:
        comparison.main()
