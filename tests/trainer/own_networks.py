"""Backbones that a user could name, good and bad."""

from torch import nn


class BatchNormNet(nn.Module):
    """Convolution, batch norm, dropout and a full layer, for grayscale images of any size."""

    def __init__(self, size: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(24, size))

    def forward(self, images):
        return self.head(self.layers(images))


class Undecided(nn.Module):
    """Computes one thing or another, as its input is: no graph can say that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, images):
        features = self.layer(images.flatten(1))
        return features if features.sum() > 0 else 2 * features


class Forgetful(nn.Module):
    """Has a number to compute with that its state dict lacks."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Forgetful.made += 1
        self.layer, self.factor = nn.Linear(64, 4), Forgetful.made

    def forward(self, images):
        return self.layer(images.flatten(1)) * self.factor


def pair(images):
    return images, images


class Pair(nn.Module):
    forward = staticmethod(pair)


def integer_features():
    class Integers(nn.Module):
        def forward(self, images):
            return images.flatten(1).long()

    return Integers()


not_callable = 3
