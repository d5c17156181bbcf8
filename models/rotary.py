"""Rotary positions (Su et al. 2021, arXiv 2104.09864): q and k are turned by angles that grow with the position.

The numbers are those of Hugging Face's `ROPE_INIT_FUNCTIONS` to the last bit, in fp32 whatever the model's dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.llama.rope import RopeScaling
from parallel.ops.captured import is_capturing
from parallel.ops.kernels.heads import Tables, rotated
from parallel.pipeline.microbatch import Microbatch
from parallel.tensor import Mode


@dataclass(frozen=True)
class RotarySettings:
    """All that the angles depend on, besides the positions."""

    head_size: int
    """The elements of a head that are turned: all of them, or its first ones."""

    theta: float
    scaling: RopeScaling
    max_position_embeddings: int

    @property
    def is_dynamic(self) -> bool:
        """True if the angles depend on the length of the sequence."""
        return self.scaling.rope_type == "dynamic"

    @property
    def factor(self) -> float:
        """The number of times that sequences become longer."""
        return self.scaling.factor or 1.0

    @property
    def original(self) -> int:
        """The longest sequence of the first training."""
        return self.scaling.original(self.max_position_embeddings)


class Rotary:
    """Turns q and k by the angles of their positions. All layers of a stage share the object, and so its tables.

    For backward it keeps the tables and nothing else: the gradient of a rotation needs no q and no k.

    With dynamic scaling the angles depend on the length of the whole sequence, or on that of each document, or on the
    largest position id of the microbatch. Hugging Face's model remembers the longest sequence that it has seen and uses
    its angles for shorter ones too, until one fits into `max_position_embeddings`; here a result depends on its own
    batch alone. The two are equal where lengths do not fall.
    """

    def __init__(self, settings: RotarySettings, device: torch.device) -> None:
        self.settings = settings
        self._inv_freq = inverse_frequencies(settings).to(device)
        self._attention_factor = attention_factor(settings)
        self._key: tuple[object, ...] = ()
        self._ids: Tensor | None = None
        self._owner: Microbatch | None = None
        self._tables: Tables | None = None

    def __call__(self, q: Tensor, k: Tensor, batch: Microbatch, mode: Mode) -> tuple[Tensor, Tensor]:
        """Return q[B, heads, S_context, D] and k[B, kv_heads, S_context, D], turned.

        B are this rank's samples inside a block. The positions are the batch's own, else 0, 1, ... from the first
        column, also where it is padding.
        """
        cos, sin = self.tables_for(batch, mode, q, q.shape[2])
        return rotated(q, cos, sin), rotated(k, cos, sin)

    def tables_for(self, batch: Microbatch, mode: Mode, like: Tensor, sequence: int) -> Tables:
        """Return the tables that turn q and k of `sequence` tokens, of the dtype and on the device of `like`."""
        new = None if batch.cache is None else batch.cache.new
        return self._tables_for(batch, mode, like, sequence) if new is None or new.angles is None else new.angles

    def tables(self, positions: Tensor, length: int | Tensor, dtype: torch.dtype) -> Tables:
        """Return cosines and sines, positions[B or 1, S] -> two of [B or 1, 1, S, D].

        `length` is that of the whole sequence; only dynamic scaling uses it.
        """
        inv_freq = self._inv_freq
        if self.settings.is_dynamic:
            inv_freq = dynamic_frequencies(self.settings, inv_freq, length)
        make = _tables_in_compiled_code if torch.compiler.is_compiling() else tables_of
        return make(positions, inv_freq, self._attention_factor, dtype)

    def tables_of_new(self, positions: Tensor, dtype: torch.dtype) -> Tables:
        """Return the tables of one new token of each text: positions[B] -> two of [B, 1, 1, D].

        With dynamic scaling the length is that of the text up to this token. So what a text becomes does not depend on
        the texts beside it, as it would by the longest of them, which Hugging Face takes.
        """
        return self.tables(positions.unsqueeze(1), (positions + 1)[:, None, None, None], dtype)

    def _tables_for(self, batch: Microbatch, mode: Mode, like: Tensor, sequence: int) -> Tables:
        """Return the tables of a microbatch, which the first layer makes and the others of the stage find here."""
        if torch.compiler.is_compiling():
            return self._make_tables(batch, mode, like, sequence)
        ids = batch.columns
        version = None if ids is None else ids._version
        key = batch.length, sequence, like.device, like.dtype, version, torch.is_inference_mode_enabled()
        # Tables that a graph computes are for its microbatch alone; and it reads no others, which may be replaced.
        owner = batch if is_capturing(like.device) else None
        if self._tables is None or self._key != key or self._ids is not ids or self._owner is not owner:
            self._key, self._ids, self._owner = key, ids, owner
            self._tables = self._make_tables(batch, mode, like, sequence)
        return self._tables

    def _make_tables(self, batch: Microbatch, mode: Mode, like: Tensor, sequence: int) -> Tables:
        ids = batch.columns
        if ids is None:
            positions = mode.sequence.positions(sequence, like.device).unsqueeze(0)
            return self.tables(positions, batch.length, like.dtype)
        length: int | Tensor = batch.length
        if self.settings.is_dynamic:
            length = ids.max() + 1
            if batch.documents is not None:
                lengths = mode.tokens(batch.documents.largest(ids) + 1, mode.inner_batch)
                length = lengths[:, None, :, None]
        return self.tables(mode.tokens(ids, mode.inner_batch), length, like.dtype)


def tables_of(positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> Tables:
    """Return cosines and sines times `factor`: positions[B, S], inv_freq[D/2] -> two of [B, 1, S, D]."""
    angles = positions[:, None, :, None].float() * inv_freq
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


@torch.library.custom_op("colonnade::rotary_tables", mutates_args=())
def _tables_in_compiled_code(
    positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return what `tables_of` does; the compiler calls this as it is. Cosines of its own differ in fp32's last bit.

    torch's registry of operators has it from the import on: code that is being compiled cannot register one. Without an
    operator the compiled block would be cut in two here.
    """
    return tables_of(positions, inv_freq, factor, dtype)


