"""Checkpoints in arcface_torch's format, resumed on any number of ranks."""

import re

import pytest
import torch
from loss_inputs import relative_error
from torch import nn

import fused_margin as fm
from fused_margin.compat.insightface import ArcFace, PartialFC_V2, load_checkpoint, save_checkpoint

CLASSES, SIZE = 31, 6


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01)


class Training:
    """A small version of their training script: a backbone under DistributedDataParallel, an optimizer, a schedule."""

    def __init__(self, group, make_optimizer):
        torch.manual_seed(0)  # the same backbone on all ranks
        self.backbone = nn.Sequential(nn.Linear(5, SIZE), nn.BatchNorm1d(SIZE)).double()
        with torch.no_grad():
            w = torch.randn(CLASSES, SIZE, dtype=torch.float64)
        if group is not None and group.size() > 1:
            self.backbone = nn.parallel.DistributedDataParallel(self.backbone, process_group=group)
        self.backbone.eval()  # batch statistics depend on the division among ranks
        self.fc = PartialFC_V2(ArcFace(8.0), SIZE, CLASSES, process_group=group).double()
        with torch.no_grad():
            self.fc.weight.copy_(w[self.fc.class_start :][: self.fc.num_local])
        groups = [{"params": self.backbone.parameters()}, {"params": self.fc.parameters()}]
        self.optimizer = make_optimizer(groups)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.step = 0

    def run(self, steps):
        """Returns the losses. Rank r has every world_size-th sample of a batch that depends only on the step."""
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            x = torch.randn(7, 5, generator=generator, dtype=torch.float64)[self.fc.rank :: self.fc.world_size]
            y = torch.randint(0, CLASSES, (7,), generator=generator)[self.fc.rank :: self.fc.world_size]
            self.optimizer.zero_grad()
            loss = self.fc(self.backbone(x), y)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            losses.append(loss.item())
        return losses

    def state(self):
        return self.backbone, self.fc, self.optimizer, self.schedule


def train_and_save(group, folder, steps, optimizer):
    training = Training(group, optimizer)
    losses = training.run(steps)
    save_checkpoint(folder, 1, training.step, *training.state())
    return losses


def resume_and_train(group, folder, steps, optimizer):
    training = Training(group, optimizer)
    with torch.no_grad():  # none of this state may remain
        for parameter in [*training.backbone.parameters(), training.fc.weight]:
            parameter.zero_()
    epoch, training.step = load_checkpoint(folder, *training.state())
    return epoch, training.step, training.schedule.get_last_lr()[0], training.run(steps), training.fc.weight.detach()


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("before, after", [(1, 1), (2, 2), (2, 3), (3, 2), (3, 1), (1, 2)])
def test_resuming_on_another_number_of_ranks(ranks, tmp_path, before, after, optimizer):
    """Training continues as on one device without interruption."""
    uninterrupted = Training(None, optimizer)
    expected = uninterrupted.run(7)
    first = ranks.run(train_and_save, [(tmp_path, 3, optimizer)] * before)
    results = ranks.run(resume_and_train, [(tmp_path, 4, optimizer)] * after)
    for losses in first:
        torch.testing.assert_close(losses, expected[:3], rtol=1e-9, atol=0)
    for epoch, step, rate, losses, _ in results:
        assert (epoch, step) == (1, 3) and rate == pytest.approx((0.1 if optimizer is sgd else 0.01) / 2)
        torch.testing.assert_close(losses, expected[3:], rtol=1e-9, atol=0)
    assert relative_error(torch.cat([weight for *_, weight in results]), uninterrupted.fc.weight.detach()) < 1e-9


def test_files_match_their_script(ranks, tmp_path):
    ranks.run(train_and_save, [(tmp_path, 2, sgd)] * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_gpu_0.pt",
        "checkpoint_gpu_1.pt",
        "model.pt",
    ]
    file = torch.load(tmp_path / "checkpoint_gpu_1.pt", weights_only=True)
    assert list(file) == [
        "epoch",
        "global_step",
        "state_dict_backbone",
        "state_dict_softmax_fc",
        "state_optimizer",
        "state_lr_scheduler",
    ]
    assert list(file["state_dict_softmax_fc"]) == ["weight"]
    assert file["state_dict_softmax_fc"]["weight"].shape == (15, SIZE)
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(model) == list(Training(None, sgd).backbone.state_dict())  # no prefix of DistributedDataParallel
    # as their script resumes
    training = Training(None, sgd)
    training.backbone.load_state_dict(file["state_dict_backbone"])
    training.optimizer.load_state_dict(file["state_optimizer"])
    training.schedule.load_state_dict(file["state_lr_scheduler"])


