"""Classes divided among ranks, each with its own samples: `torchrun --nproc-per-node 2 torchrun_loop.py`.

The loss is over the samples of all ranks. A checkpoint can be loaded on another number of ranks.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import fused_margin


def train(group: dist.ProcessGroup, device: torch.device, options: argparse.Namespace) -> list[float]:
    """Trains on made-up identities, and returns the loss of each step."""
    torch.manual_seed(0)  # the same network and identities on every rank
    centers = torch.randn(options.num_classes, 64).to(device)  # an identity is a Gaussian around its center
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(device)
    backbone = DistributedDataParallel(network, process_group=group)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(1 + group.rank())  # other class weights and samples on every rank
    loss_fn = fused_margin.ArcFaceLoss(options.num_classes, 64, margin=0.4, scale=32.0, process_group=group).to(device)
    fused_margin.optim.project_(loss_fn.weight)  # (classes of this rank, 64)
    class_optimizer = fused_margin.optim.ProjectedSGD(loss_fn.parameters(), lr=0.02)
    fused_margin.optim.start_momentum(class_optimizer, loss_fn.weight)  # a checkpoint may be loaded into it

    def state() -> dict:
        return {
            "network": network.state_dict(),
            "optimizer": get_optimizer_state_dict(network, optimizer),
            "loss_fn": loss_fn.sharded_state_dict(class_optimizer),  # every rank saves its part, with its momentum
        }

    if options.resume:
        loaded = state()
        dcp.load(loaded, checkpoint_id=options.resume, process_group=group)  # fills weights and class momentum in place
        set_optimizer_state_dict(network, optimizer, loaded["optimizer"])
    losses = []
    for step in range(options.steps):
        labels = torch.randint(options.num_classes, (64,), device=device)
        embeddings = backbone(centers[labels] + 0.5 * torch.randn(64, 64, device=device))
        embeddings.register_hook(lambda gradient: gradient * group.size())  # DistributedDataParallel divides by it
        loss = loss_fn(embeddings, labels)
        loss.backward()
        for each in (optimizer, class_optimizer):
            each.step()
            each.zero_grad()
        losses.append(loss.item())
        if group.rank() == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.3f}, {len(loss_fn.weight)} classes on this rank")
    if options.save:
        dcp.save(state(), checkpoint_id=options.save, process_group=group)
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num-classes", type=int, default=1001)
    parser.add_argument("--save", metavar="FOLDER", help="where to save a checkpoint after training")
    parser.add_argument("--resume", metavar="FOLDER", help="a checkpoint to start from")
    options = parser.parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun: torchrun --nproc-per-node 2 torchrun_loop.py")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(dist.group.WORLD, device, options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
