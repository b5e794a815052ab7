"""When expert placements are worth changing. Pure: the solve runs in a thread of the engine's shell.

every `interval_steps`: decide -> layers to solve -> (solve) -> accept -> layers to migrate

A layer whose experts lack copies does not wait for the interval, nor for a load, and what gives it some is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GOOD_BALANCEDNESS = 0.98
"""Mean over maximal rank load from which on nothing is to be gained."""
MIN_TOKENS_PER_EXPERT = 100
"""Below it the imbalance seen is that of counting few tokens: a count of n has a spread of 1 / sqrt(n)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceConfig:
    """When to act.

    Attributes:
        interval_steps: steps between two looks at the load; 0 = never.
        min_gain: share of the experts' time that a change must save in a layer.
        hysteresis: a layer whose proposal was refused is solved again when its balancedness fell by so much since;
            a refusal fades by a quarter of it with each look, as the load may have changed otherwise.
        moe_share: share of a step's time spent in experts, for what a change is worth.
        row_bytes: of one expert.
    """

    interval_steps: int
    min_gain: float = 0.03
    hysteresis: float = 0.02
    moe_share: float = 0.5
    row_bytes: int = 0


class LayerView(NamedTuple):
    """A layer's recent load under the placement that serves.

    Attributes:
        balancedness: mean over maximal rank load.
        tokens_per_expert: mean count in the window.
        missing_copies: of experts that have fewer than they should.
    """

    balancedness: float
    tokens_per_expert: float
    missing_copies: int = 0


class Proposal(NamedTuple):
    """What a solve offers for one layer: balancedness before and after, experts to move, missing copies it makes."""

    before: float
    after: float
    num_moves: int
    num_restored: int = 0

    @property
    def gain(self) -> float:
        """Share of the layer's expert time that is saved: it goes with the load of the hottest rank."""
        return 1 - self.before / self.after


class Decision(NamedTuple):
    """Layers to solve, none when the reason says why not."""

    layers: tuple[int, ...]
    reason: str


class BalancePolicy:
    """See the module's docstring.

    Args:
        config: when to act.
        num_layers: MoE layers of the model.
    """

    def __init__(self, config: BalanceConfig, num_layers: int) -> None:
        self.config = config
        self._views: Sequence[LayerView] = ()
        self._last_step = 0
        # Balancedness at which a layer's last proposal was refused; 1 = taken (the budget may have cut it short).
        self._refused = [1.0] * num_layers

    def observe(self, views: Sequence[LayerView]) -> None:
        """Take the latest view of every layer."""
        self._views = views

    def enter(self) -> None:
        """Another group of ranks: what was refused before says nothing, and the load is counted anew."""
        self._views = ()
        self._refused = [1.0] * len(self._refused)

    def decide(self, step: int, busy: bool) -> Decision:
        """Layers whose placement should be solved now.

        Args:
            step: number of the next step.
            busy: a scale operation, a migration or a solve runs; the look is put off until none does.
        """
        if not self.config.interval_steps:
            return Decision((), "rebalancing is off")
        if busy:
            return Decision((), "a scale operation, a migration or a solve runs")
        lacking = tuple(layer for layer, view in enumerate(self._views) if view.missing_copies)
        if lacking:
            return Decision(lacking, f"experts of {len(lacking)} of {len(self._views)} layers lack copies")
        if step - self._last_step < self.config.interval_steps:
            return Decision((), f"looked at in step {self._last_step}")
        if not self._views or min(view.tokens_per_expert for view in self._views) < MIN_TOKENS_PER_EXPERT:
            return Decision((), f"fewer than {MIN_TOKENS_PER_EXPERT} tokens per expert seen")
        self._last_step = step
        layers = tuple(layer for layer, view in enumerate(self._views) if self._is_worse(layer, view.balancedness))
        self._refused = [min(1.0, value + self.config.hysteresis / 4) for value in self._refused]
        return Decision(layers, f"{len(layers)} of {len(self._views)} layers are out of balance")

    def _is_worse(self, layer: int, balancedness: float) -> bool:
        return balancedness < min(GOOD_BALANCEDNESS, self._refused[layer] - self.config.hysteresis)

    def accept(self, proposals: Mapping[int, Proposal], step_s: float, bytes_per_s: float) -> tuple[int, ...]:
        """Layers whose proposal is worth its bytes; the others are left until they get worse.

        Worth it: gain * moe_share / layers * interval > bytes / bandwidth, and at least `min_gain`; or it restores
        missing copies.

        Args:
            proposals: by layer.
            step_s: a step's time now.
            bytes_per_s: a rank's bandwidth for moves.
        """
        taken: list[int] = []
        horizon_s = self.config.interval_steps * step_s * self.config.moe_share / len(self._refused)
        for layer, proposal in sorted(proposals.items()):
            move_s = proposal.num_moves * self.config.row_bytes / bytes_per_s
            is_worth = proposal.num_moves > 0 and proposal.gain >= self.config.min_gain
            is_worth = (is_worth and proposal.gain * horizon_s > move_s) or proposal.num_restored > 0
            self._refused[layer] = 1.0 if is_worth else proposal.before
            taken += [layer] if is_worth else []
        return tuple(taken)
