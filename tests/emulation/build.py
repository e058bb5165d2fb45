"""Builds csrc as the module _emulated, with the CUDA backend compiled for the host through emulation.h."""

import ctypes
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[2]


def load(directory: Path):
    """Compile into a directory, unless already done, and import the module; its ``cuda`` kernels take host tensors."""
    target = directory / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    with FileLock(directory / "lock"):
        if not target.exists():
            compile_to(target)
    spec = importlib.util.spec_from_file_location("_emulated", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_to(target: Path) -> None:
    compiler = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
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
    sources = [f"csrc/bindings/{name}.cpp" for name in ("module", "tensor")]
    sources += [f"csrc/cpu/{name}.cpp" for name in ("dispatch", "loss", "search", "step")]
    sources += [f"csrc/cuda/{name}.cu" for name in ("loss", "search", "step", "operands", "sm80", "sm90")]
    sources += ["tests/emulation/half_product.cpp"]
    jobs = []
    for source in sources:
        output = target.parent / (Path(source).name.replace(".", "_") + f"_{len(jobs)}.o")
        optimization = "-O0" if source.endswith("module.cpp") else "-O1"  # bindings take the longest to compile
        command = [*compiler, optimization, *defines, "-x", "c++", "-c", str(ROOT / source), "-o", str(output)]
        jobs.append((output, subprocess.Popen(command)))
    if any(process.wait() for _, process in jobs):
        raise RuntimeError("the emulated CUDA kernels do not compile")
    objects = [str(output) for output, _ in jobs]
    subprocess.run([compiler[0], "-shared", *objects, "-o", str(target), "-fopenmp"], check=True)


def half_product(module):
    """tensor_cores.half_product for host tensors with tensor-core arithmetic: sums are rounded towards zero."""
    product = ctypes.CDLL(module.__file__).half_product
    product.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3

    def multiply(out, left, right, accumulate):
        if out.dim() == 3:
            for matrices in zip(out, left, right, strict=True):
                multiply(*matrices, accumulate)
            return
        (rows, inner), columns = left.shape, right.shape[1]
        a = torch.nn.functional.pad(left.float(), (0, -inner % 16)).contiguous()
        b = torch.nn.functional.pad(right.float(), (0, -columns % 4, 0, -inner % 16)).contiguous()
        result = out.new_empty(rows, b.shape[1])
        product(a.data_ptr(), b.data_ptr(), result.data_ptr(), rows, *b.shape)
        out.add_(result[:, :columns]) if accumulate else out.copy_(result[:, :columns])

    return multiply
