"""The operators beneath the public API: orchestration over chunks of classes, torch.library registration."""
