"""The table of strategies: what enrols one in every check that all of them pass."""

from __future__ import annotations

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A strategy and the settings with which it finds the optimum of a quadratic in 150 rounds.

    ``agreed``: where all clients have the same one. A rule that trusts no client alone finds no
    mean of clients that contradict each other; k-means counts examples, which have no number here.
    ``adapts``: after one step of the learned rates.
    """

    name: str
    parameters: dict[str, Any]
    agreed: bool = False
    adapts: bool = False


TABLE = [
    Row("apfl", {"alpha": 0.3}),
    Row("bulyan", {"f": 0}, agreed=True),
    Row("centred-clipping", {"tau": 3.0}, agreed=True),
    Row("ditto", {"lam": 0.2}),
    Row("fedadagrad", {"server_lr": 1.0}),
    Row("fedadam", {"server_lr": 0.1, "tau": 0.1}),
    Row("fedasync", {"alpha": 1.0}),
    Row("fedavg", {}),
    Row("fedavgm", {"momentum": 0.5}),
    Row("fedbn", {}),
    Row("fedbuff", {"buffer": 2}),
    Row("fedcurv", {"strength": 0.1}, agreed=True),
    Row("feddyn", {"alpha": 0.1}),
    Row("fedema", {"tau": 0.2}, agreed=True),
    Row("fedex-lora", {}),
    Row("fedit", {}),
    Row("fednova", {}),
    Row("fedper", {"head": "half"}),
    Row("fedprox", {"mu": 0.1}),
    Row("fedrep", {"head": "half"}),
    Row("fedsa-lora", {}),
    Row("fedu", {"predictor": "half"}),
    Row("fedyogi", {"server_lr": 0.1, "tau": 0.1}),
    Row("ffa-lora", {}),
    Row("flexlora", {}),
    Row("flora", {}),
    Row("fltrust", {"root_examples": 5}, agreed=True),
    Row("fomaml", {"inner_lr": 0.1}),
    Row("geometric-median", {}, agreed=True),
    Row("gradnorm", {}),
    Row("kmeans", {}, agreed=True),
    Row("krum", {"f": 0}, agreed=True),
    Row("lgfedavg", {"head": "[!h]*"}),
    Row("maml", {"inner_lr": 0.1}),
    Row("meamed", {"f": 1}, agreed=True),
    Row("median", {}, agreed=True),
    Row("meta-sgd", {"inner_lr": 0.1}, agreed=True, adapts=True),
    Row("moon", {"mu": 0.01}),
    Row("multi-krum", {"f": 0, "m": 2}, agreed=True),
    Row("norm-bounding", {"clip_norm": 3.0}),
    Row("pcgrad", {}),
    Row("per-fedavg", {"inner_lr": 0.1}),
    Row("pfedme", {"lam": 2.0, "inner_lr": 0.2}),
    Row("qfedavg", {"q": 1.0}, agreed=True),
    Row("reptile", {}),
    Row("rolora", {}),
    Row("scaffold", {}),
    Row("trimmed-mean", {"f": 1}, agreed=True),
]
