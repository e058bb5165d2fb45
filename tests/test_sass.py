"""The machine code of the CUDA kernels uses the intended instructions, and none that would stall them."""

import os
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from fused_margin import _C

PACKAGED = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13/bin"  # from nvidia-cuda-cuobjdump and -nvdisasm


def tool(name):
    path = os.pathsep.join([str(PACKAGED), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


@cache
def kernels(architecture):
    """The instructions of every kernel in the built module, by mangled name."""
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
    instructions = {}
    for text in re.split(r"\n\s*Function : ", listing)[1:]:
        name, _, code = text.partition("\n")
        instructions[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return instructions


def family(architecture, space):
    instructions = {
        n: code for n, code in kernels(architecture).items() if re.match(rf"_ZN2fm4cuda4{space}\d.*14multiply_tiles", n)
    }
    assert len(instructions) >= 5
    return instructions


def starting(instructions, *prefixes):
    return [i for i in instructions if i.startswith(prefixes)]


def test_hopper_kernels():
    for name, code in family("sm_90a", "sm90").items():
        products = [at for at, i in enumerate(code) if i.startswith("HGMMA")]
        assert products and starting(code, "UTMALDG") and starting(code, "USETMAXREG"), name
        assert not starting(code, "LDL", "STL"), f"{name} keeps something in local memory"
        # a GPU-wide fence between products would take longer than the products
        assert not starting(code[products[0] : products[-1]], "MEMBAR"), name
        # the two waits in the source; where the compiler cannot overlap products, it adds one after each
        assert len(starting(code, "WARPGROUP.DEPBAR")) == 2, f"{name}: its products run one after another"


def test_ampere_kernels():
    for name, code in family("sm_80", "sm80").items():
        assert starting(code, "HMMA.16816") and starting(code, "LDSM") and starting(code, "LDGSTS"), name
        assert not starting(code, "LDL", "STL"), f"{name} keeps something in local memory"


# Kernels that use one warp per row, and their stores beside those of the row. None: the stores are not checked,
# because the kernel only reads rows, or reads rows of several dtypes.
ROW_KERNELS = {
    "row_normalize": 1,
    "project_weight_gradient": 0,
    "pack_operand": 1,
    "target_cosine": None,
    "project_embedding_gradient": None,
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_row_kernels(architecture, kernel):
    """Rows stay in registers, and aligned rows are read and written 16 bytes at a time."""
    pattern = re.compile(rf"{kernel}INS0_5PieceI([fd])Li(\d+)ELi(\d+)ELNS0_6AccessE(\d)EEE(\w)")
    matching = [(m, code) for name, code in kernels(architecture).items() if (m := pattern.search(name))]
    assert len(matching) >= 4  # single and double, vectors and strided
    for match, code in matching:
        value, group, groups, access, stored = match.groups()
        assert not starting(code, "LDL", "STL"), f"{match[0]} keeps something in local memory"
        if ROW_KERNELS[kernel] is None or access != "0":  # Access::vectors
            continue
        wide = starting(code, "STG.E.128")
        assert len(wide) >= int(groups), match[0]
        assert len(starting(code, "STG")) - len(wide) == ROW_KERNELS[kernel], f"{match[0]} stores parts of 16 bytes"
        size = {"f": 4, "d": 8}
        loads = (
            int(group) * size.get(stored, 2) // 16
        )  # for a group of the row; a few half values are smaller than a group
        if kernel == "project_weight_gradient":
            loads += int(group) * size[value] // 16
        assert len(starting(code, "LDG.E.128")) >= int(groups) * loads, match[0]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_step_kernels(architecture):
    """Rows stay in registers. A group of elements of aligned rows is loaded and stored at once, also where a row has
    smaller elements than the arithmetic."""
    pattern = re.compile(r"step_rowsINS0_5PieceI[fd]Li(\d+)ELi(\d+)ELNS0_6AccessE(\d)EEE(\w)")
    matching = [(m, code) for name, code in kernels(architecture).items() if (m := pattern.search(name))]
    assert len(matching) >= 24  # of arithmetic in two types, rows in three, vectors and strided, with and without Adam
    for match, code in matching:
        group, groups, access, stored = match.groups()
        assert not starting(code, "LDL", "STL"), f"{match[0]} keeps something in local memory"
        if access != "0":  # Access::vectors
            continue
        width = int(group) * {"f": 4, "d": 8}.get(stored, 2)
        of_row = {4: "", 8: ".64"}.get(width, ".128")
        for suffix in (of_row, ".128"):  # of weight and momentum, and of the gradient
            for kind in ("LDG", "STG"):
                assert code.count(f"{kind}.E{suffix}") >= 2 * int(groups), f"{match[0]} splits groups"
        assert set(starting(code, "STG")) == {f"STG.E{of_row}", "STG.E.128"}, f"{match[0]} stores parts of a group"
