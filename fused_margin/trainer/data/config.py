"""The options of the augmentation. The docstrings of the fields are their help."""

from __future__ import annotations

from dataclasses import dataclass

HIGHEST_QUALITY = 95  # of JPEG; Pillow advises against higher ones


@dataclass(frozen=True)
class AugmentationConfig:
    """Random augmentation of the training images. 0 disables a transform."""

    rotation: float = 10.0
    """Largest rotation in degrees, in either direction."""
    scale: float = 0.1
    """Largest relative change of size, up or down, independently for each axis."""
    shear: float = 0.1
    """Largest shear in either direction: horizontal shift over vertical distance."""
    shift: float = 0.06
    """Largest translation as a share of the image side, in either direction, independently for each axis."""
    blur: float = 0.8
    """Largest standard deviation of the Gaussian blur, in pixels."""
    noise: float = 0.15
    """Largest standard deviation of the Gaussian noise. Black to white is 2."""
    occlusion: float = 0.0
    """Largest share of the image that a rectangle of random pixels covers (random erasing)."""
    brightness: float = 0.0
    """Largest relative change of brightness, up or down: 0.4 multiplies by 0.6 to 1.4."""
    contrast: float = 0.0
    """Largest relative change of contrast, up or down, about the mean gray of the image."""
    saturation: float = 0.0
    """Largest relative change of saturation, up or down. Gray images stay as they are."""
    resolution: float = 0.0
    """Largest loss of resolution: 0.75 reduces the sides to a quarter at most, and enlarges the image again."""
    jpeg: int = 0
    """Lowest quality of JPEG compression, such as 30. The highest is 95."""
    mirror: bool = False
    """Mirror half of the images horizontally. Suitable for faces, not for characters."""

    def __post_init__(self) -> None:
        for name in ("rotation", "shear", "shift", "blur", "noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("scale", "occlusion", "resolution"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.jpeg <= HIGHEST_QUALITY:
            raise ValueError(f"jpeg must be in [0, {HIGHEST_QUALITY}], got {self.jpeg}")
