"""Pairs of labelled rows, for the tests of what scores them."""

import numpy as np


def pairs_of(labels, num_pairs, seed=1):
    """Pairs, half of them of one identity in random order, and whether they are."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(len(labels)) for j in range(i)])
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    kinds = [rng.choice(np.flatnonzero(kind), num_pairs // 2, replace=False) for kind in (same, ~same)]
    chosen = rng.permutation(np.concatenate(kinds))
    return pairs[chosen], same[chosen]
