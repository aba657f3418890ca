"""The character model of the FedAvg paper."""

from __future__ import annotations

from torch import Tensor, nn

from umbel.core.settings import Count
from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs


class CharLSTM(nn.Module):
    """Embedding, stacked LSTM, and a linear layer on the last state."""

    def __init__(
        self, symbols: int, outputs: int, embedding: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, length) int64 symbols -> (B, outputs)."""
        states, _ = self.lstm(self.embedding(x))
        out: Tensor = self.head(states[:, -1])
        return out


def char_lstm(
    info: Info, outputs: int, *, embedding: Count = 8, hidden: Count = 256, layers: Count = 2
) -> nn.Module:
    """McMahan's character LSTM: reads a window of text, predicts the next character.

    Args:
        info: of the data; ``x`` is symbols.
        outputs: number of symbols to choose from.
        embedding: dimensions a symbol.
        hidden: units a layer.
        layers: of the LSTM.

    Source: McMahan et al. 2017, section 3 (arXiv:1602.05629).
    """
    needs(info, "char-lstm", symbols=True)
    assert info.vocabulary is not None
    return CharLSTM(info.vocabulary, outputs, embedding, hidden, layers)
