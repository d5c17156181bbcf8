"""Fine-tune a Hugging Face Llama, Mistral, Qwen, GPT-2 or OPT, split by tensor and pipeline parallelism, and export it.

    python examples/finetune_llama.py
    torchrun --nproc-per-node 4 examples/finetune_llama.py --tensor 2 --pipeline 2 --model DIR --text FILE.txt

The first command trains a new, small Llama for half a minute on a laptop and downloads nothing. The second one splits
each layer of the model in DIR over two ranks, and the layers over two stages; without --model and --text it prints the
same losses as the first. Texts, loaders and loop are the script's own: `models` makes this rank's part of the model,
with its slices of the weights, and `parallel` trains it. More ranks are replicas.
"""

import argparse
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import models
import parallel
from models.data.texts import built_in_text
from models.hf import export
from models.shapes import resolve, shape_of
from models.tokenizer import ByteTokenizer


def main(args: argparse.Namespace) -> None:
    model = args.model or small_llama(args.output / "small")
    # Join the ranks that torchrun has started. Without torchrun there is one rank.
    sizes = dict(steps=args.steps, global_batch_size=args.batch, micro_batch_size=args.micro_batch)
    config = dict(
        model=dict(path=str(model)),
        data=dict(sequence_length=args.sequence),
        parallel=dict(tensor=dict(mode="1d", size=args.tensor), pipeline=args.pipeline),
        train=dict(precision=args.precision, **sizes),
        optimizer=dict(lr=args.lr or (2e-5 if args.model else 3e-3)),
        lr_scheduler=dict(warmup_steps=args.steps // 10),
    )
    context = parallel.launch_from_torch(config, resolve=resolve)
    is_first = context.place.rank == 0

    engine = parallel.Engine(models.build(context), context)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    training, held_out = read_samples(args, tokenizer)

    # All ranks draw the same batches, and each replica takes its share of the rows.
    share = slice(engine.data.rank, None, engine.data.size)
    generator = torch.Generator().manual_seed(0)
    order = RandomSampler(training, num_samples=args.steps * args.batch, generator=generator)
    loader: Any = DataLoader(training, args.batch, sampler=order)  # type: ignore[arg-type]
    to_evaluate = [{"input_ids": rows[share]} for rows in held_out.split(args.batch)]

    before = engine.evaluate(to_evaluate)
    if is_first:
        print(f"loss {before:.6f} on {len(held_out)} samples, {len(training)} to train on", flush=True)
    for step, rows in enumerate(loader, start=1):
        result = engine.train_step({"input_ids": rows[share]})
        if is_first and (step % 10 == 0 or step == args.steps):
            print(f"step {step}/{args.steps}  loss {result.loss:.6f}", flush=True)
    after = engine.evaluate(to_evaluate)

    folder, world = args.output / "export", context.mesh.world
    export(folder, engine.weights(), shape=shape_of(context.config), axis=world, dtype=torch.float32)
    parallel.leave()
    if is_first:  # from here on there is one process, and the model is Hugging Face's alone
        tokenizer.save_pretrained(folder)
        print(f"loss {after:.6f} after training; the model is in {folder}")
        exported = AutoModelForCausalLM.from_pretrained(folder)
        print(f"loss {exported(held_out, labels=held_out).loss:.6f} of the exported model, computed by Hugging Face")


def small_llama(folder: Path) -> Path:
    """Return a folder with a new Llama of 0.8 million parameters, whose tokens are bytes; the first rank makes it."""
    if folder.exists():
        return folder
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=4, vocab_size=ByteTokenizer.vocab_size)  # a k, v head serves two q heads
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as own:
        made = Path(own) / "small"
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(made)
        ByteTokenizer().save(made)
        with suppress(OSError):  # another rank was first, with the same content
            made.rename(folder)
    return folder


def read_samples(args: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return the text, cut into samples [N, S]: those to train on, and two batches of them to evaluate."""
    text = args.text.read_text(encoding="utf-8") if args.text else built_in_text()
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    samples = tokens[: len(tokens) // args.sequence * args.sequence].view(-1, args.sequence)
    if len(samples) < 3 * args.batch:
        need = f"three batches of {args.batch} are needed. Use a longer text, or a smaller --sequence or --batch."
        raise parallel.DataError(f"--text: it has {len(samples)} samples of {args.sequence} tokens, and {need}")
    return samples[: -2 * args.batch], samples[-2 * args.batch :]


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a Hugging Face directory (default: a new, small Llama)")
    add("--text", type=Path, metavar="FILE.txt", help="the text to train on (default: Python's manual)")
    add("--output", type=Path, default=Path("runs/finetune_llama"), metavar="DIR", help="(default: %(default)s)")
    add("--tensor", type=int, default=1, help="how many ranks share each layer (default: 1)")
    add("--pipeline", type=int, default=1, help="how many stages the layers are divided over (default: 1)")
    add("--steps", type=int, default=60, help="(default: %(default)s)")
    add("--batch", type=int, default=16, help="samples in a step, of all replicas together (default: 16)")
    add("--micro-batch", type=int, default=4, help="samples that go through the pipeline at a time (default: 4)")
    add("--sequence", type=int, default=64, help="tokens in a sample (default: 64)")
    add("--lr", type=float, help="the learning rate (default: 2e-5, for a new model 3e-3)")
    add("--precision", default="fp32", help="fp32, bf16, fp16 or fp64 (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(read_arguments())
    except (parallel.ColonnadeError, OSError, UnicodeError) as error:  # the last two are errors of reading files
        sys.exit(f"rank {parallel.Place.from_environment().rank}: {error}")
