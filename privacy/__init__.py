"""Floor 2: clipping, noise, ledger, secure aggregation, audits."""
