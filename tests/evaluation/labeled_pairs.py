"""Pairs of labeled rows, for the tests of protocols that score them."""

import numpy as np


def pairs_of(labels, num_pairs, seed=1):
    """Pairs in random order, half of them genuine, and whether each is genuine."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(i, j) for i in range(len(labels)) for j in range(i)])
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    kinds = [rng.choice(np.flatnonzero(kind), num_pairs // 2, replace=False) for kind in (same, ~same)]
    chosen = rng.permutation(np.concatenate(kinds))
    return pairs[chosen], same[chosen]
