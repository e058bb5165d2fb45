"""InsightFace's PartialFC_V2, computed by the fused kernels: only the imports change (recognition/arcface_torch)."""

import argparse

import torch
from torch import nn

from fused_margin import functional

# Before: from losses import CombinedMarginLoss
# Before: from partial_fc_v2 import PartialFC_V2
from fused_margin.compat.insightface import CombinedMarginLoss, PartialFC_V2


def main(arguments: list[str] | None = None) -> float:
    """Trains on made-up identities, and returns the share of new samples that are nearest to their own class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--sample-rate", type=float, default=0.2, help="share of the classes that a step uses")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    centers = torch.randn(options.num_classes, 64)  # an identity is a Gaussian around its center

    def draw_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(options.num_classes, (size,))
        return centers[labels] + 0.5 * torch.randn(size, 64), labels

    backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    margin_loss = CombinedMarginLoss(32, 1.0, 0.4, 0.0)  # s, m1, m2, m3
    module_partial_fc = PartialFC_V2(margin_loss, 64, options.num_classes, options.sample_rate)
    module_partial_fc.train()
    opt = torch.optim.SGD(
        [{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}],
        lr=0.05, momentum=0.9, weight_decay=5e-4,
    )  # fmt: skip
    lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(opt, options.steps, power=2)

    for step in range(options.steps):
        inputs, labels = draw_batch(128)
        loss = module_partial_fc(backbone(inputs), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        opt.step()
        opt.zero_grad()
        lr_scheduler.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    inputs, labels = draw_batch(2000)
    with torch.no_grad():
        nearest = functional.nearest_class(backbone(inputs), module_partial_fc.weight).index
    accuracy = (nearest == labels).float().mean().item()
    print(f"new samples whose nearest of {options.num_classes} classes is their own: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
