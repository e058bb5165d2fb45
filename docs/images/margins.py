"""Draws margins.png: what each loss asks of a sample, as logits and as decision boundaries. `python docs/images/margins.py`"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from fused_margin import Margin
from fused_margin.margins import CM1, psi

LOSSES = [
    ("NormFace: no margin", Margin(), "#5b6770", "--"),
    ("SphereFace, m1 = 1.35", Margin(m1=1.35), "#9467bd", "-"),
    ("CosFace, m3 = 0.35", Margin(m3=0.35), "#2ca02c", "-"),
    ("ArcFace, m2 = 0.5", Margin(m2=0.5), "#d62728", "-"),
    ("combined (CM1)", Margin(**CM1), "#1f77b4", "-"),
]


def main() -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (logits, boundaries) = plt.subplots(1, 2, figsize=(11, 4.6), dpi=110)
    theta = torch.linspace(0, math.pi, 721, dtype=torch.float64)
    degrees = theta.rad2deg()
    for name, margin, color, style in LOSSES:
        target = psi(theta.cos(), margin)
        logits.plot(degrees, target, style, color=color, label=name, linewidth=2)
        other = torch.where(target >= -1, target.clamp(-1, 1).acos().rad2deg(), torch.nan)  # cos(other) = psi(theta)
        boundaries.plot(other, degrees, style, color=color, linewidth=2)
    logits.set(
        xlabel="angle to the sample's own class, degrees",
        ylabel="target logit / scale",
        xlim=(0, 180),
        ylim=(-1.65, 1.08),
    )
    logits.set_title("The logit of the own class", fontsize=12)
    logits.legend(frameon=False, fontsize=10)
    boundaries.set(
        xlabel="angle to the other class, degrees",
        ylabel="angle to the own class, degrees",
        xlim=(0, 120),
        ylim=(0, 120),
    )
    boundaries.set_aspect("equal")
    boundaries.set_title("Where both logits are equal", fontsize=12)
    boundaries.fill_between([0, 180], [0, 180], 0, color="#5b6770", alpha=0.08, linewidth=0)
    boundaries.annotate("nearer to the own class", (60, 12), color="#5b6770", fontsize=10)
    figure.tight_layout(w_pad=3)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
