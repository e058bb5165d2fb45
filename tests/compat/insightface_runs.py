"""A small training script in the style of arcface_torch, and checkpoints in its format."""

import torch
from torch import nn

from fused_margin.compat.insightface import ArcFace, PartialFC_V2, save_checkpoint

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


def train_and_save(group, folder, steps, optimizer):
    training = Training(group, optimizer)
    losses = training.run(steps)
    save_checkpoint(folder, 1, training.step, *training.state())
    return losses
