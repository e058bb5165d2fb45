"""A LightningModule with a margin loss, whose class weights are its parameters."""

import lightning
import torch
from synthetic import CLASSES, EMBEDDING_SIZE, batches, make_backbone
from torch.utils.data import DataLoader

import fused_margin


class Recognizer(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = make_backbone()
        self.loss_fn = fused_margin.CosFaceLoss(CLASSES, EMBEDDING_SIZE, margin=0.2, scale=16.0)
        self.losses: list[float] = []

    def training_step(self, batch, _):
        inputs, labels = batch
        loss = self.loss_fn(self.backbone(inputs), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(steps: int = 100) -> list[float]:
    """Trains; returns the losses."""
    torch.manual_seed(0)
    model = Recognizer()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches(steps), batch_size=None))
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    return model.losses


if __name__ == "__main__":
    main()
