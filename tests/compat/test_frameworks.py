"""A loss with parameters under DDP, Lightning and Accelerate: final weights match plain torch."""

import gc

import pytest
import torch
from loss_inputs import problem
from ranks import MAX_RANKS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm

CLASSES, SIZE, STEPS = 30, 8, 3


class Classifier(nn.Module):
    """A network and its loss as one module, whose forward is the loss."""

    def __init__(self, loss_fn):
        super().__init__()
        self.network = nn.Linear(5, SIZE)
        self.loss_fn = loss_fn

    def forward(self, inputs, labels):
        return self.loss_fn(self.network(inputs), labels)


def make(name):
    torch.manual_seed(11)
    if name == "fused_margin":
        return Classifier(fm.ArcFaceLoss(CLASSES, SIZE, scale=16.0, exclusive_weight=0.5))
    from fused_margin.compat import pytorch_metric_learning as compat

    regularizer = compat.RegularFaceRegularizer()
    return Classifier(compat.CosFaceLoss(CLASSES, SIZE, scale=16, weight_regularizer=regularizer))


def batches():
    inputs, _, labels = problem(16 * STEPS, CLASSES, 5, spread=1.0)
    return list(zip(inputs.float().split(16), labels.split(16), strict=True))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.fixture(params=["fused_margin", "compat.pytorch_metric_learning"])
def name(request):
    if request.param != "fused_margin":
        pytest.importorskip("pytorch_metric_learning", "2.9")
    return request.param


@pytest.fixture
def expected(name):
    """The state after plain training."""
    model = make(name)
    optimizer = sgd(model.parameters())
    for inputs, labels in batches():
        optimizer.zero_grad()
        model(inputs, labels).backward()
        optimizer.step()
    return model.state_dict()


def assert_trained(state, expected, **tolerance):
    assert state.keys() == expected.keys() and any("loss_fn." in key for key in state)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, **tolerance)


def train_part(rank, world_size, name, together):
    """The state after training on this process's share of every batch, with one DDP wrapper or one per module."""
    model = make(name)
    if together:
        step = DistributedDataParallel(model)
    else:
        network, loss_fn = DistributedDataParallel(model.network), DistributedDataParallel(model.loss_fn)

        def step(inputs, labels):
            return loss_fn(network(inputs), labels)

    optimizer = sgd(model.parameters())
    for inputs, labels in batches():
        optimizer.zero_grad()
        step(inputs.chunk(world_size)[rank], labels.chunk(world_size)[rank]).backward()
        optimizer.step()
    return model.state_dict()


def check_wrapper(rank, world_size, name):
    """pytorch-metric-learning's wrapper gives the loss of the gathered batch times the number of processes."""
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    model, (inputs, labels) = make(name), batches()[0]
    embeddings = model.network(inputs)
    loss = DistributedLossWrapper(model.loss_fn)(embeddings.chunk(world_size)[rank], labels.chunk(world_size)[rank])
    torch.testing.assert_close(loss, world_size * model.loss_fn(embeddings, labels))


def one_process(group, name):
    rank, world_size = group.rank(), group.size()
    states = [train_part(rank, world_size, name, together) for together in (True, False)]
    if name != "fused_margin":
        check_wrapper(rank, world_size, name)
    gc.collect()  # if DDP held the last reference to the group, torch would wait for a thread that waits for the GIL
    return states


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_distributed_data_parallel(ranks, name, expected):
    """Uses all ranks, because DDP and the wrapper use the default group."""
    for first, *others in zip(*ranks.run(one_process, [(name,)] * MAX_RANKS), strict=True):
        assert all(torch.equal(first[key], other[key]) for other in others for key in first)
        assert_trained(first, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 0.05)])
def test_fabric(name, expected, precision, tolerance):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision=precision)
    model = make(name)
    wrapped, optimizer = fabric.setup(model, sgd(model.parameters()))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(batches(), batch_size=None))
    for inputs, labels in loader:
        optimizer.zero_grad()
        fabric.backward(wrapped(inputs, labels))
        optimizer.step()
    assert_trained(model.state_dict(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
def test_lightning_module(name, expected, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.classifier = make(name)

        def training_step(self, batch, _):
            return self.classifier(*batch)

        def configure_optimizers(self):
            return sgd(self.parameters())

    module = Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    assert_trained(module.classifier.state_dict(), expected)

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert_trained(restored.classifier.state_dict(), expected)


def test_accelerate(name, expected):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        model = make(name)
        optimizer, loader = sgd(model.parameters()), torch.utils.data.DataLoader(batches(), batch_size=None)
        network, loss_fn, optimizer, loader = accelerator.prepare(model.network, model.loss_fn, optimizer, loader)
        for inputs, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(network(inputs), labels))
            optimizer.step()
        assert_trained(model.state_dict(), expected)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
