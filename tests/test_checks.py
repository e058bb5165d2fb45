"""Invalid input raises an error with the argument's name, the expected and the given value, before anything runs."""

import threading

import numpy as np
import pytest
import torch
from loss_inputs import leaf, problem

import fused_margin as fm
from fused_margin import _checks
from fused_margin.distributed import Shard
from fused_margin.functional import (
    cosine_logsumexp,
    exclusive_regularization,
    margin_cross_entropy,
    nearest_class,
    separability,
)

X, W, Y = problem(6, 10, 4)
NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeddings": X[0]}, ValueError, r"embeddings: expected shape \(N, embedding_size\), got \(4,\)"),
        ({"embeddings": X[:, :3]}, ValueError, r"embeddings: expected embedding_size 4, got shape \(6, 3\)"),
        ({"embeddings": X.long()}, TypeError, "embeddings: expected float32.*got torch.int64"),
        ({"embeddings": X.tolist()}, TypeError, "embeddings: expected a tensor .* got list"),
        ({"embeddings": X.to_sparse()}, TypeError, "embeddings: expected a dense tensor"),
        ({"embeddings": X.to("meta")}, ValueError, "embeddings: expected a tensor on cpu, got one on meta"),
        ({"weight": W[:0]}, ValueError, "weight: expected at least 1 classes, got 0"),
        ({"weight": W[:, :0]}, ValueError, "weight: expected an embedding_size of at least 1"),
        ({"weight": W.to(torch.complex64)}, TypeError, "weight: expected float32"),
        ({"labels": Y[:5]}, ValueError, r"labels: expected shape \(6,\), got \(5,\)"),
        ({"labels": Y[:, None]}, ValueError, r"labels: expected shape \(6,\), got \(6, 1\)"),
        ({"labels": Y.float()}, TypeError, "labels: expected an integer tensor.*float32"),
        ({"labels": Y.tolist()}, TypeError, "labels: expected an integer tensor .* got list"),
        ({"labels": Y.clone().fill_(10)}, ValueError, r"labels: expected values in \[0, num_classes\) .* got 10 for 10 classes"),
        ({"labels": Y.clone().fill_(-1)}, ValueError, "labels: .* got -1 for 10 classes"),
        ({"scale": 0}, ValueError, "scale: expected a positive finite number, got 0"),
        ({"scale": -3.0}, ValueError, "scale: expected a positive"),
        ({"scale": NAN}, ValueError, "scale: expected a positive"),
        ({"scale": "64"}, TypeError, "scale: expected a number.*got str"),
        ({"scale": torch.ones(5)}, ValueError, r"scale: expected a number or shape \(6,\), got \(5,\)"),
        ({"scale": torch.ones(6, dtype=torch.int64)}, TypeError, "scale: expected a floating-point tensor"),
        ({"scale": -torch.ones(6)}, ValueError, "scale: expected non-negative numbers"),
        ({"scale": torch.full((6,), NAN)}, ValueError, "scale: expected non-negative numbers"),
        ({"margin": 0.5}, TypeError, "margin: expected a fused_margin.Margin, got float"),
        ({"margin": fm.Margin(m2=torch.ones(3))}, ValueError, r"margin.m2: expected a number or shape \(6,\), got \(3,\)"),
        ({"margin": fm.Margin(m2=torch.full((6,), NAN))}, ValueError, "margin.m2: expected finite numbers, got nan"),
        ({"margin": fm.Margin(m1=-torch.ones(6))}, ValueError, "margin.m1: expected positive numbers, got -1"),
        ({"margin": fm.Margin(annealing=-torch.ones(6))}, ValueError, "annealing: expected non-negative numbers, got -1"),
        ({"class_weight": torch.ones(9)}, ValueError, r"class_weight: expected shape \(10,\), got \(9,\)"),
        ({"class_weight": [1.0] * 10}, TypeError, "class_weight: .* got list"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"reduction": "none", "exclusive_weight": 1.0}, ValueError, "exclusive_weight: expected 0 with reduction='none'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0.0, 1.0\], got 1.5"),
        ({"label_smoothing": NAN}, ValueError, "label_smoothing"),
        ({"exclusive_weight": -1.0}, ValueError, "exclusive_weight"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb: expected a number in"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an integer, got float"),
    ],
)  # fmt: skip
def test_margin_cross_entropy(change, error, message):
    arguments = {"embeddings": leaf(X), "weight": leaf(W), "labels": Y, **change}
    with pytest.raises(error, match=message):
        margin_cross_entropy(**arguments)