def write_files(folder, rows, step=5):
    """Write the files of ranks with these numbers of rows; global row i holds i."""
    numbers = torch.arange(float(sum(rows))).unsqueeze(1).expand(-1, SIZE)
    for rank, part in enumerate(numbers.split(rows)):
        content = {
            "epoch": 2,
            "global_step": step,
            "state_dict_backbone": {"weight": torch.ones(SIZE, 3)},
            "state_dict_softmax_fc": {"weight": part.clone()},
            "state_optimizer": {
                "state": {
                    0: {"momentum_buffer": torch.ones(SIZE, 3)},
                    1: {"momentum_buffer": part + 100},
                },
                "param_groups": [
                    {"lr": 0.25, "momentum": 0.9, "weight_decay": 0.0, "params": [0]},
                    {"lr": 0.25, "momentum": 0.9, "weight_decay": 0.0, "params": [1]},
                ],
            },
            "state_lr_scheduler": {"step_size": 2, "gamma": 0.1, "base_lrs": [0.25, 0.25], "last_epoch": 5},
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")


def small(optimizer=sgd):
    backbone, fc = nn.Linear(3, SIZE, bias=False), PartialFC_V2(ArcFace(), SIZE, 10)
    return backbone, fc, optimizer([{"params": backbone.parameters()}, {"params": fc.parameters()}])


def test_shards_are_merged(tmp_path):
    write_files(tmp_path, [4, 3, 3])
    backbone, fc, optimizer = small()
    assert load_checkpoint(tmp_path, backbone, fc, optimizer) == (2, 5)
    assert fc.weight[:, 0].tolist() == list(range(10)) and backbone.weight.eq(1).all()
    assert optimizer.state[fc.weight]["momentum_buffer"][:, 0].tolist() == list(range(100, 110))
    assert optimizer.param_groups[1]["lr"] == 0.25
    for path in tmp_path.iterdir():
        path.write_bytes(bytes(path.stat().st_size))  # the files are not read later
    assert fc.weight[9, 0] == 9 and optimizer.state[backbone.weight]["momentum_buffer"].eq(1).all()


def test_projected_optimizer_loads_state_of_plain_optimizer(tmp_path):
    write_files(tmp_path, [5, 5])
    backbone, fc, optimizer = small(
        lambda groups: fm.optim.ProjectedSGD([g | {"project": False} for g in groups], lr=1)
    )
    load_checkpoint(tmp_path, backbone, fc, optimizer)
    assert [group["project"] for group in optimizer.param_groups] == [False, False]
    assert optimizer.state[fc.weight]["momentum_buffer"][:, 0].tolist() == list(range(100, 110))


def test_files_of_an_earlier_run_on_more_ranks_are_ignored(tmp_path):
    write_files(tmp_path, [3, 3, 2, 2], step=5)
    write_files(tmp_path, [5, 5], step=9)
    backbone, fc, optimizer = small()
    assert load_checkpoint(tmp_path, backbone, fc, optimizer).global_step == 9
    assert fc.weight[:, 0].tolist() == list(range(10))


def test_checkpoint_errors(tmp_path):
    backbone, fc, optimizer = small()
    before = fc.weight.detach().clone()

    def check_error(message, *optimizers):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path, backbone, fc, *optimizers)
        assert torch.equal(fc.weight, before)

    check_error("folder: expected checkpoints of 10 classes, got 0 and no file .*checkpoint_gpu_0.pt")
    write_files(tmp_path, [4, 3, 3])
    (tmp_path / "checkpoint_gpu_2.pt").unlink()
    check_error("folder: expected checkpoints of 10 classes, got 7 and no file .*checkpoint_gpu_2.pt")
    write_files(tmp_path, [6, 6])
    check_error("folder: expected checkpoints of 10 classes, got 12 in")
    write_files(tmp_path, [5, 5], step=5)
    file = torch.load(tmp_path / "checkpoint_gpu_1.pt", weights_only=True)
    torch.save(file | {"global_step": 4}, tmp_path / "checkpoint_gpu_1.pt")
    check_error(re.escape("folder: expected checkpoints of one step, got steps [5, 4]"))
    torch.save({"weight": torch.ones(5, SIZE)}, tmp_path / "checkpoint_gpu_1.pt")
    check_error("folder: expected a checkpoint of arcface_torch, got .*checkpoint_gpu_1.pt")
    write_files(tmp_path, [5, 5])
    check_error("optimizer: expected 2 parameter groups as in .*checkpoint_gpu_0.pt, got 1", sgd(fc.parameters()))
    file["state_optimizer"]["state"][1]["momentum_buffer"] = torch.ones(2, SIZE)  # of sampled classes only
    torch.save(file, tmp_path / "checkpoint_gpu_1.pt")
    check_error("optimizer: expected momentum_buffer of all 10 classes, got 7 rows in", optimizer)
    load_checkpoint(tmp_path, backbone, fc)


