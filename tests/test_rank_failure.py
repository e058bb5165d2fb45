"""One rank dies during a step: the others end with an error, and fewer ranks continue from the checkpoint."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loss_inputs import problem

import fused_margin as fm

NUM_CLASSES, TIMEOUT = 23, 30


class ExitInBackward(torch.autograd.Function):
    """Ends the process in the backward pass, while the others wait for its gradients."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        os._exit(1)


def steps(rank, world_size, folder, first, last, dies_at=None):
    """Training steps on the samples of `rank`, with a checkpoint after each; returns the losses over all samples."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{first}-{world_size}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    torch.manual_seed(rank)
    loss_fn = fm.ArcFaceLoss(NUM_CLASSES, 5, scale=8.0, process_group=dist.group.WORLD)
    optimizer = fm.optim.ProjectedSGD([loss_fn.weight], lr=0.1)
    fm.optim.start_momentum(optimizer, loss_fn.weight)
    if first:
        dcp.load(loss_fn.sharded_state_dict(optimizer), checkpoint_id=f"{folder}/{first}")
    losses = []
    for step in range(first, last):
        x, _, y = problem(12, NUM_CLASSES, 5, seed=step)
        optimizer.zero_grad()
        loss = loss_fn(x[rank::world_size].float(), y[rank::world_size])
        losses.append(loss.item())
        (ExitInBackward.apply(loss) if step == dies_at and rank == 1 else loss).backward()
        optimizer.step()
        dcp.save(loss_fn.sharded_state_dict(optimizer), checkpoint_id=f"{folder}/{step + 1}")
    dist.destroy_process_group()
    return losses


def one_of_three(rank, folder):
    try:
        steps(rank, 3, folder, 0, 4, dies_at=2)
    except Exception as error:  # noqa: BLE001 - the type depends on the process group
        return str(error)


def test_dead_rank_ends_the_others_and_fewer_ranks_continue(forks, tmp_path):
    processes = [forks.start(one_of_three, rank, str(tmp_path)) for rank in range(3)]
    for rank, process in enumerate(processes):  # which raises if a rank still waits for the dead one
        assert process.wait(3 * TIMEOUT) == (1 if rank == 1 else 0), process.output
    assert processes[0].result and processes[2].result
    assert (tmp_path / "2" / ".metadata").exists() and not (tmp_path / "3").exists()

    resumed = forks.run(steps, [(rank, 2, str(tmp_path), 2, 4) for rank in range(2)])
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    expected = forks.run(steps, [(rank, 3, str(unbroken), 0, 4) for rank in range(3)])[0][2:]
    for losses in resumed:
        assert losses == pytest.approx(expected, rel=1e-5)
