"""Classes divided among ranks, each with its own samples: `torchrun --nproc-per-node 2 examples/torchrun_loop.py`."""

import torch
import torch.distributed as dist
from synthetic import CLASSES, EMBEDDING_SIZE, batches, make_backbone
from torch.nn.parallel import DistributedDataParallel

import fused_margin


def train(group: dist.ProcessGroup, steps: int = 100) -> list[float]:
    """Trains on the ranks of a group; returns the losses over the samples of all ranks."""
    torch.manual_seed(0)
    backbone = DistributedDataParallel(make_backbone(), process_group=group)
    loss_fn = fused_margin.ArcFaceLoss(CLASSES, EMBEDDING_SIZE, margin=0.2, scale=16.0, process_group=group)
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss_fn.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for inputs, labels in batches(steps, seed=group.rank()):
        optimizer.zero_grad()
        embeddings = backbone(inputs)
        embeddings.register_hook(lambda gradient: gradient * group.size())  # DistributedDataParallel divides by it
        loss = loss_fn(embeddings, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    losses = train(dist.group.WORLD)
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} on {dist.get_world_size()} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
