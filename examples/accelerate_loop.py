"""A training loop with Hugging Face Accelerate: the loss is prepared as the network is, and saved with it."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fused_margin


def main(arguments: list[str] | None = None) -> float:
    """Trains, and returns the accuracy on images that the network has not seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--accumulate", type=int, default=1, help="batches for each step of the optimizer")
    parser.add_argument("--save", metavar="FOLDER", help="where to save the state after training")
    parser.add_argument("--resume", metavar="FOLDER", help="a saved state to start from")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    options = parser.parse_args(arguments)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulate, cpu=options.cpu
    )
    set_seed(0)  # the same class weights on every process

    digits = load_digits()  # 1,797 images of 8 x 8 pixels
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    train, test = torch.utils.data.random_split(TensorDataset(images, labels), [1400, 397])
    backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    loss_fn = fused_margin.CosFaceLoss(10, 32, margin=0.2, scale=16.0, exclusive_weight=0.1)
    optimizer = torch.optim.SGD([*backbone.parameters(), *loss_fn.parameters()], lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=options.epochs * 22)
    backbone, loss_fn, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        backbone, loss_fn, optimizer, scheduler, DataLoader(train, 64, shuffle=True), DataLoader(test, 64)
    )
    if options.resume:
        accelerator.load_state(options.resume)

    for epoch in range(options.epochs):
        for inputs, targets in train_loader:
            with accelerator.accumulate(backbone, loss_fn):
                loss = loss_fn(backbone(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_([*backbone.parameters(), *loss_fn.parameters()], 5.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    if options.save:
        accelerator.save_state(options.save)
    hits = []
    for inputs, targets in test_loader:
        with torch.no_grad():  # the logits at inference have no margin
            predicted = accelerator.unwrap_model(loss_fn).logits(backbone(inputs)).argmax(1)
        hits.append(accelerator.gather_for_metrics(predicted == targets))
    accuracy = torch.cat(hits).float().mean().item()
    accelerator.print(f"accuracy on {len(test)} other images: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
