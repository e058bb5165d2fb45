"""A LightningModule with a margin loss, whose class weights are its parameters: Lightning saves, clips and moves them."""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fused_margin


class Recognizer(lightning.LightningModule):
    """A network from images to embeddings, trained by ArcFace."""

    def __init__(self, num_classes: int, embedding_size: int = 32, margin: float = 0.4, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, embedding_size))
        self.loss_fn = fused_margin.ArcFaceLoss(num_classes, embedding_size, margin, scale=16.0, exclusive_weight=0.1)

    def forward(self, images):
        return self.backbone(images)

    def on_train_epoch_start(self):  # the margin grows in the first half of the epochs
        progress = min(1.0, 2 * self.current_epoch / self.trainer.max_epochs)
        self.loss_fn.margin = self.hparams.margin * progress

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.loss_fn(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        accuracy = (self.loss_fn.logits(self(images)).argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def main(arguments: list[str] | None = None) -> float:
    """Trains, and returns the accuracy on the validation images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed, or 16-mixed on a GPU")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="a .ckpt file of an earlier run")
    parser.add_argument("--folder", default="runs/lightning", help="for checkpoints and logs")
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)

    digits = load_digits()  # 1,797 images of 8 x 8 pixels
    dataset = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, validation = random_split(dataset, [1400, 397])
    trainer = lightning.Trainer(
        max_epochs=options.epochs, precision=options.precision, gradient_clip_val=5.0, default_root_dir=options.folder,
        log_every_n_steps=10, devices=1,
    )  # fmt: skip
    model = Recognizer(num_classes=10)
    trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(validation, 397), ckpt_path=options.resume)
    accuracy = trainer.callback_metrics["val_accuracy"].item()
    print(f"accuracy on {len(validation)} other images: {accuracy:.3f}")
    print(f"checkpoint: {trainer.checkpoint_callback.best_model_path}")
    return accuracy


if __name__ == "__main__":
    main()
