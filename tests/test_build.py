"""The build: no torch in it, CUDA options from the usual variables, one module for every machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_margin as fm
from fused_margin import _C

ROOT = Path(__file__).parents[1]


def test_no_torch_header_in_csrc():
    for source in (ROOT / "csrc").rglob("*.*"):
        for include in re.findall(r'#include\s*[<"]([^>"]+)', source.read_text()):
            assert not re.match(r"(torch|ATen|c10)/", include), f"{source}: {include}"


def test_build_info():
    info = fm.build_info()
    json.dumps(info)
    assert info["version"] == fm.__version__
    assert info["cpu"]["capability"] in ("plain", "avx2", "avx512")
    assert info["cuda"]["compiled"] == hasattr(_C, "cuda") == ("cuda" in info["kernels"])
    assert bool(info["cuda"]["architectures"]) == info["cuda"]["compiled"] == (info["cuda"]["toolkit"] is not None)


def test_extension_needs_no_cuda_library():
    """cudart is linked statically and libcuda not at all: the file can be imported without a GPU or a driver."""
    if not shutil.which("ldd"):
        pytest.skip("ldd shows linked libraries; this system has none")
    libraries = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in libraries and "libtorch" not in libraries and "not found" not in libraries


def build_rules(**environment) -> subprocess.CompletedProcess:
    """The ninja rules that setup.py writes for an environment, without building."""
    code = (
        "import sys, setuptools; setuptools.setup = lambda **k: globals().update(k); sys.argv = ['setup.py'];"
        "exec(open('setup.py').read()); from setuptools.dist import Distribution; from pathlib import Path;"
        "print(NinjaBuild(Distribution()).rules(Path('x.so')))"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST")} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=False, capture_output=True, text=True)


def test_empty_cuda_home_builds_for_cpu_only():
    rules = build_rules(CUDA_HOME="").stdout
    assert "loss_plain.o" in rules and "build cuda_loss.o" not in rules and "FM_CUDA" not in rules


def test_wrong_cuda_home_and_wrong_architecture_are_errors():
    result = build_rules(CUDA_HOME="/nonexistent")
    assert result.returncode != 0 and "CUDA_HOME is '/nonexistent'" in result.stderr
    if shutil.which("nvcc"):
        result = build_rules(TORCH_CUDA_ARCH_LIST="hopper")
        assert result.returncode != 0 and "expected entries like 8.0 or 9.0a+PTX, got 'hopper'" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other builds use no OpenMP")
@pytest.mark.parametrize(
    "version, linked", [("Copyright (C) 2022 Free Software Foundation, Inc.", False), ("clang version 19.1.0", True)]
)
def test_openmp_runtime_is_torchs_unless_the_compiler_needs_its_own(tmp_path, version, linked):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho '{version}'\n")
    compiler.chmod(0o755)
    rules = build_rules(CUDA_HOME="", CXX=str(compiler)).stdout
    compile_command, link_command = re.findall(r"command = (.*)", rules)
    assert "-fopenmp" in compile_command and ("-fopenmp" in link_command) == linked


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_architectures_come_from_torch_cuda_arch_list():
    rules = build_rules(TORCH_CUDA_ARCH_LIST="8.6;9.0a+PTX").stdout
    for flag in ("arch=compute_86,code=sm_86", "arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"):
        assert flag in rules
    assert "compute_80" not in rules


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_tensor_core_kernels_are_built_where_supported():
    default = build_rules().stdout
    hopper = default[default.index("build cuda_sm90.o") :].split("build ")[1]
    assert "sm_90a" in hopper and "sm_80" not in hopper  # its instructions exist on no other architecture
    ampere = build_rules(TORCH_CUDA_ARCH_LIST="7.5;8.6").stdout
    assert "build cuda_sm90.o" not in ampere and "FM_SM90" not in ampere
    assert "sm_75" not in ampere[ampere.index("build cuda_sm80.o") :].split("build ")[1]
    turing = build_rules(TORCH_CUDA_ARCH_LIST="7.5").stdout
    assert "build cuda_loss.o" in turing and "FM_SM80" not in turing and "bindings_tensor.o" not in turing


def import_without_kernels(folder: Path, *copied: str) -> str:
    """The output of `import fused_margin` in a folder with uncompiled parts of the repository."""
    shutil.copytree(ROOT / "fused_margin", folder / "fused_margin", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in copied:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    code = (  # without the finder of an editable installation, which would find the repository's kernels for any folder
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')];"
        "import fused_margin"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, check=False, capture_output=True, text=True
    )
    assert result.returncode != 0
    return result.stderr.splitlines()[-1]


def test_importing_the_source_folder_names_it(tmp_path):
    message = import_without_kernels(tmp_path, "setup.py", "csrc")
    assert f"source folder {tmp_path}" in message
    assert "run Python in another folder" in message and "`pip install -e .`" in message


def test_broken_installation_is_not_called_a_source_folder(tmp_path):
    message = import_without_kernels(tmp_path)
    assert f"could not be loaded from {tmp_path / 'fused_margin'}" in message
    assert "source folder" not in message and "pip install -e" not in message
