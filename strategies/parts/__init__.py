"""What strategies are composed of: client rules, combiners and server steps, each pure."""

from umbel.strategies.parts.combine import Combined, Combiner, weighted_mean
from umbel.strategies.parts.rule import (
    ClientRule,
    Delivered,
    Ended,
    GradTransform,
    Local,
    LossTerm,
    Trees,
)
from umbel.strategies.parts.strategy import ServerState, Strategy

__all__ = [
    "ClientRule",
    "Combined",
    "Combiner",
    "Delivered",
    "Ended",
    "GradTransform",
    "Local",
    "LossTerm",
    "ServerState",
    "Strategy",
    "Trees",
    "weighted_mean",
]
