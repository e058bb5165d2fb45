"""Training: loop, criterion, optimizer, checkpoints, devices and logs."""
