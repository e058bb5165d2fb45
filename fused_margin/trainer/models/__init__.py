"""The networks and their configuration; `models.build` makes one from a training configuration."""

from .config import BackboneError, ModelConfig, Network
from .lenet import LeNet
from .resnet import ResNet

__all__ = ["BackboneError", "LeNet", "ModelConfig", "Network", "ResNet"]
