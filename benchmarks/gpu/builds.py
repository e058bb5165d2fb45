"""Two builds of the extension: the plain one, and one in which a barrier that is waited for too long traps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from .steps import FAILED, PASSED, Steps

PLAIN, TRAP = "plain", "trap"
TRAP_NANOSECONDS = 1_000_000_000
METADATA = "fused_margin.egg-info"


def architectures(capability: str) -> str:
    """TORCH_CUDA_ARCH_LIST for a device, whatever the machine sets: all families that run on it are built."""
    return {"9.0": "9.0a"}.get(capability, capability)


def environment(variant: str) -> dict[str, str]:
    flags = os.environ.get("NVCC_APPEND_FLAGS", "")
    return {"NVCC_APPEND_FLAGS": f"{flags} -DFM_TRAP_AFTER={TRAP_NANOSECONDS}ull"} if variant == TRAP else {}


def commands(python: str, directory: Path) -> dict[str, list[str]]:
    return {
        variant: [
            python, "setup.py", "-q", "build_ext", f"--build-temp={directory / variant / 'temp'}",
            f"--build-lib={directory / variant}",
        ]
        for variant in (PLAIN, TRAP)
    }  # fmt: skip


def extension(directory: Path, variant: str) -> Path:
    """The only one of that variant."""
    (found,) = (directory / variant / "fused_margin").glob("_C.*.so")
    return found


class Builds:
    """Both builds in folders of their own; `use` puts one where the tree imports it from."""

    def __init__(self, steps: Steps, python: str, prebuilt: Path | None):
        self.steps, self.python = steps, python
        self.directory = prebuilt or steps.root / "build" / "gpu"
        self.prebuilt = prebuilt is not None

    def make(self) -> bool:
        if self.prebuilt:
            source = self.directory / METADATA
            if not source.is_dir():
                self.steps.finish("builds", FAILED, 0.0, f"{source} does not exist")
                return False
            shutil.copytree(source, self.steps.root / METADATA, dirs_exist_ok=True)
            return True
        if self.steps.run("metadata", 30, [self.python, "setup.py", "-q", "egg_info"]).failed:
            return False
        begin, running = time.monotonic(), {}
        for variant, command in commands(self.python, self.directory).items():
            log = self.steps.log.with_name(f"build-{variant}.log")
            variables = {**os.environ, **self.steps.environment, **environment(variant)}
            with log.open("w") as file:
                running[variant] = (
                    log,
                    subprocess.Popen(
                        command, cwd=self.steps.root, env=variables, stdout=file, stderr=subprocess.STDOUT
                    ),
                )
        failed = [variant for variant, (_, process) in running.items() if process.wait() != 0]
        for variant in failed:
            self.steps.print("\n".join(running[variant][0].read_text().splitlines()[-30:]))
        self.steps.finish("both builds", FAILED if failed else PASSED, time.monotonic() - begin, ", ".join(failed))
        return not failed

    def use(self, variant: str) -> None:
        target = self.steps.root / "fused_margin"
        for old in target.glob("_C.*.so"):
            old.unlink()
        shutil.copy(extension(self.directory, variant), target)


def prebuild(root: Path, directory: Path, capability: str) -> None:
    """Both builds for this interpreter's Python and a device: `--prebuilt` takes the folder on another machine."""
    directory = directory.resolve()
    variables = {**os.environ, "TORCH_CUDA_ARCH_LIST": architectures(capability)}
    for variant, command in commands(sys.executable, directory).items():
        subprocess.run(command, cwd=root, env={**variables, **environment(variant)}, check=True)
        shutil.rmtree(directory / variant / "temp")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={directory}"], cwd=root, env=variables, check=True
    )
    for variant in (PLAIN, TRAP):
        file = extension(directory, variant)
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, for {sysconfig.get_config_var('SOABI')}")
