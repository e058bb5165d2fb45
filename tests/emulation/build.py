"""Builds csrc with its CUDA backend compiled for the host by emulation.h, as the module _emulated."""

import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]


def load(directory: Path):
    """Compiles into directory and imports. The module's ``cuda`` kernels take host tensors."""
    target = directory / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-fPIC",
        "-fopenmp",
        "-fvisibility=hidden",
    ]
    compiler += [
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
        f"-I{ROOT / 'tests/emulation'}",
    ]
    defines = ["-DFM_MODULE_NAME=_emulated", "-DFM_CUDA", "-DFM_SM80", "-DFM_SM90", "-DFM_EMULATE", "-DFM_ISA=plain"]
    sources = [
        "csrc/module.cpp",
        "csrc/tensor_module.cpp",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/kernels.cpp",
        "csrc/cpu/search.cpp",
    ]
    sources += [f"csrc/cuda/{name}.cu" for name in ("kernels", "search", "operands", "sm80", "sm90")]
    jobs = []
    for source in sources:
        output = directory / (Path(source).name.replace(".", "_") + f"_{len(jobs)}.o")
        command = [*compiler, *defines, "-x", "c++", "-c", str(ROOT / source), "-o", str(output)]
        jobs.append((output, subprocess.Popen(command)))
    if any(process.wait() for _, process in jobs):
        raise RuntimeError("the emulated CUDA kernels do not compile")
    objects = [str(output) for output, _ in jobs]
    subprocess.run([compiler[0], "-shared", *objects, "-o", str(target), "-fopenmp"], check=True)
    spec = importlib.util.spec_from_file_location("_emulated", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
