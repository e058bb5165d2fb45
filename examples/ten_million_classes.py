"""Trains the class weights of ten million classes on one machine: each step of them is made in the backward.

With 256 numbers in bfloat16 a class weight takes 512 bytes and its momentum 512; with a few numbers per class that makes
1,030 bytes, so 10.3 GB for ten million classes, and 0.6 GB for everything else. No gradient of the class weights and no
logits are stored. Where that does not fit, take fewer: `python ten_million_classes.py --num-classes 1_000_000`.
On two cores of an AMD EPYC (Zen 4) a step of ten million classes and 128 samples takes 25 s.
"""

import argparse
import re
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fused_margin

FIXED_BYTES = 650_000_000  # the program, torch and the loss's workspace


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU, or on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) if meminfo.exists() else sys.maxsize


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains on made-up identities, and returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-classes", type=int, default=10_000_000)
    parser.add_argument("--embedding-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    size, device = options.embedding_size, options.device

    needed, available = options.num_classes * (4 * size + 6) + FIXED_BYTES, available_bytes(device)
    if needed > available:
        parser.error(f"--num-classes: {options.num_classes:,} classes need {needed / 1e9:.1f} GB, and {available / 1e9:.1f} "
                     "GB are free; take fewer classes or a smaller --embedding-size")  # fmt: skip
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(64, size), nn.ReLU(), nn.Linear(size, size)).to(device)
    loss_fn = fused_margin.ArcFaceLoss(options.num_classes, size, margin=0.4, device=device, dtype=torch.bfloat16)
    fused_margin.optim.project_(loss_fn.weight)
    optimizer = fused_margin.optim.ProjectedSGD(
        [{"params": backbone.parameters(), "project": False, "lr": 0.01}, {"params": loss_fn.parameters()}], lr=0.1
    )
    fused_margin.optim.step_in_backward(loss_fn, optimizer)  # the loop below is that of any other training

    labels = torch.randint(options.num_classes, (options.batch_size,), device=device)  # one batch, again and again
    inputs = torch.randn(options.batch_size, 64, device=device)
    losses = []
    for step in range(options.steps):
        start = time.perf_counter()
        loss = loss_fn(backbone(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        print(f"step {step + 1}: {time.perf_counter() - start:.2f} s, loss {losses[-1]:.3f}", flush=True)
    print(f"peak memory: {peak_bytes(device) / 1e9:.2f} GB ({needed / 1e9:.2f} GB expected)")
    return losses


if __name__ == "__main__":
    main()