@_tables_in_compiled_code.register_fake
def _(positions: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, sequence = positions.shape
    cos, sin = (inv_freq.new_empty(batch, 1, sequence, 2 * inv_freq.shape[-1], dtype=dtype) for _ in range(2))
    return cos, sin


# -- frequencies, fp32 [D/2] -------------------------------------------------------------------------------------------


def inverse_frequencies(settings: RotarySettings) -> Tensor:
    """Return the angle per position of each pair, as it is for sequences of the length that the model was made for."""
    inv_freq = 1.0 / _powers(settings.head_size, settings.theta)
    match settings.scaling.rope_type:
        case "default" | "dynamic":
            return inv_freq
        case "linear":
            return inv_freq / settings.factor
        case "llama3":
            return _llama3(settings, inv_freq)
        case "yarn":
            return _yarn(settings)
    raise AssertionError(settings.scaling.rope_type)


def dynamic_frequencies(settings: RotarySettings, inv_freq: Tensor, length: int | Tensor) -> Tensor:
    """Return `inv_freq` for sequences of up to `max_position_embeddings`, else those of a base that grows with them.

    It is NTK-aware scaling with a factor that follows from the length (Peng et al. 2023, arXiv 2309.00071, section
    3.3). Hugging Face computes the base in fp32 from a tensor, so it is done here, too.
    """
    most, dim, factor = settings.max_position_embeddings, settings.head_size, settings.factor
    if not isinstance(length, Tensor):
        length = torch.full((), length, device=inv_freq.device)  # no copy from the host, which no graph may have
    base = settings.theta * ((factor * length / most) - (factor - 1)) ** (dim / (dim - 2))
    return torch.where(length > most, 1.0 / _powers(dim, base), inv_freq)


def attention_factor(settings: RotarySettings) -> float:
    """Return what cosines and sines are multiplied by, 1 but for yarn (Peng et al. 2023, section 3.4)."""
    scaling = settings.scaling
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if settings.factor <= 1 else 0.1 * weight * math.log(settings.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1)


def _powers(dim: int, base: float | Tensor) -> Tensor:
    """Return base^(0/dim), base^(2/dim), ..."""
    device = base.device if isinstance(base, Tensor) else None
    numbers = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float()
    # By a tensor: a GPU would multiply by 1 / dim, which rounds once more.
    return base ** (numbers / torch.full((), dim, dtype=numbers.dtype, device=device))


def _llama3(settings: RotarySettings, inv_freq: Tensor) -> Tensor:
    """Return frequencies of which low ones are divided by the factor, high ones kept, those between interpolated.

    This is the scaling of Llama 3.1 (Grattafiori et al. 2024, arXiv 2407.21783).
    """
    factor, original = settings.factor, settings.original
    low, high = settings.scaling.low_freq_factor, settings.scaling.high_freq_factor
    assert low is not None, "the shape has been checked"
    assert high is not None, "the shape has been checked"
    lengths = 2 * math.pi / inv_freq
    divided = torch.where(lengths > original / low, inv_freq / factor, inv_freq)
    smooth = (original / lengths - low) / (high - low)
    between = (1 - smooth) * divided / factor + smooth * divided
    is_between = ~(lengths < original / high) * ~(lengths > original / low)
    return torch.where(is_between, between, divided)


def _yarn(settings: RotarySettings) -> Tensor:
    """Return frequencies between those divided by the factor and the original ones, by their number of turns.

    A pair that turns more than `beta_fast` times in the original length keeps its frequency, one that turns fewer than
    `beta_slow` times has it divided, and a linear ramp over the dims is between (Peng et al. 2023, section 3.2).
    """
    scaling, dim, theta = settings.scaling, settings.head_size, settings.theta

    def dim_of(turns: float) -> float:
        return dim * math.log(settings.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast or 32), dim_of(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # else a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    weight, powers = 1 - ramp, _powers(dim, theta)
    return 1.0 / (settings.factor * powers) * (1 - weight) + 1.0 / powers * weight
