"""The seeded traffic simulator: world → exchanges → flows on the wires → what a meter reports."""

from flowsentry.simulation.recording import simulate
from flowsentry.simulation.settings import WARM_UP_MINUTES, SimulationSettings

__all__ = ["WARM_UP_MINUTES", "SimulationSettings", "simulate"]
