"""Measure tokens a second of generation on one GPU in bf16: ours beside Hugging Face's `generate`.

    python -m benchmarks.generate [--model opt-1.3b] [--batch 1 32] [--prompt 128] [--new 256] [--only ours hf ...]
    python -m benchmarks.generate --tiny                                                   # also without a GPU
    python -m benchmarks.generate --kernels                # µs of a new token's attention, by torch and by the kernel

It prints a line for each contender and batch: tokens a second of the whole batch, from the first prompt token to the
last new one; the share of the bound that reading the weights once for each token sets, at the device's bandwidth; and
how many of the first tokens equal those of Hugging Face's, in bf16, where two logits may be equal. All contenders have
the same random weights and continue the same random prompts, greedily, without an end token.

ours            a CUDA graph of the whole step
ours compiled   with train.compile
hf              Hugging Face's `generate` with its cache that grows
hf static       with its static cache, for which it compiles the forward
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from statistics import median
from typing import Any

import torch
from torch import Tensor

from models.costs import parameter_count
from models.family import named_sizes
from models.generation.decoding import Decoder, TextLimits
from models.generation.sampling import Sampling
from models.generation.step import Prompt
from models.generation.trained_model import inference_of
from models.shapes import resolve, shape_of
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.layout.layout import ParameterInfo, slices
from parallel.ops.kernels.cached_attention import attend_in_torch
from parallel.sequence.cache import masks_at

COLUMNS = "{:<14} {:>6} {:>10} {:>17} {:>9}"
USUAL = dict(model="opt-1.3b", batch=[1, 32], prompt=128, new=256, rounds=3)
TINY = dict(model="llama-tiny", batch=[1, 3], prompt=8, new=16, rounds=1)
COPIED_BYTES = 2**31
KERNEL_COLUMNS = "{:>6} {:>6} {:>9} {:>9}  {}"
CACHES_BYTES = 2**28
TILINGS = {384: [(256, 1, 8), (128, 1, 8), (256, 1, 16), (128, 1, 4), (64, 2, 4)], 4096: [(128, 8, 4), (256, 4, 8)]}
"""They are tried for a cache of so many keys, and are each keys of a tile, parts and warps."""

Contender = Callable[[Tensor], Tensor]
"""Continues prompts[B, S], and returns the new tokens [B, N]."""


def hugging_face(model: str, device: torch.device) -> Any:
    """Return Hugging Face's model of a named size, with random weights in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = named_sizes()[model]
    torch.manual_seed(0)
    with device:
        config = AutoConfig.for_model(shape.model_type, **shape.exported())
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def ours(model: str, theirs: Any, new: int, *, compiles: bool) -> Contender:
    """Return our model of a named size, with the weights of Hugging Face's."""
    training = dict(precision="bf16", compile=compiles)
    config = parse(dict(model=dict(name=model), data=dict(sequence_length=2), train=training), resolve=resolve)
    context, weights = make_context(config, Place()), theirs.state_dict()

    def set_values(infos: Sequence[ParameterInfo]) -> None:
        for piece in (piece for info in infos for piece in info.pieces()):
            piece.data.copy_(weights[piece.name][slices(piece.box)])

    limits = TextLimits(new, shape_of(config).max_positions)
    decoder = Decoder(inference_of(context, set_values), limits, Sampling())

    def generate(prompts: Tensor) -> Tensor:
        texts = [Prompt(number, ids) for number, ids in enumerate(prompts.tolist())]
        return torch.tensor(decoder.continue_texts(texts))

    return generate


def theirs_with(model: Any, new: int, **options: Any) -> Contender:
    """Return Hugging Face's `generate` with these options."""

    def generate(prompts: Tensor) -> Tensor:
        ids = prompts.to(model.device)
        with torch.no_grad():
            found: Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        return found[:, ids.shape[1] :].cpu()

    return generate


