"""The name of fused_margin.distributed in version 0.1."""

from fused_margin.distributed import Shard

__all__ = ["Shard"]
