"""The correlated noise of one run: its secret and its last release, on disk before it is used.

A later round takes back noise of earlier ones, so that a server which goes on after a crash must
have the noise that it had; and must not give out another sum under noise that is known already, for
then the difference of the two is bare. Hence the secret is durable before the first release, and
each release before anybody sees it: a round that was released, and then not committed, is not run
again but read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from umbel.core.canonical import canonical_json
from umbel.core.errors import RunError
from umbel.core.trees import Tree
from umbel.privacy.correlated_noise import Correlated, CorrelatedNoise
from umbel.privacy.sources import Sources
from umbel.server.checkpoints import replace_file

SECRET = "noise.json"
"""In the run's folder, for its owner alone: who has it can take the noise off every model that the
run gave out. It is deleted when the run has finished."""

RELEASED = "released.safetensors"


class Released(NamedTuple):
    """What a round gave out.

    Args:
        tree: the noised sum of clipped deltas, name -> (*shape) float64.
        came: how many clients were in it.
    """

    tree: dict[str, Any]
    came: int


class RunNoise:
    """Adds the noise of a run's plan to the sums of its rounds, each once.

    Args:
        plan: of the run.
        folder: of the run.
        sources: of the server's randomness; what is ``seeded`` is drawn again, not kept.
        clients: the federation's: with others, they would come back sooner than planned.
        begun: whether the run has released anything.

    Raises:
        RunError: the run began with other noise or other clients.
    """

    def __init__(
        self,
        plan: Correlated,
        folder: Path,
        sources: Sources,
        clients: Sequence[str],
        begun: bool,
    ) -> None:
        self._folder, self._plan = folder, plan
        stream = sources(0, "noise secret").stream
        self._durable = stream.generator == "os"
        names = hashlib.sha256(canonical_json(list(clients)).encode()).hexdigest()
        about = {"mechanism": plan.mechanism().table(), "clip_norm": plan.clip_norm}
        about |= {"coefficients": list(plan.coefficients), "clients": names}
        fresh = stream.words(4).tobytes()
        secret = self._kept(fresh, about, begun) if self._durable else fresh
        self._noise = None if secret is None else CorrelatedNoise(plan, secret, stream.generator)

    def add(self, total: Tree, number: int, since: int, came: int) -> dict[str, Any]:
        """The noised sum of round ``number``; durable when it returns, where people are protected.

        Args:
            total: name -> (*shape) float64, of clipped contributions.
            number: 1 …
            since: the last round that had a result.
            came: how many contributed.

        Raises:
            RunError: the secret of a run that has begun is gone.
        """
        if self._noise is None:
            raise RunError(
                "the secret of this run's noise is gone, and other noise would bare its sums",
                where=str(self._folder / SECRET),
                fix="keep the model that there is, and begin a new run",
            )
        noisy = self._noise.add(total, number, since)
        if self._durable:
            import safetensors.torch

            about = {"round": str(number), "came": str(came)}
            replace_file(
                self._folder / RELEASED,
                lambda path: safetensors.torch.save_file(noisy, path, about),
            )
        return noisy

    def released(self, number: int) -> Released | None:
        """What round ``number`` gave out before this process began; ``None``: nothing.

        Raises:
            RunError: a later round was given out: the run's checkpoints are older than its noise.
        """
        path = self._folder / RELEASED
        if not self._durable or not path.exists():
            return None
        import safetensors

        with safetensors.safe_open(path, framework="pt") as document:
            about = document.metadata()
            last = int(about["round"])
            if last > number:
                raise RunError(
                    f"round {last} was released, and the run would go on with round {number}: "
                    "another sum under noise that is known already would be bare",
                    where=str(self._folder),
                    fix="was the store restored from a backup? begin a new run",
                )
            if last < number:
                return None
            tree = {name: document.get_tensor(name) for name in document.keys()}  # noqa: SIM118
        return Released(tree, int(about["came"]))

    def forget(self) -> None:
        """Deletes the secret of a run that has finished."""
        for name in (SECRET, RELEASED):
            (self._folder / name).unlink(missing_ok=True)

    def _kept(self, fresh: bytes, about: dict[str, Any], begun: bool) -> bytes | None:
        """The secret of this run: what was kept, or ``fresh``, kept before it returns."""
        path = self._folder / SECRET
        if not path.exists():
            if begun:
                return None
            text = json.dumps({"secret": fresh.hex(), **about})
            replace_file(path, lambda temporary: _write_private(temporary, text))
            return fresh
        found = json.loads(path.read_text())
        secret = bytes.fromhex(found.pop("secret"))
        for key, value in about.items():
            if found.get(key) != value:
                raise RunError(
                    f"the noise of this run was planned for another '{key}'",
                    where=str(path),
                    fix="go on with the same run file and the same sites, or begin a new run",
                )
        return secret


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
