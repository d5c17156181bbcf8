"""Their data: from what `data.path` names to the batches of a step."""

from models.data.corpus import Corpus, load_tokens
from models.data.loader import Batch, Loader, SampleOrder

__all__ = ["Batch", "Corpus", "Loader", "SampleOrder", "load_tokens"]