def test_exclusive_term_needs_two_classes():
    for call in (
        lambda: exclusive_regularization(W[:1]),
        lambda: nearest_class(W[:1]),
        lambda: separability(W[:1]),
        lambda: margin_cross_entropy(X, W[:1], Y * 0, exclusive_weight=1.0),
        lambda: fm.ArcFaceLoss(1, 4, exclusive_weight=1.0),
    ):
        with pytest.raises(ValueError, match="expected at least 2 classes, got 1"):
            call()
    for function in (exclusive_regularization, separability):
        with pytest.raises(ValueError, match="weight: "):
            function(W[:1])


def test_shard():
    for arguments in ({"num_classes": 0}, *({"num_classes": 3, "sample_rate": rate} for rate in (0.0, -1.0, 2.0, NAN))):
        with pytest.raises(ValueError, match=f"{list(arguments)[-1]}: expected"):
            Shard(**arguments)
    for wrong in (2.5, True, "a"):
        with pytest.raises(TypeError, match="num_classes: expected an integer"):
            Shard(wrong)
    with pytest.raises(ValueError, match="query: expected the 6 rows that rank 0 of 1 has"):
        nearest_class(torch.randn(5, 4), shard=Shard(6))
    with pytest.raises(TypeError, match="query: expected a tensor"):
        nearest_class([[1.0, 2.0]], shard=Shard(2))
    with pytest.raises(ValueError, match="query: expected at least 2 classes on all ranks, got 1"):
        nearest_class(W[:1], shard=Shard(1))


def test_nearest_index_is_a_tensor():
    with pytest.raises(TypeError, match="nearest: expected a fused_margin.functional.NearestClass, got int"):
        exclusive_regularization(W, nearest=5)
    with pytest.raises(TypeError, match="nearest.index: expected .* int64, got list"):
        exclusive_regularization(W, nearest=(torch.ones(len(W)), [0] * len(W)))


def test_numpy_integer_is_an_ignore_index():
    labels = torch.where(Y == Y[0], -1, Y)
    expected = margin_cross_entropy(X, W, labels, ignore_index=-1)
    assert torch.equal(margin_cross_entropy(X, W, labels, ignore_index=np.int64(-1)), expected)
    assert fm.ArcFaceLoss(5, 4, ignore_index=np.int64(-1)).ignore_index == -1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"m1": NAN}, ValueError, "m1: expected a finite number, got nan"),
        ({"m2": float("inf")}, ValueError, "m2: expected a finite number, got inf"),
        ({"m1": 0.0}, ValueError, "m1: expected a positive number"),
        ({"annealing": -1.0}, ValueError, "annealing: expected a non-negative number"),
        ({"m3": "0.35"}, TypeError, "m3: expected a number or a tensor .* got str"),
        ({"beyond_pi": "wrap"}, ValueError, "beyond_pi: expected one of 'monotone', 'linear', 'none', got 'wrap'"),
        ({"gradient": "ste"}, ValueError, "gradient: expected one of 'exact', 'straight_through', got 'ste'"),
    ],
)
def test_margin(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.Margin(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fm.ArcFaceLoss(0, 4), ValueError, "num_classes: expected a positive integer, got 0"),
        (lambda: fm.ArcFaceLoss(10, 4.0), TypeError, "embedding_size: expected an integer, got float"),
        (lambda: fm.ArcFaceLoss(10, 4, margin=NAN), ValueError, "margin: expected a number"),
        (lambda: fm.ArcFaceLoss(10, 4, scale=-1), ValueError, "scale: expected a positive"),
        (lambda: fm.NormFaceLoss(10, 4, m2=0.5), TypeError, "unexpected keyword argument 'm2'"),
        (lambda: fm.ArcFaceLoss(10, 4, marginn=1), TypeError, "unexpected keyword argument 'marginn'"),
        (lambda: fm.ArcFaceLoss(10, 4, dtype=torch.int64), TypeError, "int64|floating"),
        (lambda: fm.SphereFaceLoss(10, 4, margin=0.5), ValueError, r"margin: expected a number in \[1.0, inf\), got 0.5"),
        (lambda: fm.CosFaceLoss(10, 4, class_weight=torch.ones(3)), ValueError, r"class_weight: expected shape \(10,\)"),
        (lambda: fm.NormFaceLoss(10, 4).logits(torch.ones(2, 5)), ValueError, "embeddings: expected embedding_size 4"),
        (lambda: fm.optim.project_(torch.ones(3)), ValueError, "weight: expected shape"),
        (lambda: fm.optim.ProjectedSGD([torch.ones(3, requires_grad=True)], lr=0.1), ValueError, "params: expected shape"),
        (lambda: cosine_logsumexp(X, W, Y - 100), ValueError, r"labels: expected values in"),
    ],
)  # fmt: skip
def test_modules_and_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_label_changes_no_state():
    loss_fn = fm.SphereFaceLoss(10, 4).double()
    before = {k: v.clone() for k, v in loss_fn.state_dict().items()}
    with pytest.raises(ValueError, match="labels"):
        loss_fn(X, Y + 10)
    for name, value in loss_fn.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert loss_fn(X, Y).isfinite()


