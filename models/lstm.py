"""The forecaster: one LSTM shared by all nodes and targets, with residual quantile heads.

A head does not predict a value but a correction: its median is a convex mix of anchors (last value, short and long
mean, the node's own ridge) plus a multiple of what the best of them is usually off by on this node. An untrained or
puzzled net is therefore close to the last value, whatever the node's level and units.

Heads, in order: one for each of `HORIZONS_S`, then the mean and the greatest value (least headroom) over the window.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.features import N_ANCHORS, N_EXTENDED_FEATURES, N_FEATURES
from models.grid import N_HEADS
from shadecast.errors import ConfigError
from shadecast.types import QUANTILES

N_QUANTILES = len(QUANTILES)
State = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LstmConfig:
    """Shape of the net; stored in the card, so that weights are never loaded into another shape."""

    features: int = N_FEATURES
    anchors: int = N_ANCHORS
    hidden: int = 128
    layers: int = 1
    mlp: int = 96

    def __post_init__(self) -> None:
        for name in ("features", "anchors", "hidden", "layers", "mlp"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= 1024:
                raise ConfigError(f"lstm.{name} = {value!r}: must be a whole number from 1 to 1024")

    @property
    def extended(self) -> bool:
        """Whether the net sees the further channels."""
        return self.features == N_EXTENDED_FEATURES

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Self:
        """Build from a card's plain mapping; raises ConfigError on unknown or missing names."""
        if set(values) != set(asdict(cls())):
            raise ConfigError(f"lstm = {values!r}: must have exactly {', '.join(asdict(cls()))}")
        return cls(**values)


class ForecastNet(nn.Module):
    """LSTM over features, two dense layers over its state and the features, one linear layer for all heads."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.config = config
        self.lstm = nn.LSTM(config.features, config.hidden, config.layers, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden + config.features, config.mlp),
            nn.GELU(),
            nn.Linear(config.mlp, config.mlp),
            nn.GELU(),
        )
        self.head = nn.Linear(config.mlp + config.features, N_HEADS * (config.anchors + N_QUANTILES))
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            mix = self.head.bias.view(N_HEADS, config.anchors + N_QUANTILES)
            mix[:, 0] = 2.0

    def forward(
        self, inputs: Tensor, anchors: Tensor, spread: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Whole windows or single steps alike.

        inputs [batch, time, feature]; anchors [batch, time, head, anchor]; spread [batch, time, head].
        Returns quantiles [batch, time, head, quantile], rising, in the unit of the anchors, and the state after the
        last step.
        """
        hidden, state = self.lstm(inputs, state)
        deep = self.mlp(torch.cat([hidden, inputs], dim=-1))
        out = self.head(torch.cat([deep, inputs], dim=-1))
        table = out.unflatten(-1, (N_HEADS, self.config.anchors + N_QUANTILES))
        mix = torch.softmax(table[..., : self.config.anchors], dim=-1)
        base = (mix * anchors).sum(-1)
        low, middle, high = table[..., self.config.anchors :].unbind(-1)
        median = base + spread * middle
        quantiles = torch.stack(
            [
                median - spread * nn.functional.softplus(low),
                median,
                median + spread * nn.functional.softplus(high),
            ],
            dim=-1,
        )
        return quantiles, state


def pinball(quantiles: Tensor, truth: Tensor) -> Tensor:
    """Pinball loss [..., quantile] of predicted quantiles against `truth` [...] (Koenker and Bassett, 1978)."""
    tau = torch.tensor(QUANTILES, dtype=quantiles.dtype, device=quantiles.device)
    gap = truth.unsqueeze(-1) - quantiles
    return torch.maximum(tau * gap, (tau - 1.0) * gap)
