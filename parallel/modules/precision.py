"""The dtypes in which the parameters of a module are computed, where it has several."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

log = logging.getLogger(__name__)


def computed_dtypes(parameters: Iterable[nn.Parameter], precision: torch.dtype) -> dict[torch.dtype, torch.dtype]:
    """Return, for each dtype of these parameters, the one in which an engine of this precision computes them.

    That is the precision. But where a model has several dtypes on purpose (a router, norms or adapters in fp32 beside
    weights in bf16), those that are wider than its narrowest and than the precision are kept.
    """
    found = {parameter.dtype for parameter in parameters}
    narrowest = min((dtype.itemsize for dtype in found), default=0)
    return {dtype: dtype if dtype.itemsize > max(narrowest, precision.itemsize) else precision for dtype in found}


def report_dtypes(parameters: Iterable[nn.Parameter], computed: Mapping[torch.dtype, torch.dtype]) -> None:
    """Log what becomes of the parameters of a model that has several dtypes."""
    counts = Counter(parameter.dtype for parameter in parameters)
    if len(counts) > 1:
        texts = [f"{count} of {_name(dtype)} in {_name(computed[dtype])}" for dtype, count in counts.items()]
        log.warning("model: it has parameters of several dtypes, which are computed so: %s.", ", ".join(texts))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