def test_cuda_tensor_in_a_cpu_build(monkeypatch):
    """The error of a CPU-only build, simulated without a GPU."""
    from fused_margin import _checks

    class OnCuda(torch.Tensor):
        device = torch.device("cuda:0")

    monkeypatch.setattr(_checks, "has_cuda_kernels", lambda: False)
    with pytest.raises(
        RuntimeError, match="embeddings is on cuda:0, but this build .* no CUDA kernels; rebuild with nvcc"
    ):
        _checks.matrix("embeddings", torch.ones(2, 2).as_subclass(OnCuda), "(N, embedding_size)")


def test_host_threads_share_the_flag_of_a_device(monkeypatch):
    """Two threads may create the flag at the same time; both must get the one that stays alive."""
    both, zeros = threading.Barrier(2), torch.zeros
    monkeypatch.setattr(_checks, "_bad_label_buffers", {})

    def slow_zeros(*size, pin_memory, **options):
        both.wait(10)
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", slow_zeros)
    device, flags = torch.device("cuda", 0), []
    threads = [threading.Thread(target=lambda: flags.append(_checks.bad_label_buffer(device))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert flags[0] is flags[1] is _checks._bad_label_buffers[device]


@pytest.mark.parametrize(
    ("loss_fn", "tensors", "message"),
    [
        (fm.ArcFaceLoss(5, 4, class_weight=torch.ones(5)), {"class_weight": torch.ones(3)}, "class_weight: .* got .3,"),
        (fm.ArcFaceLoss(5, 4, class_weight=torch.ones(5)), {"weight": torch.ones(9, 4)}, "class_weight: .* got .5,"),
        (fm.SoftmaxLoss(5, 4, class_weight=torch.ones(5)), {"class_weight": torch.ones(3)}, "class_weight: .* got .3,"),
        (
            fm.SubCenterArcFaceLoss(5, 4, sub_centers=3),
            {"weight": torch.ones(16, 4)},
            "weight: expected 3 rows for every",
        ),
        (fm.SoftmaxLoss(5, 4), {"bias": torch.ones(3)}, "bias: expected shape .5,.*, got .3,"),
    ],
)
def test_tensors_of_a_functional_call_fit_together(loss_fn, tensors, message):
    """A module whose tensors were replaced does not read past their end."""
    with pytest.raises(ValueError, match=message):
        torch.func.functional_call(loss_fn, tensors, (torch.randn(2, 4), torch.tensor([0, 4])))
