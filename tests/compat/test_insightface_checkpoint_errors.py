"""Checkpoints of arcface_torch that are damaged or do not fit: clear errors, and nothing is changed."""

import re

import pytest
import torch
from insightface_runs import SIZE, Training, adamw, sgd, small, train_and_save, write_files
from torch import nn

from fused_margin.compat.insightface import ArcFace, PartialFC_V2, load_checkpoint


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
