"""Images and captions in one space, and classes that are asked for by a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.run_file import Part
from umbel.core.settings import Count, Positive
from umbel.datasets.federated import Info
from umbel.tasks.draws import repeated
from umbel.tasks.models.build import builder
from umbel.tasks.models.gpt import Block
from umbel.tasks.task import Batch, Forward, Task

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = ("a picture of a {}", "the digit {}", "{}, written by hand", "this is a {}")


class TwoTowers(nn.Module):
    """An image encoder, an encoder of characters, and the temperature of their softmax."""

    captions: Tensor

    def __init__(
        self, image: nn.Module, captions: Tensor, embedding: int, width: int, temperature: float
    ) -> None:
        super().__init__()
        self.image = image
        self.letters = nn.Embedding(128, width)
        self.places = nn.Embedding(captions.shape[2], width)
        self.block = Block(width, 4, 0.0, False)
        self.norm = nn.LayerNorm(width)
        self.text = nn.Linear(width, embedding)
        self.scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.register_buffer("captions", captions, persistent=False)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Images (B, …), the number of a prompt (1,) -> scaled cosines, (B, classes)."""
        seen = F.normalize(self.image(x), dim=1)
        said = self.captions[prompt].flatten(0, 1)
        t = self.letters(said) + self.places.weight
        inside = said > 0
        mask = torch.where(inside[:, None, None, :], 0.0, -1e9).to(t.dtype)
        t = self.norm(self.block(t, mask.expand(-1, 1, t.shape[1], -1)))
        mean = (t * inside[:, :, None]).sum(1) / inside.sum(1, keepdim=True)
        read = F.normalize(self.text(mean), dim=1)
        # As in section 2.5, the scale is kept from growing beyond 100.
        return seen @ read.T * self.scale.exp().clamp(max=100)


def clip(
    info: Info,
    model: Part | str | None,
    *,
    names: list[str] | None = None,
    prompts: list[str] | None = None,
    asked: str = "image of the number {}",
    embedding: Count = 32,
    width: Count = 32,
    temperature: Positive = 0.1,
) -> Task:
    """A small CLIP: an image and its caption find each other among those of the batch.

    Captions are made of the class's name and a prompt that is drawn for each batch. Those of the
    batch that say the same thing are all right, and share the target (Yang et al. 2022, equation 3,
    arXiv:2204.03610). Evaluation asks for classes in words that training never saw: ``zero_shot``,
    the share of images whose own class's sentence is the nearest.

    Args:
        info: of the data; ``y`` holds classes.
        model: the image encoder.
        names: of the classes, in ASCII; ``None``: the English numbers.
        prompts: sentences to train with, ``{}`` in the name's place; ``None``: four of them.
        asked: the sentence of evaluation.
        embedding: numbers that are compared.
        width: of the text encoder, one block over characters; a multiple of 4.
        temperature: that the softmax begins with; it is learned.

    Source: Radford et al. 2021, figure 3 (arXiv:2103.00020).
    """
    if info.classes is None:
        raise InputError(
            f"captions are made of classes; data set '{info.name}' has none",
            where="[task] kind",
            fix='kind = "self-supervised"',
        )
    classes = info.classes
    called = list(DIGITS[:classes]) if names is None else names
    if len(called) != classes:
        raise InputError(
            f"{len(called)} names for {classes} classes", where="[task] names", fix="name each"
        )
    said = [*(PROMPTS if prompts is None else prompts), asked]
    captions = _ascii([[prompt.replace("{}", name) for name in called] for prompt in said])
    image = builder(model, info, embedding, head="class")

    def build() -> nn.Module:
        return TwoTowers(image(), captions, embedding, width, temperature)

    def losses(forward: Forward, batch: Batch) -> Tensor:
        x, y = batch["x"], batch["y"]
        prompt = torch.randint(len(said) - 1, (1,), device=x.device)
        logits = forward(x, prompt)[:, y]
        same = (y[:, None] == y[None]).to(logits)
        target = same / same.sum(1, keepdim=True)
        of_images = -(target * logits.log_softmax(1)).sum(1)
        of_texts = -(target * logits.log_softmax(0)).sum(0)
        return (of_images + of_texts) / 2

    def metrics(forward: Forward, batch: Batch) -> Mapping[str, Tensor]:
        last = torch.full((1,), len(said) - 1, device=batch["x"].device)
        right = forward(batch["x"], last).argmax(1) == batch["y"]
        return {"zero_shot": right.float()}

    test = Task(build, repeated(losses), metrics, decomposable=False)
    return Task(build, losses, lambda forward, batch: {}, decomposable=False, test=test)


def _ascii(sentences: list[list[str]]) -> Tensor:
    """Sentences by prompt and class as (prompts, classes, characters) of ASCII, 0 at the end."""
    flat = [sentence for row in sentences for sentence in row]
    if odd := [s for s in flat if not s or not s.isascii()]:
        raise InputError(
            f"caption {odd[0]!r} is empty or not ASCII", where="[task]", fix="spell it in ASCII"
        )
    found = torch.zeros(len(sentences), len(sentences[0]), max(map(len, flat)), dtype=torch.int64)
    for p, row in enumerate(sentences):
        for c, sentence in enumerate(row):
            found[p, c, : len(sentence)] = torch.tensor(list(sentence.encode("ascii")))
    return found
