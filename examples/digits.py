"""A vision transformer and its reversible counterpart learn scikit-learn's handwritten digits, from the same weights.

Each image of 8x8 pixels is 16 patches. The reversible one has the same parameters on two streams, as RevViT has. The
table has the accuracy on images that were not trained on, the peak of a step beside weights and their gradients, and
the time of a step over the plain one's.

Source:
    Mangalam et al., Reversible Vision Transformers (2022).
"""

import argparse
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from examples.transformer import Transformer, plain, reversible, table, torch_checkpoint, tried

PATCH, PATCHES, DIGITS = 4, 16, 10
WAYS = {"ViT": plain, "ViT, torch's checkpoint": torch_checkpoint, "RevViT": reversible("couple")}


def images() -> tuple[Tensor, Tensor]:
    """Patches (N, 16, 4) between -1 and 1, and digits (N,), in one random order."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    grid = torch.from_numpy(pixels).float().view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4)
    return (grid.reshape(-1, PATCHES, PATCH) / 8 - 1)[order], torch.from_numpy(digits).long()[order]


class Mean(nn.Module):
    """The mean over the patches, before the head."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def main(arguments: Sequence[str] | None = None) -> str:
    """Train in each way, and return the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"depth": 8, "width": 48, "batch": 64, "steps": 300}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(nn.Linear(PATCH, given.width), PATCHES, given.width, given.depth, DIGITS, is_causal=False)
    model.head = nn.Sequential(Mean(), model.head)
    x, digits = images()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(1400, (given.batch,), generator=torch.Generator().manual_seed(step))
        return x[chosen], digits[chosen]

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return (model(x[1400:]).argmax(1) == digits[1400:]).float().mean().item()

    return table(tried(model, WAYS, batch, given.steps, score, 2e-3), "accuracy")


if __name__ == "__main__":
    print(main())
