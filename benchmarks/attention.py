"""Measure attention with grouped heads, with a window and within documents: ours beside torch's, in bf16 on the GPU.

    python -m benchmarks.attention [--only llama-3.2-1b mistral-7b] [--times 20]
    python -m benchmarks.attention --tiny     # also without a GPU, in fp32

The rows of each case, by their names:

    ours      `SequenceSplit.attend`, as a layer calls it
    repeated  `scaled_dot_product_attention` of keys and values repeated for each query head, and a mask
    grouped   `scaled_dot_product_attention(enable_gqa=True)`, with the same mask
    flex      `flex_attention(enable_gqa=True)`, compiled, with a block mask; on a GPU alone
    varlen    `torch.nn.attention.varlen`, a sequence for each document; with documents on a GPU alone

A row has the median milliseconds of a forward and a backward, TFLOP/s (a backward is 2.5 forwards, and only the scores
that a query sees count), the peak memory of both beyond the inputs, their gradients and the mask in MiB, and the error:
the distance of the output and of the gradients from those of `repeated` in fp32, relative to their norms, the largest.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from parallel.ops.clock import clock_of
from parallel.sequence import UNSPLIT, Documents, Masking
from training.metrics import peak_device_bytes

WARM_UP = 3
BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of an error; bf16's epsilon is 8e-3
COLUMNS = "{:<10} {:>10} {:>9} {:>10} {:>9}"


@dataclass(frozen=True)
class Case:
    """The sizes of one attention: `batch` samples of `length` tokens, and heads of width `head`."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head: int
    window: int | None = None
    document: int | None = None  # the mean length of documents

    def numbers(self) -> Tensor:
        """Return the number of each token's document, int64 [S], the same in all samples; lengths are geometric."""
        if self.document is None:
            return torch.zeros(self.length, dtype=torch.int64)
        drawn = torch.rand(self.length, generator=torch.Generator().manual_seed(0))
        return (drawn < 1 / self.document).cumsum(0)

    def documents(self, device: torch.device) -> Documents | None:
        """Return the documents of all samples; None where a sample is one."""
        if self.document is None:
            return None
        return Documents.of(self.numbers().expand(self.batch, -1)).apply(lambda x: x.to(device))

    def flops(self) -> float:
        """Return the FLOPs of a forward and a backward, counting only the keys that a query sees."""
        places = Documents.of(self.numbers().unsqueeze(0)).positions
        seen = int((places + 1).clamp_max(self.window or self.length).sum())
        return 3.5 * 4.0 * self.batch * self.heads * self.head * seen

    def __str__(self) -> str:
        window = f", a window of {self.window}" if self.window else ""
        window += f", documents of {self.document} tokens in the mean" if self.document else ""
        heads = f"{self.heads} heads of {self.head}, {self.kv_heads} of keys and values"
        return f"{self.batch} × {self.length} tokens, {heads}{window}"


