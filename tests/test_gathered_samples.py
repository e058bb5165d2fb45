"""Losses over pairs of samples of several ranks: gathered embeddings, and the sum of their gradients over ranks."""

import pytest
import torch
from loss_inputs import leaf
from ranks import RankError

from fused_margin._ops.collectives import gather_batch
from fused_margin.distributed import Shard


def sum_over_pairs(embeddings, others, labels, all_labels):
    """A function of own samples and all samples that is not symmetric in them."""
    return ((embeddings @ others.t()).tanh() * (1 + labels.unsqueeze(1) - 2 * all_labels)).sum()


def one_rank(group, embeddings, labels):
    embeddings = leaf(embeddings)
    others, all_labels, begin = gather_batch(embeddings, labels, Shard(1, group))
    sum_over_pairs(embeddings, others, labels, all_labels).backward()
    return others.detach(), all_labels, begin, embeddings.grad


@pytest.mark.parametrize("counts", [[3], [2, 5], [0, 4, 1]])
def test_gradients_of_all_ranks_are_summed(ranks, counts):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(sum(counts), 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(sum(counts))
    results = ranks.run(one_rank, list(zip(samples.split(counts), labels.split(counts), strict=True)))
    expected = leaf(samples)
    sum_over_pairs(expected, expected, labels, labels).backward()
    torch.testing.assert_close(torch.cat([gradient for *_, gradient in results]), expected.grad)
    for rank, (others, all_labels, begin, _) in enumerate(results):
        assert torch.equal(others, samples) and torch.equal(all_labels, labels) and begin == sum(counts[:rank])


def test_different_ranks_are_refused_on_all(ranks):
    with pytest.raises(RankError, match=r"(?s)rank 0: .*embedding_size 3.*rank 1: .*embedding_size 3"):
        ranks.run(one_rank, [(torch.ones(2, size), torch.zeros(2, dtype=torch.int64)) for size in (3, 4)])
