"""Floor 1: trees, run file, payloads, randomness, errors, registry. Imports nothing of Umbel."""
