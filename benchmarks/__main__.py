"""`python -m benchmarks` runs the comparison with peers, in benchmarks/comparison."""

from .comparison.command import main

if __name__ == "__main__":
    main()
