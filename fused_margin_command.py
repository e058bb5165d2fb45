"""The program `fused-margin`: sets OpenMP's environment variables before torch is imported, and runs fused_margin.cli.

It is a separate module, because importing the package imports torch, and OpenMP reads its environment variables then.
"""

import os
import sys
import warnings

SPIN_COUNT = "3000"  # tens of microseconds; by default it is 300,000, which is milliseconds


def format_warning(message: Warning | str, category: type[Warning], *position: object) -> str:
    """One line for a warning about an option: its position in the source says nothing to a user of the program."""
    return f"warning: {message}\n" if category is UserWarning else default_format(message, category, *position)


default_format = warnings.formatwarning


def main() -> int:
    """Run the command line; returns the exit code."""
    warnings.formatwarning = format_warning
    # An OpenMP thread spins while it waits for other threads. If these need the same core, spinning delays them.
    # Sleeping at once (OMP_WAIT_POLICY=passive) is slower if the cores are free.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    from fused_margin.cli import main

    try:
        return main()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout when it ends
        return 1
