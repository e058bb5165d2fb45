"""The benchmark of a training step of a loss beside other implementations: `fused-margin benchmark`."""
