"""pytorch-metric-learning's losses, computed by the fused kernels: only the imports change."""

import argparse

import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner
from sklearn.datasets import load_digits
from torch import nn

# Before: from pytorch_metric_learning.losses import ArcFaceLoss
# Before: from pytorch_metric_learning.regularizers import RegularFaceRegularizer
from fused_margin.compat.pytorch_metric_learning import ArcFaceLoss, RegularFaceRegularizer


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains on digits, and returns the loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    digits = load_digits()  # 1,797 images of 8 x 8 pixels
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1400], order[1400:]

    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    loss_fn = ArcFaceLoss(  # the margin is in degrees and the class weights W are (32, 10), as before
        10, 32, margin=20, scale=16, weight_regularizer=RegularFaceRegularizer(), weight_reg_weight=0.1
    )
    miner = MultiSimilarityMiner()
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss_fn.parameters()], lr=0.05, momentum=0.9)

    losses = []
    for epoch in range(options.epochs):
        total = 0.0
        for batch in train[torch.randperm(len(train))].split(64):
            embeddings = backbone(images[batch])
            loss = loss_fn(embeddings, labels[batch], miner(embeddings, labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(train))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")

    with torch.no_grad():
        predicted = loss_fn.get_logits(backbone(images[test])).argmax(1)
    print(f"accuracy on {len(test)} other images: {(predicted == labels[test]).float().mean():.3f}")
    return losses


if __name__ == "__main__":
    main()
