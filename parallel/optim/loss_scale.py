"""Dynamic loss scaling (Micikevicius et al. 2018, "Mixed precision training", section 3.2)."""

from dataclasses import dataclass

LOWEST = 1.0
"""The scale that no overflow lowers: a gradient that is too large without a scale is not the scale's business."""


@dataclass
class LossScale:
    """The factor of the loss with which fp16 gradients neither vanish nor overflow.

    It is halved by every overflow down to 1, and doubled after `growth_steps` steps without one. It starts high, and
    the first overflows bring it down to its level. In other precisions it is always 1.
    """

    scale: float = 1.0
    growth_steps: int | None = None  # None: the scale is constant
    good_steps: int = 0

    @classmethod
    def for_precision(cls, precision: str) -> "LossScale":
        """Return a dynamic scale for "fp16", and the constant 1 for every other precision."""
        return cls(2.0**16, growth_steps=2000) if precision == "fp16" else cls()

    @property
    def is_dynamic(self) -> bool:
        """True if overflows change the scale."""
        return self.growth_steps is not None

    @property
    def can_fall(self) -> bool:
        """True if a gradient that is not finite may fit with a lower scale."""
        return self.is_dynamic and self.scale > LOWEST

    def update(self, *, overflow: bool) -> None:
        """Adapt a dynamic scale after a step; `overflow`: its gradient was not finite."""
        if not self.is_dynamic:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale = max(LOWEST, self.scale / 2)
        elif self.good_steps == self.growth_steps:
            self.scale, self.good_steps = self.scale * 2, 0
