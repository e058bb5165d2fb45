"""The name that version 0.1 had for fused_margin.distributed."""

from fused_margin.distributed import Shard

__all__ = ["Shard"]
