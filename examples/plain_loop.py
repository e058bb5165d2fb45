"""A plain training loop: ArcFace on scikit-learn's digits, with a margin schedule, mixed precision and torch.compile."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import fused_margin


def main(arguments: list[str] | None = None) -> float:
    """Trains, and returns the accuracy on images that the network has not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the network and the loss; needs a C++ compiler")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    digits = load_digits()  # 1,797 images of 8 x 8 pixels
    images = torch.tensor(digits.data, dtype=torch.float32, device=options.device) / 16
    labels = torch.tensor(digits.target, device=options.device)
    order = torch.randperm(len(images), device=options.device)
    train, test = order[:1400], order[1400:]

    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(options.device)
    loss_fn = fused_margin.ArcFaceLoss(10, 32, scale=16.0, exclusive_weight=0.1).to(options.device)
    fused_margin.optim.project_(
        loss_fn.weight
    )  # class weights start on the unit sphere; the optimizer keeps them there
    optimizer = fused_margin.optim.ProjectedSGD(
        [{"params": backbone.parameters(), "project": False}, {"params": loss_fn.parameters()}], lr=0.02
    )
    network, loss_of = (torch.compile(m) if options.compile else m for m in (backbone, loss_fn))
    dtype = getattr(torch, options.precision)
    scaler = torch.amp.GradScaler(options.device, enabled=dtype is torch.float16)  # float16 gradients need it

    for epoch in range(options.epochs):
        loss_fn.margin = 0.4 * min(1.0, epoch / (options.epochs / 2))  # in radians; grows in the first half
        total = 0.0
        for batch in train[torch.randperm(len(train), device=options.device)].split(64):
            with torch.autocast(options.device, dtype, enabled=dtype is not torch.float32):
                loss = loss_of(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}: margin {loss_fn.margin:.2f}, loss {total / len(train):.3f}")

    with torch.no_grad():  # the logits at inference have no margin
        predicted = loss_fn.logits(backbone(images[test])).argmax(1)
    accuracy = (predicted == labels[test]).float().mean().item()
    mean, std = fused_margin.functional.separability(loss_fn.weight)
    print(f"accuracy on {len(test)} other images: {accuracy:.3f}")
    print(f"cosine of a class to its nearest: {mean:.3f} ± {std:.3f} (lower is further apart)")
    return accuracy


if __name__ == "__main__":
    main()
