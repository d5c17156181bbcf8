"""The values that parameters have before the first step: read from a Hugging Face directory, or drawn from the seed."""

from collections.abc import Sequence
from pathlib import Path

from models.hf import has_weights, load_weights
from models.shapes import OPTShape, shape_of
from parallel.config import Config
from parallel.layout.layout import ParameterInfo
from parallel.layout.rng import draw_normal


def set_initial_values(infos: Sequence[ParameterInfo], config: Config) -> None:
    """Set these parameters to the weights in `model.path` if it has any, else to values drawn from `train.seed`."""
    path = config.model.path
    if path is not None and has_weights(path):
        load_weights(Path(path), [piece for info in infos for piece in info.pieces()])
    else:
        draw_parameters(infos, shape_of(config), config.train.seed)


def draw_parameters(infos: Sequence[ParameterInfo], shape: OPTShape, seed: int) -> None:
    """Draw every weight as Hugging Face's OPT does, from its public name and the seed: the same in every layout.

    Matrices are normal with standard deviation `init_std`, biases are zero, LayerNorm weights are one. The embedding of
    the padding token is zero.
    """
    for info in infos:
        for piece in info.pieces():
            if len(piece.shape) == 1:
                piece.data.fill_(float(piece.name.endswith("layer_norm.weight")))
                continue
            drawn = draw_normal(piece.shape, piece.box, shape.init_std, seed, piece.name)
            start, stop = piece.box[0]
            if piece.name.endswith("embed_tokens.weight") and start <= shape.pad_token_id < stop:
                drawn[shape.pad_token_id - start] = 0
            piece.data.copy_(drawn)