USUAL = {
    "llama-3.2-1b": Case(8, 1024, 32, 8, 64),
    "llama-3.2-1b, longer": Case(4, 4096, 32, 8, 64),
    "mistral-7b": Case(1, 16384, 32, 8, 128, window=4096),
    "mistral-7b, no window": Case(1, 16384, 32, 8, 128),
    "llama-3.2-1b, documents": Case(2, 8192, 32, 8, 64, document=512),
    "llama-3.1-8b, documents": Case(1, 8192, 32, 8, 128, document=512),
    "mistral-7b, documents": Case(1, 16384, 32, 8, 128, window=4096, document=4096),
}
TINY = {
    "grouped": Case(2, 16, 4, 2, 8),
    "a window": Case(1, 16, 4, 2, 8, window=5),
    "documents": Case(2, 16, 4, 2, 8, document=6),
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q[B, heads, S, D], k, v[B, kv_heads, S, D] -> y[B, S, heads · D]."""


def ours(case: Case, device: torch.device) -> Attend:
    """Return our attention of whole sequences."""
    masking = Masking(window=case.window, documents=case.documents(device))
    return lambda q, k, v: UNSPLIT.attend(q, k, v, masking)


def repeated(case: Case, device: torch.device) -> Attend:
    """Return torch's attention with keys and values repeated for each query head."""
    mask, group = _mask(case, device), case.heads // case.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return _joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None))

    return attend


def grouped(case: Case, device: torch.device) -> Attend:
    """Return torch's attention of grouped heads."""
    mask = _mask(case, device)
    return lambda q, k, v: _joined(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    )


def flex(case: Case, device: torch.device) -> Attend:
    """Return torch's attention that is compiled for its mask."""

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        before: Tensor = (row >= column) & (numbers[row] == numbers[column])
        return before if case.window is None else before & (row - column < case.window)

    numbers = case.numbers().to(device)

    mask = create_block_mask(sees, None, None, case.length, case.length, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        return _joined(y)

    return attend


def varlen(case: Case, device: torch.device) -> Attend:
    """Return torch's attention of sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    documents = case.documents(device)
    assert documents is not None
    bounds, longest = documents.cumulative(), documents.longest
    window = (-1 if case.window is None else case.window - 1), 0

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        sizes = bounds, bounds, longest, longest
        y = varlen_attn(q, k, v, *sizes, window_size=window, enable_gqa=case.heads > case.kv_heads)
        assert isinstance(y, Tensor)
        by_sample: Tensor = y.unflatten(0, (case.batch, -1))
        return by_sample.flatten(2)

    return attend


def _mask(case: Case, device: torch.device) -> Tensor | None:
    """Return which keys a query sees in its window and document, bool [S, S]; None without both."""
    if case.window is None and case.document is None:
        return None
    numbers = case.numbers().to(device)
    seen = (numbers.unsqueeze(1) == numbers).tril_()
    return seen.triu_(1 - (case.window or case.length))


def _joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


CONTENDERS: dict[str, Callable[[Case, torch.device], Attend]] = {
    build.__name__: build for build in (ours, repeated, grouped, flex, varlen)
}


@dataclass(frozen=True)
class Inputs:
    """The tensors q, k and v of a layer, and dy, the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device) -> "Inputs":
        """Draw all of them, in memory as a linear leaves them: the heads of a token beside each other."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        sizes = [(case.batch, case.length, heads, case.head) for heads in (case.heads, case.kv_heads, case.kv_heads)]
        q, k, v = (torch.randn(size, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for size in sizes)
        dy = torch.randn(case.batch, case.length, case.heads * case.head, device=device, dtype=dtype)
        return cls(q, k, v, dy)

    def both(self, attend: Attend) -> tuple[Tensor, ...]:
        """Run a forward and a backward; return the output and the gradients of q, k and v."""
        y = attend(self.q, self.k, self.v)
        return y.detach(), *torch.autograd.grad(y, (self.q, self.k, self.v), self.dy)

    def of_sample(self, index: int, dtype: torch.dtype) -> "Inputs":
        """Return the tensors of one sample in another dtype."""
        q, k, v, dy = (x.detach()[index : index + 1].to(dtype) for x in (self.q, self.k, self.v, self.dy))
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy)


@dataclass(frozen=True)
class Figures:
    """The measurements of one contender: median seconds, peak bytes beyond inputs and gradients, and the error.

    `bound`: the largest error that rounding explains.
    """

    seconds: float
    peak_bytes: int
    error: float
    bound: float

    @property
    def is_wrong(self) -> bool:
        return not self.error <= self.bound  # so that NaN is wrong


def measure(attend: Attend, inputs: Inputs, expected: tuple[Tensor, ...], times: int) -> Figures:
    """Time some forwards and backwards. `expected`: output and gradients of the first sample."""
    device = inputs.q.device
    error = max(
        float((got[:1].to(want.dtype) - want).norm() / want.norm())
        for got, want in zip(inputs.both(attend), expected, strict=True)
    )
    clock, taken = clock_of(device), []
    for i in range(WARM_UP + times):
        if i == WARM_UP and device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        begun = clock.now()
        inputs.both(attend)
        taken.append((begun, clock.now()))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = median(clock.seconds(*one) for one in taken[WARM_UP:])
    results = sum(x.nbytes for x in (inputs.q, inputs.k, inputs.v))
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return Figures(seconds, max(0, peak_device_bytes(device) - held - results), error, BOUND[inputs.q.dtype])


def compare(case: Case, device: torch.device, times: int) -> dict[str, Figures]:
    """Print the table of a case, and return its figures by contender."""
    inputs, found = Inputs.draw(case, device), {}
    expected = inputs.of_sample(0, torch.float32).both(repeated(case, device))
    for name, build in CONTENDERS.items():
        if name == "flex" and (device.type != "cuda" or case.head < 16):
            continue  # it has no backward on a CPU, and no narrower heads
        if name == "varlen" and (device.type != "cuda" or case.document is None):
            continue
        try:
            found[name] = one = measure(build(case, device), inputs, expected, times)
        except Exception as error:  # most likely it ran out of memory, and the others can still run
            print(f"{name:<10} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
            continue
        rate, peak = case.flops() / one.seconds / 1e12, one.peak_bytes / 2**20
        wrong = "  WRONG" if one.is_wrong else ""
        row = COLUMNS.format(name, f"{1e3 * one.seconds:.3f}", f"{rate:.3g}", f"{peak:.0f}", f"{one.error:.1e}")
        print(row + wrong, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=USUAL, default=list(USUAL))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a few tokens, as where there is no GPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_tiny = arguments.tiny or device.type == "cpu"
    cases = TINY if is_tiny else {name: USUAL[name] for name in arguments.only}
    correct = True
    for name, case in cases.items():
        print(f"{name}: {case}")
        print(COLUMNS.format("", "ms", "TFLOP/s", "peak MiB", "error"), flush=True)
        found = compare(case, device, 3 if is_tiny else arguments.times)
        correct &= "ours" in found and not found["ours"].is_wrong
        print()
    sys.exit(not correct)


if __name__ == "__main__":
    main()
