"""A small GPT is pretrained on Python's own documentation, which ships with Python, and fine-tuned on its source code.

It is fine-tuned from the same weights at equal steps: as it is, with torch's checkpoint, and made reversible by two
schemes. With BDIA it is evaluated as the model it was, while its first step of training is far from the pretrained
function; with retrofit both are near the pretrained function, and neither is that function. The table has the loss on code that was not trained on, in nats for each
byte; the peak of a step beside weights and their gradients; and the time of a step over the plain one's.
"""

import argparse
import inspect
import textwrap
from collections.abc import Sequence
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from examples.transformer import Batches, Transformer, loss_of, plain, reversible, table, torch_checkpoint, train, tried

BYTES = 256
WAYS = {
    "plain": plain,
    "torch's checkpoint": torch_checkpoint,
    "reversible, bdia": reversible("bdia"),
    "reversible, retrofit": reversible("retrofit"),
}


def prose() -> Tensor:
    """The documentation, as bytes."""
    return _bytes("\n".join(topics.values()))


def code() -> tuple[Tensor, Tensor]:
    """Source code of the standard library for training and for the test, as bytes."""
    parts = _bytes(inspect.getsource(argparse)), _bytes(inspect.getsource(textwrap))
    return parts


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(text: Tensor, count: int, length: int) -> Batches:
    """Windows of a text; each byte is to be predicted by those before it."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
        windows = torch.stack([text[start : start + length + 1] for start in starts])
        return windows[:, :-1], windows[:, 1:]

    return batch


def main(arguments: Sequence[str] | None = None) -> str:
    """Pretrain, fine-tune, and return the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"depth": 8, "width": 64, "length": 64, "batch": 16, "pretrain": 400, "steps": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(nn.Embedding(BYTES, given.width), given.length, given.width, given.depth, BYTES, is_causal=True)
    train(model, batches(prose(), given.batch, given.length), given.pretrain, 1e-3)
    training, test = code()
    held_out = [batches(test, given.batch, given.length)(-1 - i) for i in range(8)]

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return sum(loss_of(model, *batch).item() for batch in held_out) / len(held_out)

    rows = tried(model, WAYS, batches(training, given.batch, given.length), given.steps, score, 5e-4)
    return f"before: {score(model):.3f}\n\n{table(rows, 'validation loss')}"


if __name__ == "__main__":
    print(main())
