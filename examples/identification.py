"""Identification in an open set: enrol people that training has not seen, name them in new photographs, refuse strangers.

A photograph is a list of numbers: the properties of a person, mixed with those of the scene, which change more from picture
to picture than people differ. Training by ArcFace on other people finds what stays.
"""

import argparse

import numpy as np
import torch
from torch import nn

import fused_margin
from fused_margin.evaluation import enroll, estimate_threshold, identification, identify_by_verification, recognize

PERSON, SCENE, PIXELS = 16, 16, 256


def take_photographs(people: torch.Tensor, number: int, camera: torch.Tensor) -> torch.Tensor:
    """Photographs (people, number, PIXELS) of people (people, PERSON) in random scenes."""
    scene = 3 * torch.randn(len(people), number, SCENE)
    clean = torch.cat([people[:, None].expand(-1, number, -1), scene], dim=2) @ camera
    return torch.tanh(clean + 0.5 * torch.randn(clean.shape))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains, and returns the rates of the identification."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--far", type=float, default=0.01, help="share of strangers that may be taken for someone")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    camera = torch.randn(PERSON + SCENE, PIXELS) / 4
    train, others = torch.randn(2000, PERSON), torch.randn(300, PERSON)
    network = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, 64))
    loss_fn = fused_margin.ArcFaceLoss(len(train), 64, margin=0.3, scale=32.0)
    optimizer = torch.optim.AdamW([*network.parameters(), *loss_fn.parameters()], lr=2e-3)
    for step in range(options.steps):
        labels = torch.randint(len(train), (256,))
        loss = loss_fn(network(take_photographs(train[labels], 1, camera)[:, 0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.2f}")

    # Six photographs of each of 300 other people. 200 of them are enrolled with three; the rest are probes.
    with torch.no_grad():
        features = network(take_photographs(others, 6, camera)).numpy()
    names = np.array([f"person {number:03d}" for number in range(len(others))])
    enrolled, of_enrolled = features[:200, :3].reshape(-1, 64), names[:200].repeat(3)
    probes, of_probes = features[:, 3:].reshape(-1, 64), names.repeat(3)
    gallery = enroll(enrolled, of_enrolled)

    # The threshold comes from the gallery alone: its photographs, each compared with the other people.
    threshold = estimate_threshold(enrolled, of_enrolled, gallery, options.far).threshold
    result = identification(probes, of_probes, gallery)
    rates = {"rank-1": result.rank_rate(1), "FPIR": result.fpir(threshold), "FNIR": result.fnir(threshold)}
    rates["DIR"] = result.dir_at_far(options.far).dir
    verified = identify_by_verification(probes, of_probes, gallery, threshold)
    print(f"closed set: rank-1 {rates['rank-1']:.1%}, rank-5 {result.rank_rate(5):.1%} of {len(gallery.names)} people")
    print(f"open set at the estimated threshold {threshold:.3f}: {rates['FPIR']:.1%} of the strangers are accepted,")
    print(f"    {rates['FNIR']:.1%} of the known are missed; DIR at FAR {options.far:g}: {rates['DIR']:.1%}")
    print(
        f"by verification: {verified.correct:.1%} are accepted as themselves only, {verified.ambiguous:.1%} as others too"
    )
    # Person 250 is a stranger. Enrolment needs no training; the next photographs have a name.
    for people in (gallery, gallery.add(features[250, :3], [names[250]] * 3)):
        found = recognize(features[250, 3:], people, threshold, k=2)
        print(
            f"{len(people.names)} people enrolled: {names[250]} is",
            np.where(found.is_known, found.names[:, 0], "unknown"),
        )
    rates["recognized after enrolment"] = float(np.mean(found.is_known & (found.names[:, 0] == names[250])))
    return rates


if __name__ == "__main__":
    main()
