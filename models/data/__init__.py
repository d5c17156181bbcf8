"""The data of a run: from what `data.path` names to the batches of a step."""

from models.data.cache import Cache
from models.data.corpus import Corpus, load_tokens
from models.data.loader import Batch, Loader, SampleOrder
from models.data.samples import Samples
from models.data.sources import has_token_ids

__all__ = ["Batch", "Cache", "Corpus", "Loader", "SampleOrder", "Samples", "has_token_ids", "load_tokens"]
