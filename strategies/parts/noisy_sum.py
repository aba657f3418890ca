"""What goes under the masks where each client adds its share of the noise: whole numbers.

In the place of :class:`~umbel.strategies.parts.secure_sum.SecureSum`. The vector is the clipped and
weighted delta, rotated, rounded and noised; nothing else travels, no weight, no count and no
metric, which nobody would have paid for. Its numbers fill the ring, and the sum is meant to go
round it: the ring is the modulus of the proof.
"""

from __future__ import annotations

import numpy as np
import torch

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.run_file import RunFile
from umbel.core.trees import Tree
from umbel.privacy import distributed
from umbel.privacy.clipping import zeroing
from umbel.privacy.participation import noise_of, shares
from umbel.privacy.secure_aggregation.keystream import Words
from umbel.privacy.streams import Stream, seeded_stream


class NoisySum:
    """Turns a client's update into its noised vector, and the sum of vectors into a delta.

    Client and server make the same one from the run file and the model.

    Args:
        run: with noise, cohort and ``min_cohort``, as whoever conducts it has set them.
        template: name -> (*shape): what one client's delta holds.
        buffers: those of its names that are not released: their deltas count as zero.
        round_number: the rotation is another in each.
    Raises:
        InputError: the ring is too small for so many clients.
    """

    modular = True

    def __init__(
        self, run: RunFile, template: Tree, buffers: frozenset[str], round_number: int
    ) -> None:
        section, cohort = run.privacy, run.strategy.cohort
        if section.noise_multiplier is None:
            raise InputError(
                "the noise multiplier of this run was not calibrated",
                where="[privacy]",
                fix="whoever conducts a run sets noise_multiplier before it starts",
            )
        least = shares(run)
        assert isinstance(cohort, int)
        self._template, self._buffers = template, buffers
        self._names = [name for name in sorted(template) if name not in buffers]
        self._sizes = [template[name].numel() for name in self._names]
        self._clip = zeroing(section.clip_norm, self._names, section.clipping == "per-layer")
        uniform = run.strategy.weights == "uniform"
        self._cap = 1.0 if uniform else float(run.strategy.max_weight or 1.0)
        self._grid = distributed.sized(
            length=sum(self._sizes),
            clip_norm=section.clip_norm,
            noise_multiplier=section.noise_multiplier,
            bits=run.secure_aggregation.bits,
            clients=cohort,
            survivors=least,
            noise=noise_of(section),
        )
        # Public, and the same at all clients.
        rotation = seeded_stream(run.run.seed, "rotation", round_number)
        self._diagonal = distributed.signs(self._grid, rotation)

    @property
    def size(self) -> int:
        """Numbers in the vector: the least power of two that holds the model."""
        return self._grid.padded

    @property
    def value_bits(self) -> int:
        """Of each number: those of the ring."""
        return self._grid.bits

    def encode(self, updates: Updates, private: Stream) -> Words:
        """The vector of one client, shape (size,).

        Args:
            updates: of one client; what is not finite, or too long, contributes nothing or less.
            private: the client's own stream, of the operating system outside simulations.
        """
        params = {name: updates.delta[name] for name in self._names}
        clipped = self._clip(params, stacked=True).tree
        share = min(float(updates.weights[0]) / self._cap, 1.0)
        flat = [clipped[name][0].detach().cpu().double().reshape(-1) for name in self._names]
        vector = torch.cat(flat).numpy() * share
        whole = distributed.encode(vector, self._grid, self._diagonal, private)
        return whole.astype(np.uint32)

    def decode(self, words: Words) -> dict[str, torch.Tensor]:
        """The noised sum of the clients' contributions, name -> (*shape) float64; buffers zero."""
        total = distributed.decode(words.astype(np.int64), self._grid, self._diagonal)
        parts = iter(torch.split(torch.from_numpy(total), self._sizes))
        found = {name: next(parts).reshape(self._template[name].shape) for name in self._names}
        return {
            name: found.get(name, torch.zeros(t.shape, dtype=torch.float64))
            for name, t in self._template.items()
        }