def time_kernels() -> None:
    """Print the µs of a new token's attention and of its write into the cache, in bf16, each in a captured graph."""
    from parallel.ops.kernels.cached_attention_triton import Tiling, launch_attend, tiling_for

    print(KERNEL_COLUMNS.format("texts", "keys", "torch", "kernel", "keys of a tile, parts, warps"), flush=True)
    for batch, length in product((1, 32), (384, 4096)):
        shape = (2, batch, 32, length, 64)
        # More than a GPU keeps of its memory in a cache of its own: in a step, weights are read in between.
        caches = [
            torch.randn(shape, dtype=torch.bfloat16, device="cuda")
            for _ in range(max(2, min(24, CACHES_BYTES // (2 * prod(shape)))))
        ]
        q, k, v = torch.randn(3, batch, 32, 1, 64, dtype=torch.bfloat16, device="cuda").unbind(0)
        positions = torch.full((batch,), length - 1, device="cuda")
        mask = masks_at(positions, length, [None], torch.bfloat16)[None]
        of_torch = microseconds([partial(attend_in_torch, q, k, v, cache, positions, mask) for cache in caches])
        chosen = tiling_for(q, caches[0])
        for tiling in dict.fromkeys((chosen, *(Tiling(*numbers) for numbers in TILINGS[length]))):
            calls = [
                partial(launch_attend, (q, k, v), cache, positions, window=length, tiling=tiling) for cache in caches
            ]
            name = f"{tiling.keys}, {tiling.parts}, {tiling.warps}{' (chosen)' if tiling == chosen else ''}"
            times = (f"{time:.2f}" for time in (of_torch, microseconds(calls)))
            print(KERNEL_COLUMNS.format(batch, length, *times, name), flush=True)


def microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Return the µs of a call on a GPU: the least of a few replays of a graph of all of them."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return min(timed(graph.replay) for _ in range(20)) / len(calls) * 1e6


def bandwidth(device: torch.device) -> float:
    """Return bytes a second that a copy reads and writes, the larger of a few."""
    source = torch.empty(COPIED_BYTES if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        seconds = timed(lambda: target.copy_(source))
        best = max(best, 2 * source.nbytes / seconds)
    return best


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of a call, to the end of the device's work."""
    synchronize()
    begun = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - begun


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(name: str, contender: Contender, arguments: argparse.Namespace, bound: float) -> dict[int, Tensor]:
    """Print a line for each batch, and return the tokens of each. The first call of a batch is not timed."""
    found: dict[int, Tensor] = {}
    vocabulary = named_sizes()[arguments.model].vocab_size
    for batch in arguments.batch:
        torch._dynamo.reset()  # or a second batch size would be compiled for all
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(4, vocabulary, (batch, arguments.prompt), generator=generator)
        found[batch] = contender(prompts)
        seconds = [timed(lambda: contender(prompts)) for _ in range(arguments.rounds)]  # noqa: B023
        speeds = [batch * arguments.new / each for each in seconds]
        spread = f"{min(speeds):.0f}-{max(speeds):.0f}"
        share = median(speeds) / batch / bound
        print(COLUMNS.format(name, batch, f"{median(speeds):.0f}", spread, f"{share:.1%}"), flush=True)
    return found


def arguments_of(given: list[str] | None, *, on_gpu: bool) -> argparse.Namespace:
    """Parse the command line. What it leaves out depends on `--tiny`, which is usual where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--model", choices=named_sizes())
    parser.add_argument("--batch", type=int, nargs="+", help="prompts at a time")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--new", type=int, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, help="timed calls, after one that is not")
    names = ["ours", "ours compiled", "hf", "hf static"]
    parser.add_argument("--only", nargs="+", choices=names, default=names if on_gpu else ["ours", "hf"])
    parser.add_argument("--kernels", action="store_true", help="only the attention of a new token; needs a GPU")
    arguments = parser.parse_args(given)
    for name, value in (USUAL if on_gpu and not arguments.tiny else TINY).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main(given: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    arguments = arguments_of(given, on_gpu=on_gpu)
    if arguments.kernels:
        time_kernels()
        return
    device = torch.device("cuda" if on_gpu else "cpu")
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    bytes_a_second = bandwidth(device)
    weights = 2 * parameter_count(named_sizes()[arguments.model])
    bound = bytes_a_second / weights
    print(f"{arguments.model}, bf16, {arguments.prompt} + {arguments.new} tokens; {where}, torch {torch.__version__}")
    print(f"{weights / 1e9:.2f} GB of weights at {bytes_a_second / 1e12:.2f} TB/s: {bound:.0f} tokens/s a prompt")
    print(COLUMNS.format("", "batch", "tokens/s", "min-max", "of bound"), flush=True)
    theirs = hugging_face(arguments.model, device)
    contenders: dict[str, Callable[[], Contender]] = {
        "ours": lambda: ours(arguments.model, theirs, arguments.new, compiles=False),
        "ours compiled": lambda: ours(arguments.model, theirs, arguments.new, compiles=True),
        "hf": lambda: theirs_with(theirs, arguments.new),
        "hf static": lambda: theirs_with(theirs, arguments.new, cache_implementation="static"),
    }
    results: dict[str, dict[int, Tensor]] = {}
    for name in arguments.only:
        try:
            results[name] = measure(name, contenders[name](), arguments, bound)
        except Exception as error:  # a contender that cannot run here; the others can
            print(f"{name:<14} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
    print_agreement(results)
    sys.exit(not results)


def print_agreement(results: dict[str, dict[int, Tensor]]) -> None:
    """Print how many tokens of each contender equal those of the first one, up to the first that differs."""
    first, *others = results
    for name in others:
        for batch, tokens in results[name].items():
            same = (tokens == results[first][batch]).long().cumprod(1).sum(1).double().mean()
            print(f"{name}, batch {batch}: the first {same:.0f} of {tokens.shape[1]} tokens equal those of {first}")


if __name__ == "__main__":
    main()