@pytest.mark.parametrize("classes", [25, 50, 60, 75])
def test_files_of_more_classes_are_errors(tmp_path, classes):
    """The first one, two or three files hold 25, 50 or 75 classes, but four ranks wrote 100."""
    write_files(tmp_path, [25, 25, 25, 25])
    fc = PartialFC_V2(ArcFace(), SIZE, classes)
    before = fc.weight.detach().clone()
    with pytest.raises(ValueError, match=f"expected checkpoints of {classes} classes, got 100 in"):
        load_checkpoint(tmp_path, nn.Linear(3, SIZE, bias=False), fc)
    assert torch.equal(fc.weight, before)


def test_files_of_different_divisions_are_errors(tmp_path):
    """The row counts of 2 ranks and of 4 ranks add up to the number of classes, but rows are missing."""
    write_files(tmp_path, [4, 3, 3])
    torch.save(torch.load(tmp_path / "checkpoint_gpu_0.pt"), tmp_path / "checkpoint_gpu_2.pt")
    torch.save(torch.load(tmp_path / "checkpoint_gpu_1.pt"), tmp_path / "checkpoint_gpu_0.pt")
    backbone, fc, _ = small()
    with pytest.raises(ValueError, match=re.escape("as [4, 3, 3], got [3, 3, 4] in")):
        load_checkpoint(tmp_path, backbone, fc)


def test_earlier_run_saved_at_the_same_step_is_ignored(tmp_path):
    write_files(tmp_path, [3, 3, 2, 2], step=5)
    write_files(tmp_path, [5, 5], step=5)
    backbone, fc, _ = small()
    load_checkpoint(tmp_path, backbone, fc)
    assert fc.weight[:, 0].tolist() == list(range(10))


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "folder", "other"])
def test_damaged_files_are_named(tmp_path, damage):
    write_files(tmp_path, [5, 5])
    path = tmp_path / "checkpoint_gpu_1.pt"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "other":
        torch.save(dict.fromkeys(torch.load(tmp_path / "checkpoint_gpu_0.pt"), 3), path)
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"epoch 3"}[damage])
    backbone, fc, optimizer = small()
    before = [value.clone() for value in (backbone.weight.detach(), fc.weight.detach())]
    reason = "got" if damage == "other" else "got a file that is damaged or of another kind,"
    message = f"folder: expected a checkpoint of arcface_torch, {reason} .*checkpoint_gpu_1.pt"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, backbone, fc, optimizer)
    assert torch.equal(backbone.weight, before[0]) and torch.equal(fc.weight, before[1])


def edit(folder, change):
    for path in sorted(folder.iterdir()):
        file = torch.load(path)
        change(file)
        torch.save(file, path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda file: file["state_dict_softmax_fc"].update(weight=torch.ones(5, SIZE + 1)),
            r"folder: expected class weights \(classes, 6\), got \(5, 7\) in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_dict_backbone"].update(weight=torch.ones(SIZE, 4)),
            "backbone: the weights in .*checkpoint_gpu_0.pt do not fit it",
        ),
        (
            lambda file: file["state_dict_backbone"].update(bias=torch.ones(SIZE)),
            "backbone: the weights in .*checkpoint_gpu_0.pt do not fit it",
        ),
        (
            lambda file: file["state_optimizer"]["state"][0].update(momentum_buffer=torch.ones(SIZE, 4)),
            r"optimizer: expected momentum_buffer of shape \(6, 3\) for parameter 0, got \(6, 4\) in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_optimizer"]["param_groups"][0]["params"].append(7),
            "optimizer: expected 2 parameters in group 0 as in .*checkpoint_gpu_0.pt, got 1",
        ),
        (
            lambda file: file["state_lr_scheduler"].update(base_lrs=[0.1] * 3),
            "lr_scheduler: expected a schedule of 2 parameter groups, got one of 3 in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_lr_scheduler"].clear(),
            "lr_scheduler: expected the state of a StepLR with base_lrs, .*, got nothing in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file.update(
                state_lr_scheduler={"lr_lambdas": [None] * 2, "base_lrs": [0.1] * 2, "last_epoch": 5}
            ),
            "lr_scheduler: expected the state of a StepLR .* got base_lrs, last_epoch, lr_lambdas in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file.update(state_optimizer={}),
            "optimizer: expected a state of an optimizer and its parameter groups, got none in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_optimizer"].pop("state"),
            "optimizer: expected a state of an optimizer and its parameter groups, got none in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_optimizer"]["state"].pop(1),
            "optimizer: expected a state of the class weights, got none in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_optimizer"]["param_groups"][1].update(betas=(0.9, 0.999)),
            "optimizer: expected options .* in group 1, got betas of another kind of optimizer in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_dict_softmax_fc"]["weight"][2].fill_(float("nan")),
            "folder: expected finite class weights, got NaN or infinity in those of class 2 in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file["state_dict_softmax_fc"].update(weight=torch.ones(5, SIZE, dtype=torch.int32)),
            "folder: expected floating-point class weights, got torch.int32 in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file.update(epoch=-5),
            "folder: expected a non-negative integer epoch, got -5 in .*checkpoint_gpu_0.pt",
        ),
        (
            lambda file: file.update(global_step=True),
            "folder: expected a non-negative integer global_step, got True in .*checkpoint_gpu_0.pt",
        ),
    ],
    ids=[
        "embedding size",
        "backbone shape",
        "backbone names",
        "momentum",
        "group",
        "scheduler",
        "no schedule",
        "other schedule",
        "no optimizer",
        "no state",
        "no state of the classes",
        "options",
        "NaN",
        "integers",
        "epoch",
        "step",
    ],
)
def test_mismatched_checkpoints_are_errors(tmp_path, change, message):
    write_files(tmp_path, [5, 5])
    edit(tmp_path, change)
    backbone, fc, optimizer = small()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    before = [value.clone() for value in (backbone.weight.detach(), fc.weight.detach())]
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, backbone, fc, optimizer, scheduler)
    assert torch.equal(backbone.weight, before[0]) and torch.equal(fc.weight, before[1])
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1 and scheduler.last_epoch == 0


