"""``umbel epsilon``: what releases cost, or how much noise a budget asks for; without a run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from umbel.cli import output
from umbel.cli.output import Format, FormatOption
from umbel.core.errors import InputError

WHERE = "umbel epsilon"


def epsilon(
    noise: Annotated[
        list[float] | None,
        typer.Option("--noise", metavar="Z", help="Noise multiplier: std over clip norm."),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            "--rate", metavar="Q", help="Of Poisson sampling that nobody sees; 1: everybody."
        ),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", metavar="T", help="How many releases.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option("--target", metavar="E", help="An epsilon to find the noise of."),
    ] = None,
    delta: Annotated[float, typer.Option("--delta", metavar="D", help="Of the guarantee.")] = 1e-5,
    replace: Annotated[
        bool, typer.Option("--replace-one", help="A unit is replaced, not added or removed.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Tell what Gaussian releases cost, or the noise that a budget asks for.

    `umbel epsilon --noise 1.1 --rate 0.01 --steps 10000`. Repeat the three for releases of several
    kinds. With `--target 3 --rate 0.0625 --steps 1600` and no noise: the least that keeps it.
    """
    from umbel.privacy.mechanisms import EVERYONE, Relation, Sampling

    times = steps or []
    rates = rate or [1.0] * len(times)
    given: list[list[float] | None] = [[*times], rates, *([noise] if target is None else [])]
    if not times or any(part is None or len(part) != len(times) for part in given):
        raise InputError(
            "every kind of release needs a noise, a rate and a number of steps",
            where=WHERE,
            fix="--noise 1.1 --rate 0.01 --steps 10000, as often as there are kinds",
        )
    if target is not None and (noise or len(times) > 1):
        raise InputError(
            "--target finds the noise of one kind of release",
            where=WHERE,
            fix="--target 3 --rate 0.0625 --steps 1600, without --noise",
        )
    relation: Relation = "replace-one" if replace else "add-or-remove-one"
    how = [EVERYONE if q == 1 else Sampling("poisson", q, "as the command says") for q in rates]
    found: dict[str, Any] = {"delta": delta, "relation": relation}
    if target is not None:
        from umbel.privacy.calibration import noise_multiplier

        noise = [noise_multiplier(target, delta, times[0], how[0], relation)]
        found["noise_multiplier"] = noise[0]
    from umbel.privacy.accounting import compose, pld_epsilon, rdp_epsilon
    from umbel.privacy.mechanisms import Gaussian

    assert noise is not None
    kinds = zip(noise, how, times, strict=True)
    history = compose(*((Gaussian(z, sampling, relation), t) for z, sampling, t in kinds))
    tight, online = pld_epsilon(history, delta), rdp_epsilon(history, delta)
    found |= {"epsilon": min(tight, online), "pld": tight, "rdp": online}
    if format is Format.json:
        output.emit(found)
    else:
        output.table(["privacy", ""], [(k.replace("_", " "), v) for k, v in found.items()], left=2)
