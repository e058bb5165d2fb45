"""A plain training loop: ArcFace with RegularFace's exclusive term, a margin schedule, and projected class weights."""

import torch
from synthetic import CLASSES, EMBEDDING_SIZE, batches, make_backbone

import fused_margin


def main(steps: int = 200) -> float:
    """Trains; returns the accuracy on new samples."""
    torch.manual_seed(0)
    backbone = make_backbone()
    loss_fn = fused_margin.ArcFaceLoss(CLASSES, EMBEDDING_SIZE, scale=16.0, exclusive_weight=0.1)
    optimizer = fused_margin.optim.ProjectedSGD(
        [{"params": backbone.parameters(), "project": False}, {"params": loss_fn.parameters()}], lr=0.1, momentum=0.9
    )
    for step, (inputs, labels) in enumerate(batches(steps)):
        loss_fn.margin = 0.3 * min(1.0, step / (steps / 2))
        optimizer.zero_grad()
        loss = loss_fn(backbone(inputs), labels)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, margin {loss_fn.margin:.2f}")

    (inputs, labels), *_ = batches(1, batch_size=1000, seed=1)
    with torch.no_grad():
        accuracy = (loss_fn.logits(backbone(inputs)).argmax(1) == labels).float().mean().item()
    print(f"accuracy on new samples: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
