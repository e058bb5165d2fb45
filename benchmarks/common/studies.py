"""Files of results of studies that have one command line."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from typing import Any

from fused_margin.benchmark.environment import header

from .files import write_json


def write_study(module: str, config: Any, content: dict[str, Any], indent: int | None = 1) -> None:
    """Write `content` to `config.output`, if there is one, with the other options as its problem.

    Args:
        module: the study, as in ``python -m module``.
    """
    if config.output is not None:
        options = {name: value for name, value in asdict(config).items() if name != "output"}
        command = shlex.join(["python", "-m", module, *sys.argv[1:]])
        write_json(config.output, {**header(command), "problem": options, **content}, indent)
