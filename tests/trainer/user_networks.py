"""Valid and invalid backbones, as a user might name them."""

from torch import nn


class BatchNormNet(nn.Module):
    """Convolution, batch norm, dropout and a linear layer, for grayscale images of any size."""

    def __init__(self, size: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(24, size))

    def forward(self, images):
        return self.head(self.layers(images))


class DataDependent(nn.Module):
    """Has data-dependent control flow, which cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, images):
        features = self.layer(images.flatten(1))
        return features if features.sum() > 0 else 2 * features


class StateOutsideStateDict(nn.Module):
    """Computes with a number that is not in its state dict."""

    instances = 0

    def __init__(self) -> None:
        super().__init__()
        StateOutsideStateDict.instances += 1
        self.layer, self.factor = nn.Linear(64, 4), StateOutsideStateDict.instances

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
