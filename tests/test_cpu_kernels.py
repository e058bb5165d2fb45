"""Results are equal up to rounding for every instruction set of this machine and any number of threads."""

import pytest
import torch
from loss_inputs import ours, problem, relative_error

from fused_margin import _C

AVAILABLE = [
    c
    for c in (_C.cpu.Capability.plain, _C.cpu.Capability.avx2, _C.cpu.Capability.avx512)
    if c <= _C.cpu.best_capability()
]


@pytest.fixture
def instruction_set():
    before = _C.cpu.capability()
    yield _C.cpu.use
    _C.cpu.use(before)


@pytest.mark.parametrize("scale", [64.0, 300.0, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_instruction_sets_agree(instruction_set, dtype, scale):
    x, w, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(33, 1009, 67))
    results = []
    for capability in AVAILABLE:
        instruction_set(capability)
        results.append(ours(x, w, y, {"m2": 0.5}, scale, exclusive_weight=0.5, label_smoothing=0.1, workspace_mb=0.5))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}[dtype]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(a, b) < tolerance


def test_missing_instruction_set_is_an_error():
    if _C.cpu.best_capability() == _C.cpu.Capability.avx512:
        pytest.skip("this machine has them all")
    with pytest.raises(ValueError, match="does not have that instruction set"):
        _C.cpu.use(_C.cpu.Capability.avx512)


def test_number_of_threads():
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(50, 2011, 40))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ours(x, w, y, {"m2": 0.5}, exclusive_weight=0.5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(a, b) < 1e-5


def test_exponentials_to_float32_rounding():
    """2^(a cos - k) over the full range of cosines, by the one kernel that computes it."""
    from fused_margin._ops.backends.select import kernels

    for scale in (1.0, 64.0, 500.0):
        cosine = torch.linspace(-1, 1, 4001)
        output, one = cosine.clone(), torch.ones(4001)
        exponent, total = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.float64)
        kernels("cpu").exponent_sum(
            logits_chunk=output, inverse_norm=one, bias=None, labels=torch.tensor([-100]), hard_threshold=None,
            hard_strength=None, scale=scale, fixed_exponent=None, exponent=exponent, sum=total, samples=1, chunk=4001,
            class_begin=0, sub_centers=1,
        )  # fmt: skip
        expected = torch.exp2(cosine.double() * scale / torch.log(torch.tensor(2.0, dtype=torch.float64)) - exponent)
        normal = expected > 2.0**-124
        error = ((output - expected) / expected)[normal].abs().max()
        assert error < (3e-7 if _C.cpu.capability() != _C.cpu.Capability.plain else 3e-5)
        assert (output[~normal] < 2.0**-123).all()
        assert abs(total.item() / expected.sum().item() - 1) < 1e-6
