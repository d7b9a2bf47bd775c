"""What a simulated recording contains."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Attack = Literal["syn-flood", "ssh-brute-force", "refused-beacon", "port-scan", "bulk-exfiltration", "dns-tunnel"]
HardNegative = Literal["store-restart", "database-outage"]

WARM_UP_MINUTES: Final = 30
"""Attacks and hard negatives begin after this time, so that a baseline can learn what is usual."""

TRAINING_SEED: Final = 42
"""Of the embedded recording, which models are trained on."""
NEW_SEED: Final = 43
"""Of the recordings that a model in production is shown: none of their flows was in its training."""

GROUPS: Final[dict[Attack, str]] = {
    "syn-flood": "flood",
    "ssh-brute-force": "brute-force",
    "refused-beacon": "beacon",
    "port-scan": "scan",
    "bulk-exfiltration": "exfiltration",
    "dns-tunnel": "tunnel",
}
"""Families in groups of similar kinds; a group is held out of training as a whole."""

HARD_NEGATIVES: Final[tuple[HardNegative, ...]] = ("store-restart", "database-outage")


class SimulationSettings(BaseModel):
    """Settings of the simulator; equal settings give equal recordings."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    seed: int = Field(default=TRAINING_SEED, ge=0, lt=2**31)
    minutes: int = Field(default=150, ge=40, le=60 * 24 * 7)
    """Length of the recording, the first 30 minutes without attacks."""
    scale: float = Field(default=0.25, gt=0, le=1000)
    """Traffic factor; 1 gives the benign rates of the February 2022 recording, about 2.8 flows a second."""
    attacks: tuple[Attack, ...] = tuple(GROUPS)
    hard_negatives: tuple[HardNegative, ...] = HARD_NEGATIVES
    episodes: int = Field(default=3, ge=1, le=1000)
    """Runs of each attack and of each hard negative, spread over the recording after the first 30 minutes."""

    @field_validator("attacks", "hard_negatives", mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: object) -> object:
        """YAML and JSON know lists only."""
        return tuple(value) if isinstance(value, list) else value

    @field_validator("attacks", "hard_negatives")
    @classmethod
    def _no_repetition(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a name is repeated")
        return value
