"""Builds fused_margin._C with ninja: C++ for every CPU instruction set, CUDA where nvcc is found. No torch."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
KERNEL_FILES = ("loss", "search", "step")  # in csrc/cpu and csrc/cuda
X86_INSTRUCTION_SETS = {
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
# errno and traps are all that keeps the compiler from vectorising; results stay IEEE.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall"


def find_nvcc() -> str | None:
    """CUDA_HOME's nvcc, else the one on PATH. An empty CUDA_HOME asks for a CPU-only build."""
    home = os.environ.get("CUDA_HOME")
    if home is None:
        return shutil.which("nvcc")
    if not home:
        return None
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc is None:
        raise SystemExit(
            f"CUDA_HOME is {home!r}, but there is no bin/nvcc in it. Unset it, or set it empty to build for CPU only."
        )
    return nvcc


def cuda_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a+PTX", as ["8.0", "9.0a", "9.0a+PTX"]; by default 8.0 with PTX, and 9.0a."""
    architectures = []
    for entry in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a").strip()):
        match = re.fullmatch(r"(\d+\.\d[af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0a+PTX, got {entry!r}")
        architectures += [match[1]] + ([entry] if match[2] else [])
    return architectures


def nvcc_flags(architectures: list[str]) -> str:
    flags = ["-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden --expt-relaxed-constexpr"]
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        code = "compute" if entry.endswith("+PTX") else "sm"
        flags.append(f"-gencode arch=compute_{number},code={code}_{number}")
    return " ".join(flags)


class NinjaBuild(build_ext):
    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.rules(target))
        subprocess.run([sys.executable, "-m", "ninja", "-C", build], check=True)

    def rules(self, target: Path) -> str:
        folders = (pybind11.get_include(), sysconfig.get_paths()["include"])
        includes = " ".join(f"-I{shlex.quote(folder)}" for folder in folders)
        openmp = "" if sys.platform == "darwin" else "-fopenmp"
        defines = "-DFM_MODULE_NAME=_C"
        compiler = os.environ.get("CXX", "c++")
        objects: dict[str, tuple[str, str, str]] = {}  # object: (rule, source, flags)

        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for name, flags in {"plain": "", **(X86_INSTRUCTION_SETS if x86 else {})}.items():
            for file in KERNEL_FILES:
                objects[f"{file}_{name}.o"] = ("cxx", f"cpu/{file}.cpp", f"{flags} -DFM_ISA={name}")
        objects["dispatch.o"] = ("cxx", "cpu/dispatch.cpp", "-DFM_X86" if x86 else "")

        nvcc = find_nvcc()
        runtime = openmp_runtime(compiler)
        link = f"{compiler} -shared $in -o $out {runtime}"
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        if nvcc:
            architectures = cuda_architectures()
            toolkit = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]
            defines += (
                f' -DFM_CUDA -DFM_CUDA_ARCHITECTURES=\\"{",".join(architectures)}\\" -DFM_CUDA_TOOLKIT=\\"{toolkit}\\"'
            )
            for file in KERNEL_FILES:
                objects[f"cuda_{file}.o"] = ("nvcc", f"cuda/{file}.cu", nvcc_flags(architectures))
            tensor_cores = [entry for entry in architectures if float(entry[: entry.index(".") + 2]) >= 8.0]
            if tensor_cores:
                defines += " -DFM_SM80"
                for name in ("operands", "sm80"):
                    objects[f"cuda_{name}.o"] = ("nvcc", f"cuda/{name}.cu", nvcc_flags(tensor_cores))
            if "9.0a" in architectures:  # the only architecture that has its instructions
                defines += " -DFM_SM90"
                objects["cuda_sm90.o"] = ("nvcc", "cuda/sm90.cu", nvcc_flags(["9.0a"]))
            link = f"{shlex.quote(nvcc)} -shared -cudart static -ccbin {compiler} $in -o $out {runtime and '-Xcompiler=' + runtime}"
        for name in ("module", "tensor") if "-DFM_SM80" in defines else ("module",):
            objects[f"bindings_{name}.o"] = ("cxx", f"bindings/{name}.cpp", f"{includes} {defines}")

        lines = [
            "rule cxx",
            f"  command = {compiler} {CXX_FLAGS} {openmp} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "rule link",
            f"  command = {link}",
        ]
        if nvcc:
            lines += [
                "rule nvcc",
                f"  command = {shlex.quote(nvcc)} $flags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
            ]
        for name, (rule, source, flags) in objects.items():
            lines += [f"build {name}: {rule} {escape((SOURCES / source).resolve())}", f"  flags = {flags}"]
        lines += [f"build {escape(target)}: link {' '.join(objects)}", f"default {escape(target)}", ""]
        return "\n".join(lines)


def openmp_runtime(compiler: str) -> str:
    """The option that links an OpenMP runtime: none for GCC on Linux, whose code uses the runtime that torch has loaded.

    torch's wheels bundle libgomp, some under a name with a hash (2.7 on aarch64). An extension that names libgomp.so.1
    could load a second one, whose threads compete with torch's for the cores, or find none. Its OpenMP symbols stay
    undefined instead, and fused_margin/_openmp.py shares torch's. Other compilers' code needs a runtime of their own.
    """
    if sys.platform == "darwin":
        return ""
    version = subprocess.check_output([*shlex.split(compiler), "--version"], text=True)
    return "" if "Free Software Foundation" in version else "-fopenmp"


def escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def readme() -> str:
    """README.md with absolute links, for the page of the package on an index."""
    files = "https://github.com/fused-margin/fused-margin/blob/main/"
    images = "https://raw.githubusercontent.com/fused-margin/fused-margin/main/"
    link = re.compile(r"(!?)(\[[^]]*\])\((?!\w+:)")
    return link.sub(
        lambda match: f"{match[0]}{images if match[1] else files}", Path("README.md").read_text(encoding="utf-8")
    )


setup(
    ext_modules=[Extension("fused_margin._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