def copies(values):
    return [value.detach().clone() for value in values]


@pytest.mark.parametrize("saved, loaded", [(sgd, adamw), (adamw, sgd)])
def test_another_kind_of_optimizer_is_an_error(tmp_path, saved, loaded):
    train_and_save(None, tmp_path, 2, saved)
    training = Training(None, loaded)
    training.run(1)
    parameters = [*training.backbone.parameters(), training.fc.weight]
    before, state = copies(parameters), training.optimizer.state_dict()
    with pytest.raises(ValueError, match="optimizer: expected options .* of another kind of optimizer in .*gpu_0.pt"):
        load_checkpoint(tmp_path, *training.state())
    assert all(map(torch.equal, parameters, before))
    assert str(training.optimizer.state_dict()) == str(state)


class FailsAfterLoading(torch.optim.SGD):
    """Loads a state and then raises."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        raise KeyError("step")


def fails_after_loading(scheduler):
    """A load_state_dict for a schedule that loads and then raises in its first call."""
    plain, calls = type(scheduler).load_state_dict, []

    def load_state_dict(self, state):
        plain(self, state)
        calls.append(state)
        if len(calls) == 1:
            raise KeyError("lr_lambdas")

    return load_state_dict


@pytest.mark.parametrize("what", ["optimizer", "lr_scheduler", "backbone"])
def test_failed_load_changes_nothing(tmp_path, what):
    write_files(tmp_path, [5, 5])
    kind = (lambda groups: FailsAfterLoading(groups, lr=0.1, momentum=0.9)) if what == "optimizer" else sgd
    backbone, fc, optimizer = small(kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7)
    expected = scheduler.state_dict()
    if what == "lr_scheduler":
        scheduler.__class__ = type(
            "Late", (torch.optim.lr_scheduler.StepLR,), {"load_state_dict": fails_after_loading(scheduler)}
        )
    elif what == "backbone":
        edit(tmp_path, lambda file: file["state_dict_backbone"].update(weight=torch.ones(SIZE, 4)))
    before = copies([backbone.weight, fc.weight])
    with pytest.raises(ValueError, match=f"{what}: the .* in .*checkpoint_gpu_0.pt do.* not fit it"):
        load_checkpoint(tmp_path, backbone, fc, optimizer, scheduler)
    assert torch.equal(backbone.weight, before[0]) and torch.equal(fc.weight, before[1])
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1
    assert {name: value for name, value in vars(scheduler).items() if name in expected} == expected


@pytest.mark.parametrize("newer", ["file", "optimizer"])
def test_options_of_another_version_of_pytorch(tmp_path, newer):
    """One version has an option that the other lacks; an option that only the optimizer has keeps its value."""
    train_and_save(None, tmp_path, 2, adamw)
    training = Training(None, adamw)
    if newer == "optimizer":
        for group in training.optimizer.param_groups:
            group["new"] = 3
    else:
        (tmp_path / "model.pt").unlink()
        edit(tmp_path, lambda file: [group.update(new=3) for group in file["state_optimizer"]["param_groups"]])
    load_checkpoint(tmp_path, *training.state())
    assert [group["new"] for group in training.optimizer.param_groups] == [3, 3]
    training.run(1)
