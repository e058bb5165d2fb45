"""Text embeddings: finds the title of the same product in another shop, after training by ArcFace on other products.

Titles come from a grammar: shops order and abbreviate words differently, mistype them, leave one out and advertise. The
products of the search are other combinations of the same words; training must learn which spellings mean the same.
"""

import argparse
import itertools
import random
import zlib

import torch
from torch import nn

import fused_margin

# A product has one word of each line. A slash separates the spellings of a word.
WORDS = """acme norvik/nvk lumen/lmn taiga halcyon/hlcn orbis veritas/vrts kestrel/kstrl juno meridian/mrdn
laptop/notebook phone/handset headphones/earphones tablet/pad monitor/display/screen keyboard/kbd camera/cam
black/blk/noir white/wht/ivory silver/slv/platinum blue/navy red/crimson green/grn/olive grey/gray/graphite
small/sml/compact medium/med/regular large/lrg/big
64gb/64g 128gb/128g 256gb/256g 512gb/512g 1tb/1000gb
pro/professional lite/light max/maximum ultra/ult mini/mn plus basic/bsc"""
CHOICES = [[word.split("/") for word in line.split()] for line in WORDS.splitlines()]
ADVERTS = ["", "", "free shipping", "brand new", "best price", "2 year warranty", "fast delivery", "top seller"]
BUCKETS = 2**14


def write_title(product: list[list[str]]) -> str:
    words = [random.choice(spellings) for spellings in product]
    words = random.sample(words, len(words) - (random.random() < 0.3))  # in any order
    title = " ".join([*words, random.choice(ADVERTS)])
    return "".join(letter for letter in title if random.random() > 0.05)  # some letters are missing


def hash_ngrams(titles: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups of 2 to 4 letters in each word as numbers, and where each title begins: for nn.EmbeddingBag."""
    ids, offsets = [], []
    for title in titles:
        offsets.append(len(ids))
        for word in (f" {word} " for word in title.split()):
            ids += [zlib.crc32(word[i : i + n].encode()) % BUCKETS for n in (2, 3, 4) for i in range(len(word) - n + 1)]
    return torch.tensor(ids), torch.tensor(offsets)


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, and returns the share of unseen products that are found (recall at 1) every 100 steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--products", type=int, default=1000, help="number to train on; as many others are searched")
    options = parser.parse_args(arguments)
    random.seed(0)
    torch.manual_seed(0)
    products = random.sample(list(itertools.product(*CHOICES)), 2 * options.products)
    train, unseen = products[: options.products], products[options.products :]
    queries, shop = ([write_title(product) for product in unseen] for _ in range(2))
    bag = nn.EmbeddingBag(BUCKETS, 64)  # the embedding of a title is the mean over its n-grams, as in fastText
    loss_fn = fused_margin.ArcFaceLoss(options.products, 64, margin=0.3, scale=32.0)
    optimizer = torch.optim.AdamW([*bag.parameters(), *loss_fn.parameters()], lr=0.01)

    recall = []
    for step in range(options.steps + 1):
        if step % 100 == 0 or step == options.steps:
            with torch.no_grad():
                nearest = fused_margin.functional.nearest_class(bag(*hash_ngrams(queries)), bag(*hash_ngrams(shop)))
            recall.append((nearest.index == torch.arange(options.products)).float().mean().item())
            print(f"step {step}: {recall[-1]:.3f} of {options.products} unseen products found, such as")
            print(f"    {queries[0]!r}: {shop[nearest.index[0]]!r}, cosine {nearest.cosine[0]:.2f}")
        labels = torch.randint(options.products, (256,))
        loss = loss_fn(bag(*hash_ngrams([write_title(train[label]) for label in labels.tolist()])), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return recall


if __name__ == "__main__":
    main()
