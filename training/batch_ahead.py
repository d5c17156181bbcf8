"""The batch of the next step, which is read while a device computes the step before."""

from contextlib import suppress

from models.data import Batch, Loader


class BatchAhead:
    """Hands out the batches of a loader; one of them may have been read ahead, so that no device waits for it.

    `read` is called while a device computes. What it raises is raised again by the `take` that needs the batch.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._ahead: tuple[int, Batch] | None = None

    def read(self, first: int) -> Batch | None:
        """Read the batch after the first `first` samples of the run ahead, and return it, or None if it raises."""
        with suppress(Exception):
            self._ahead = first, self._loader.training(first)
            return self._ahead[1]
        return None

    def take(self, first: int) -> Batch:
        """Return the batch after the first `first` samples of the run."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] == first else self._loader.training(first)
