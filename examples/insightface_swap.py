"""InsightFace's PartialFC_V2, computed by the fused kernels: only the imports change."""

import torch
from synthetic import CLASSES, EMBEDDING_SIZE, batches, make_backbone

# Before: from losses import CombinedMarginLoss
# Before: from partial_fc_v2 import PartialFC_V2
from fused_margin.compat.insightface import CombinedMarginLoss, PartialFC_V2


def main(steps: int = 100) -> list[float]:
    """Trains with half of the classes drawn at each step; returns the losses."""
    torch.manual_seed(0)
    backbone = make_backbone()
    margin_loss = CombinedMarginLoss(16, 1.0, 0.3, 0.0)
    partial_fc = PartialFC_V2(margin_loss, EMBEDDING_SIZE, CLASSES, sample_rate=0.5)
    optimizer = torch.optim.SGD([*backbone.parameters(), *partial_fc.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for inputs, labels in batches(steps):
        optimizer.zero_grad()
        loss = partial_fc(backbone(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
