"""pytorch-metric-learning's losses, computed by the fused kernels: only the imports change."""

import torch
from synthetic import CLASSES, EMBEDDING_SIZE, batches, make_backbone

# Before: from pytorch_metric_learning.losses import ArcFaceLoss
# Before: from pytorch_metric_learning.regularizers import RegularFaceRegularizer
from fused_margin.compat.pytorch_metric_learning import ArcFaceLoss, RegularFaceRegularizer


def main(steps: int = 100) -> list[float]:
    """Trains; returns the losses."""
    torch.manual_seed(0)
    backbone = make_backbone()
    loss_fn = ArcFaceLoss(  # the margin is in degrees, as there
        CLASSES, EMBEDDING_SIZE, margin=10, scale=16, weight_regularizer=RegularFaceRegularizer(), weight_reg_weight=0.1
    )
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss_fn.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for inputs, labels in batches(steps):
        optimizer.zero_grad()
        loss = loss_fn(backbone(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
