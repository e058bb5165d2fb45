"""A training loop with Hugging Face Accelerate: the loss is prepared as the network is."""

import accelerate
import torch
from synthetic import CLASSES, EMBEDDING_SIZE, batches, make_backbone
from torch.utils.data import DataLoader

import fused_margin


def main(steps: int = 100) -> list[float]:
    """Trains; returns the losses."""
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True)
    backbone, loss_fn = make_backbone(), fused_margin.ArcFaceLoss(CLASSES, EMBEDDING_SIZE, margin=0.2, scale=16.0)
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss_fn.parameters()], lr=0.1, momentum=0.9)
    loader = DataLoader(batches(steps), batch_size=None)
    backbone, loss_fn, optimizer, loader = accelerator.prepare(backbone, loss_fn, optimizer, loader)
    losses = []
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = loss_fn(backbone(inputs), labels)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
