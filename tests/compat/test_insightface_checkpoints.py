"""Checkpoints in arcface_torch's format, resumed on any number of ranks."""

import pytest
import torch
from insightface_runs import SIZE, Training, adamw, sgd, small, train_and_save, write_files
from loss_inputs import relative_error

import fused_margin as fm
from fused_margin.compat.insightface import load_checkpoint


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


def test_earlier_run_saved_at_the_same_step_is_ignored(tmp_path):
    write_files(tmp_path, [3, 3, 2, 2], step=5)
    write_files(tmp_path, [5, 5], step=5)
    backbone, fc, _ = small()
    load_checkpoint(tmp_path, backbone, fc)
    assert fc.weight[:, 0].tolist() == list(range(10))
