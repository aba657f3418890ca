"""What federation buys an encoder, in fewer rounds than the recipe's."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbel.simulations.benchmarks.self_supervised import few_labels, run_file, trained
from umbel.simulations.prepare import prepare


@pytest.mark.slow
def test_a_federated_encoder_needs_fewer_labels_than_an_untrained_one(tmp_path: Path) -> None:
    run = run_file("byol", 20, str(tmp_path), 1, pooled=False)
    prepared = prepare(run)
    untrained, federated = (few_labels(prepared, m) for m in (prepared.model(), trained(run)))
    assert federated >= untrained + 0.03  # 0.06 was seen
