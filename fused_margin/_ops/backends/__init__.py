"""Backends, which compute the inner products of a call: portable kernels around torch.mm, or tensor-core kernels."""
