"""The access of Python code to a recorded tensor: to its device, its address and its values."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parallel.modules.lazy import HOST
from parallel.modules.recorder import Recorder, is_on_meta, key_of

DEVICE, IS_META, SET_DATA = (
    getattr(Tensor.device, "__get__"),  # noqa: B009
    getattr(Tensor.is_meta, "__get__"),  # noqa: B009
    getattr(Tensor.data, "__set__"),  # noqa: B009
)
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
VALUES = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__format__, Tensor.__reduce_ex__}
MEMORY = {Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__}
NO_ADDRESS = 2**62  # more than any address: who reads there anyway is stopped by the processor


class PythonAccess(TorchFunctionMode):
    """Has recorded tensors look like tensors on the host, although they are on the meta device.

    Otherwise some functions of torch.nn.init would do nothing, a new tensor that is made on the device of a recorded
    one would have no data either, and two tensors could not be seen to share memory.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (DEVICE, IS_META) and self.recorder.is_recorded(args[0]):
            return HOST if func == DEVICE else False
        if func in INDEXING and self.recorder.is_recorded(args[0]):
            args = (args[0], _with_values(args[1]), *args[2:])
        if func == Tensor.new_tensor and self.recorder.is_recorded(args[0]):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, **(kwargs or {})}
        if func in MEMORY:
            self.recorder.forget_allocation()
        if func == Tensor.data_ptr and self.recorder.is_recorded(args[0]):
            return NO_ADDRESS + key_of(args[0]) + args[0].storage_offset() * args[0].element_size()
        if func in VALUES and self.recorder.is_recorded(args[0]):
            args = (self.recorder.read(args[0]), *args[1:])
        if func == SET_DATA and self.recorder.is_recorded(args[0]) and not is_on_meta(args[1]):
            return self._set_data(*args)
        return func(*args, **(kwargs or {}))

    def _set_data(self, x: Any, data: Tensor) -> None:
        """Do `x.data = data` of a recorded x and real data."""
        real = data.detach().clone()
        self.recorder.record(real, "data of")  # type: ignore[arg-type]
        x.data = real


def _with_values(index: Any) -> Any:
    """Return an index with tensors in the place of lists and arrays: torch would make these on the meta device."""
    if isinstance(index, tuple):
        return tuple(map(_with_values, index))
    return torch.as_tensor(index) if isinstance(index, list) or hasattr(index, "__array__") else index
