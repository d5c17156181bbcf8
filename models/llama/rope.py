"""The settings of rotary positions, as a config.json has them in two spellings. This module needs no torch.

    transformers 4   rope_theta: 500000.0, rope_scaling: {"rope_type": "llama3", "factor": 8.0, ...} or null
    transformers 5   rope_parameters: {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, ...}

In files of the first versions of transformers 4 `rope_type` is called `type`. transformers 5 reads all of these.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from parallel.config.reader import Range
from parallel.errors import ConfigError, did_you_mean, names_text, shown

Positive = Annotated[float, Range(1e-6)]
Factor = Annotated[float, Range(1, 2**20)]

OPTIONAL = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "yarn": (
        *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": ("original_max_position_embeddings",),
}
"""The kinds of scaling, and the parameters that each may have."""

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""The parameters that each kind must have."""

ORIGINAL = "original_max_position_embeddings"
WITH_ORIGINAL = tuple(kind for kind, names in OPTIONAL.items() if ORIGINAL in names)
"""The kinds that know the longest sequence of the first training."""


@dataclass(frozen=True)
class RopeScaling:
    """A change of the angles of rotary positions, for sequences that are longer than those of the first training.

    The parameters have Hugging Face's names. One that is None is not given; each kind has some of them.
    """

    rope_type: str = "default"
    """The kind: default (no change), linear, dynamic, yarn (Peng et al. 2023, arXiv 2309.00071) or llama3."""

    factor: Factor | None = None
    """The number of times that sequences become longer. All kinds but the default need it."""

    original_max_position_embeddings: Annotated[int, Range(1, 2**28)] | None = None
    """The longest sequence of the first training, for yarn and llama3. None: `max_position_embeddings`."""

    low_freq_factor: Positive | None = None
    """Waves longer than the original length divided by this are stretched by `factor` (llama3)."""

    high_freq_factor: Positive | None = None
    """Waves shorter than the original length divided by this are not changed (llama3)."""

    attention_factor: Annotated[float, Range(0)] | None = None
    """The number that cosines and sines are multiplied by (yarn). None: it follows from `factor`."""

    beta_fast: Positive | None = None
    """Dims with more turns than these in the original length are not changed (yarn). None: 32."""

    beta_slow: Positive | None = None
    """Dims with fewer turns than these in the original length are stretched by `factor` (yarn). None: 1."""

    mscale: Annotated[float, Range(0)] | None = None
    """The weight of the numerator of an `attention_factor` of None, used if `mscale_all_dim` is given too (yarn)."""

    mscale_all_dim: Annotated[float, Range(0)] | None = None
    """The weight of the denominator (yarn)."""

    truncate: bool | None = None
    """True, as is None: the dims between which angles change are rounded to whole ones (yarn)."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that are given, besides the kind."""
        return {key: value for key, value in asdict(self).items() if key != "rope_type" and value is not None}

    def original(self, max_position_embeddings: int) -> int:
        """Return the longest sequence of the first training, of a model with this `max_position_embeddings`."""
        return self.original_max_position_embeddings or max_position_embeddings

    def max_positions(self, max_position_embeddings: int) -> int:
        """Return the longest sequence for which the scaling is made.

        `max_position_embeddings` is the original length in a model with dynamic scaling, and in many with linear
        scaling. With yarn and llama3 it may be the original length or the scaled one; llama3's is the scaled one.
        """
        if self.factor is None or self.rope_type == "llama3":
            return max_position_embeddings
        return max(max_position_embeddings, int(self.factor * self.original(max_position_embeddings)))

    def problems(self) -> list[str]:
        """Return what is wrong with the kind or with its parameters, a line each."""
        kind, given = self.rope_type, self.parameters
        if kind not in REQUIRED:
            hint = did_you_mean(kind, REQUIRED)
            return [f"model.rope_scaling.rope_type: {shown(kind)} is not available. {hint}"]
        allowed = (*REQUIRED[kind], *OPTIONAL[kind])
        hint = f"It has {names_text(allowed)}" if allowed else "Write another rope_type beside it, such as 'linear'"
        found = [
            f"model.rope_scaling.{key}: rope_type {kind!r} has no such parameter. {hint}."
            for key in given
            if key not in allowed
        ]
        found += [
            f"model.rope_scaling.{key}: rope_type {kind!r} needs it. Write all of its parameters:"
            f" dict(rope_type={kind!r}, {', '.join(f'{name}=...' for name in REQUIRED[kind])})."
            for key in REQUIRED[kind]
            if key not in given
        ]
        return found or self._order_problems()

    def _order_problems(self) -> list[str]:
        """Return which of two bounds are in the wrong order. Between equal ones there would be a division by zero."""
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            return [
                f"model.rope_scaling.high_freq_factor: {high} is not more than low_freq_factor {low}. Try {4 * low}."
            ]
        fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        if fast < slow:
            return [f"model.rope_scaling.beta_fast: {fast} is less than beta_slow {slow}. Try {32 * slow}."]
        return []

    def exported(self, max_position_embeddings: int) -> dict[str, Any] | None:
        """Return the `rope_scaling` of a config.json that transformers 4 and 5 read; None where there is no scaling."""
        if self.rope_type == "default":
            return None
        found = self
        if self.rope_type in WITH_ORIGINAL:
            found = replace(self, original_max_position_embeddings=self.original(max_position_embeddings))
        return {"rope_type": self.rope_type, **found.parameters}


