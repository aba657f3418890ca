"""FLTrust: the server trusts a delta as far as it points where its own does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.payloads import Updates
from umbel.core.settings import Count, Fraction, Natural, Positive
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Combiner, Strategy
from umbel.strategies.parts.robust import Before, Rule, bound, mixture, product
from umbel.strategies.parts.robust_mixing import ClipNorm, Mixing
from umbel.strategies.parts.robust_momentum import client_momentum as momentum_rule
from umbel.strategies.parts.robust_rows import Cohort, gather, gram, mean
from umbel.strategies.parts.root import Root, RootTrainer


def fltrust(
    *,
    root_examples: Count = 100,
    f: Natural = 0,
    mixing: Mixing = "none",
    bucket_size: Count = 2,
    clip_norm: ClipNorm = None,
    client_momentum: Fraction = 0.0,
    server_lr: Positive = 1.0,
) -> Strategy:
    """Trust by the cosine with the server's own delta. Cao et al. 2021 (arXiv:2012.13995).

    Equation 3 and Algorithm 2: weights relu(cos), every delta as long as the server's, which trains
    each round as clients do, on examples that are taken out of the global test set.

    Args:
        root_examples: how many the server trains on.
        f: hostile clients in a cohort that the pre-step must stand; the rule stands any number.
        mixing: pre-step that averages each delta with its n - f - 1 nearest, or random buckets.
        bucket_size: ``bucketing``: deltas a bucket.
        clip_norm: bound on the L2 norm of each delta, before all else; ``adaptive``: a quantile.
        client_momentum: of the deltas, kept at each client (Karimireddy et al. 2021).
        server_lr: factor on the result, as in FedAvg.
    """
    before = Before(f, mixing, bucket_size, clip_norm)
    rule = Rule(f"fltrust with f = {f}", 1, "n >= 1", mean)

    def combiner(train: RootTrainer) -> Combiner:
        def finish(cohort: Cohort, model: Tree, names: Sequence[str]) -> dict[str, Tensor]:
            number = cohort.parts[0].round
            root = {name: delta[None] for name, delta in train(number, model).items()}
            one = torch.ones(1, dtype=torch.float64)
            # The name sorts before every client's, so that the server's row is the first.
            both = Cohort((Updates(number, [""], root, one), *cohort.parts))
            mixed = mixture(cohort, names, before)
            if mixed is None:
                mixed = torch.eye(len(cohort.clients()), dtype=torch.float64)
            matrix = torch.zeros(1 + len(mixed), 1 + mixed.shape[1], dtype=torch.float64)
            matrix[0, 0], matrix[1:, 1:] = 1.0, mixed
            inner = matrix @ gram(both, names) @ matrix.T
            weights = (trust(inner)[None] @ matrix).contiguous()
            return both.columns(model, names, lambda rows: product(weights, rows)[0])

        return gather(finish, *bound(rule, before))

    def nobody(number: int, model: Tree) -> Tree:
        raise InputError(
            "fltrust needs examples of the server's own, and this server has none",
            where="[strategy]",
            fix="simulate it with a global test set ([data] holdout), or choose 'median'",
        )

    return fedavg(server_lr=server_lr)._replace(
        client=momentum_rule(client_momentum),
        combine=combiner(nobody),
        root=Root(root_examples, combiner),
    )


def trust(inner: Tensor) -> Tensor:
    """(1 + n,): what each row counts for, the server's first, from their inner products.

    Zero for all where nobody is trusted, or where the server's own delta is zero.
    """
    lengths = inner.diagonal().clamp(min=0.0).sqrt()
    cosine = inner[0] / (lengths * lengths[0])
    scores = cosine.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0.0)
    scores[0] = 0.0
    weights = scores * (lengths[0] / lengths).nan_to_num(nan=0.0, posinf=0.0)
    total = scores.sum()
    return weights / total if total > 0 else torch.zeros_like(weights)
