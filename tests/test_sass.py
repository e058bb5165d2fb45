"""What the compiler made of the tensor-core kernels: that they use the tensor cores, and nothing that would stall them."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fused_margin import _C

PACKAGED = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin"  # of nvidia-cuda-cuobjdump and -nvdisasm


def tool(name):
    path = os.pathsep.join([str(PACKAGED), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def kernels(architecture, space):
    """The instructions of every kernel of a family in the built module, by mangled name."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if not cuobjdump or not nvdisasm:
        pytest.skip("needs cuobjdump and nvdisasm")
    if architecture.removeprefix("sm_") not in _C.cuda_architectures.replace(".", "").split(","):
        pytest.skip(f"not built for {architecture}")
    environment = os.environ | {"NVDISASM_PATH": str(Path(nvdisasm).parent)}
    environment["PATH"] = os.pathsep.join([str(Path(nvdisasm).parent), environment.get("PATH", "")])
    listing = subprocess.run(
        [cuobjdump, "-sass", "-arch", architecture, _C.__file__],
        env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = {}
    for text in re.split(r"\n\s*Function : ", listing)[1:]:
        name, _, code = text.partition("\n")
        if re.match(rf"_ZN2fm4cuda4{space}\d.*5sweep", name):
            found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    assert len(found) >= 5
    return found


def starting(instructions, *prefixes):
    return [i for i in instructions if i.startswith(prefixes)]


def test_hopper_kernels():
    for name, code in kernels("sm_90a", "sm90").items():
        products = [at for at, i in enumerate(code) if i.startswith("HGMMA")]
        assert products and starting(code, "UTMALDG") and starting(code, "USETMAXREG"), name
        assert not starting(code, "LDL", "STL"), f"{name} keeps something in local memory"
        # a fence of the whole GPU between products would cost more than they do
        assert not starting(code[products[0] : products[-1]], "MEMBAR"), name
        # the two waits that are written; where the compiler finds no way to overlap products it waits after each
        assert len(starting(code, "WARPGROUP.DEPBAR")) == 2, f"{name}: its products run one after another"


def test_ampere_kernels():
    for name, code in kernels("sm_80", "sm80").items():
        assert starting(code, "HMMA.16816") and starting(code, "LDSM") and starting(code, "LDGSTS"), name
        assert not starting(code, "LDL", "STL"), f"{name} keeps something in local memory"