def normalized_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config in which rotary positions are said by `rope_theta` and `rope_scaling` alone.

    `rope_scaling` is None where nothing is scaled. Raises ConfigError for a value that should be a dict and is none,
    where a config says two different things, and where types of layers have rotary positions of their own.
    """
    found = dict(raw)
    given = {key: found.pop(key) for key in ("rope_parameters", "rope_scaling") if key in found}
    read = [_flat(key, value) for key, value in given.items() if value not in (None, {})]
    thetas = [value.pop("rope_theta") for value in read if "rope_theta" in value]
    if len(read) > len(thetas) == 1 and "rope_theta" not in found:  # Hugging Face reads one dict alone
        raise ConfigError(
            f"model.rope_theta: of {' and '.join(given)} one gives it as {shown(thetas[0])}, and the other does not."
            " Keep one."
        )
    if any(theta != found.setdefault("rope_theta", theta) for theta in thetas):
        values = shown(found["rope_theta"]), *map(shown, thetas)
        raise ConfigError(f"model.rope_theta: it is given as {' and as '.join(dict.fromkeys(values))}. Keep one.")
    if ORIGINAL in found and read and read[0]["rope_type"] in WITH_ORIGINAL:  # Hugging Face prefers this one
        original = found.pop(ORIGINAL)
        if any(value.setdefault(ORIGINAL, original) != original for value in read):
            values = shown(read[0][ORIGINAL]), shown(original)
            raise ConfigError(
                f"model.rope_scaling.{ORIGINAL}: it is given as {' and as '.join(values)}, once outside of the dict."
                " Keep one."
            )
    if any(value != read[0] for value in read):
        both = (f"{key} is {shown(value)}" for key, value in given.items())
        raise ConfigError(f"model.rope_scaling: {', and '.join(both)}. Keep one.")
    if not given:
        return found
    return found | {"rope_scaling": read[0] if read and read[0] != {"rope_type": "default"} else None}


def _flat(key: str, value: Any) -> dict[str, Any]:
    """Return the parameters of one dict, with `rope_type` for `type`, and without those that are None.

    Of a kind that is not available only the kind is kept, so that it is refused by its name.
    """
    if not isinstance(value, Mapping):
        kind = value if isinstance(value, str) and REQUIRED.get(value) == ("factor",) else "linear"
        raise ConfigError(f"model.{key}: needs a dict, got {shown(value)}. Try dict(rope_type={kind!r}, factor=2.0).")
    if types := [str(name) for name in value if str(name).endswith("_attention")]:
        raise ConfigError(
            f"model.{key}: rotary positions of each type of layers ({', '.join(types)}) are not available. Write one"
            " dict for all layers."
        )
    found = {name: one for name, one in value.items() if one is not None}
    old = found.pop("type", None)
    kind = found.setdefault("rope_type", "default" if old is None else old)
    if old not in (None, kind):
        raise ConfigError(f"model.{key}.type: {shown(old)} is not the rope_type {shown(kind)} beside it. Keep one.")
    if (part := found.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"model.{key}.partial_rotary_factor: {shown(part)} is not available. Try 1.0.")
    if isinstance(kind, str) and kind not in REQUIRED:
        return {"rope_type": kind}
    return found
