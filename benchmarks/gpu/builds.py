"""Two builds of the extension: the plain one, and one that traps when a kernel waits too long at a barrier."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from .steps import FAILED, Steps

PLAIN, TRAP = "plain", "trap"
TRAP_NANOSECONDS = 1_000_000_000
METADATA = "fused_margin.egg-info"
BUILD_SECONDS = 150


def architectures(capability: str) -> str:
    """TORCH_CUDA_ARCH_LIST for a device, so that all families that run on it are built."""
    return {"9.0": "9.0a"}.get(capability, capability)


def variables(variant: str, capability: str) -> dict[str, str]:
    """Environment variables of one build."""
    flags = os.environ.get("NVCC_APPEND_FLAGS", "")
    if variant == TRAP:
        flags += f" -DFM_TRAP_AFTER={TRAP_NANOSECONDS}ull"
    return {**os.environ, "TORCH_CUDA_ARCH_LIST": architectures(capability), "NVCC_APPEND_FLAGS": flags}


def prebuild(root: Path, directory: Path, capability: str) -> None:
    """Make both builds in parallel, for this Python version and a device. Another machine uses them with `--prebuilt`.

    Raises CalledProcessError if one of them fails.
    """
    directory = directory.resolve()
    setup = [sys.executable, "setup.py", "-q"]
    running = {
        variant: subprocess.Popen(
            [*setup, "build_ext", f"--build-temp={directory / variant / 'temp'}", f"--build-lib={directory / variant}"],
            cwd=root, env=variables(variant, capability),
        )
        for variant in (PLAIN, TRAP)
    }  # fmt: skip
    for process in running.values():
        if process.wait() != 0:
            raise subprocess.CalledProcessError(process.returncode, process.args)
    subprocess.run([*setup, "egg_info", f"--egg-base={directory}"], cwd=root, check=True)
    for variant in running:
        shutil.rmtree(directory / variant / "temp")
        file = extension(directory, variant)
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, for {sysconfig.get_config_var('SOABI')}")


def extension(directory: Path, variant: str) -> Path:
    """The extension module of a variant."""
    (found,) = (directory / variant / "fused_margin").glob("_C.*.so")
    return found


class Builds:
    """Both builds, each in its folder; `use` copies one into the package."""

    def __init__(self, steps: Steps, python: str, prebuilt: Path | None, capability: str):
        self.steps, self.python, self.capability = steps, python, capability
        self.directory = prebuilt or steps.root / "build" / "gpu"
        self.prebuilt = prebuilt is not None

    def make(self) -> bool:
        """Build, unless the builds are prebuilt; False if that fails."""
        if not self.prebuilt:
            command = [self.python, "-m", "benchmarks.gpu", "prebuild", str(self.directory)]
            step = self.steps.run("builds", BUILD_SECONDS, [*command, "--capability", self.capability])
            if step.failed:
                return False
        metadata = self.directory / METADATA
        if not metadata.is_dir():
            self.steps.finish("builds", FAILED, 0.0, f"{metadata} does not exist")
            return False
        shutil.copytree(metadata, self.steps.root / METADATA, dirs_exist_ok=True)
        return True

    def use(self, variant: str) -> None:
        target = self.steps.root / "fused_margin"
        for old in target.glob("_C.*.so"):
            old.unlink()
        shutil.copy(extension(self.directory, variant), target)
