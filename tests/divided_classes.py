"""Random divisions of classes and samples among ranks, and the check of their losses."""

import torch
from hypothesis import strategies as st
from loss_inputs import relative_error
from ranks import MAX_RANKS

SAMPLE_COUNTS = {2: [9, 8], 3: [8, 4, 5]}  # of each rank, by the number of ranks


def draw_division(data):
    """The number of samples of each rank, and a number of classes, also fewer than ranks."""
    world_size = data.draw(st.integers(1, MAX_RANKS))
    counts = data.draw(st.lists(st.integers(0, 6), min_size=world_size, max_size=world_size))
    return counts, data.draw(st.integers(1, 40))


def check_losses(results, loss, reduction):
    """Compare each rank's loss, the first of its results, with that of one device, over all samples or its own."""
    losses = [own_loss for own_loss, *_ in results]
    if reduction == "none":
        assert relative_error(torch.cat(losses), loss) < 1e-9
    else:
        for own_loss in losses:
            torch.testing.assert_close(own_loss, loss, rtol=1e-10, atol=0, equal_nan=True)
