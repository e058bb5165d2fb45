"""The networks and their configuration; `models.build` makes one from a training configuration."""

from .config import BackboneError, ModelConfig, Network
from .groupface import GroupFaceNetwork
from .lenet import LeNet
from .resnet import ResNet

__all__ = ["BackboneError", "GroupFaceNetwork", "LeNet", "ModelConfig", "Network", "ResNet"]
