"""Fine-tune a Hugging Face OPT model on a text, on any number of ranks, and export it to a Hugging Face directory.

    python examples/finetune_opt.py
    torchrun --nproc-per-node 2 examples/finetune_opt.py --stage 3 --model facebook/opt-125m --text FILE.txt

The first command trains a new, small OPT for a minute on a laptop and downloads nothing. Model, tokenizer, optimizer,
scheduler and training loop are those of a script for one process; what this library adds are the lines that have
`parallel` or `engine` in them. The folder --output then contains checkpoints/, from which --resume continues, and
export/, which `from_pretrained` reads.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import parallel
from models.tokenizer import ByteTokenizer
from parallel.collectives import all_reduce

Samples = list[dict[str, torch.Tensor]]


def main(args: argparse.Namespace) -> None:
    # Join the ranks that torchrun has started. Without torchrun there is one rank.
    batch_sizes = dict(global_batch_size=args.batch, micro_batch_size=1)  # micro: `evaluate` takes 1 sample at a time
    context = parallel.launch_from_torch(args.config or dict(zero=dict(stage=args.stage), train=batch_sizes))
    is_first = context.place.rank == 0
    args.output.mkdir(parents=True, exist_ok=True)

    # Load the model. In ZeRO stage 3 `sharded_init` divides it as it is loaded: no rank ever holds all of it.
    torch.manual_seed(0)
    with parallel.sharded_init():
        model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else small_model(args.sequence)
    if args.sequence > (longest := model.config.max_position_embeddings):
        raise parallel.DataError(
            f"--sequence: {args.sequence} tokens are more than the {longest} positions of the model."
        )
    tokenizer = read_tokenizer(args.model, model.config.vocab_size)
    training, held_out = read_samples(args, tokenizer)

    # Make the optimizer, the loaders and the scheduler as for one process. --batch is the batch of all ranks together.
    lr = args.lr or (2e-5 if args.model else 1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    train_loader: Any = DataLoader(training, args.batch, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    eval_loader: Any = DataLoader(held_out, args.batch)  # type: ignore[arg-type]
    steps = args.steps or args.epochs * len(train_loader)
    scheduler: Any = CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)

    # Divide all of it over the ranks: model and optimizer by ZeRO, each batch into equal shares.
    engine, train_loader, eval_loader, scheduler = parallel.initialize(
        model, optimizer, train_dataloader=train_loader, eval_dataloader=eval_loader, lr_scheduler=scheduler
    )
    if args.resume:
        scheduler.load_state_dict(engine.load_checkpoint(args.output)["scheduler"])

    before = engine.evaluate(eval_loader)
    if is_first:
        print(f"perplexity {math.exp(before):.4f} on {len(held_out)} samples, {len(training)} to train on", flush=True)
    torch.manual_seed(context.place.rank)  # dropout differs between ranks
    with parallel.catch_signals(engine):  # Ctrl-C, SIGTERM or SIGUSR1: after the next step all ranks save, and end
        train(engine, train_loader, scheduler, args, steps=steps)
    after = engine.evaluate(eval_loader)

    export = args.output / "export"
    engine.save_pretrained(export)
    parallel.leave()
    if is_first:  # from here on there is one process, and the model is Hugging Face's alone
        tokenizer.save_pretrained(export)
        print(f"perplexity {math.exp(after):.4f} after training; the model is in {export}")
        exported = AutoModelForCausalLM.from_pretrained(export)
        print(f"perplexity {perplexity(exported, held_out):.4f} of the exported model, computed by Hugging Face")


def train(engine: Any, loader: Any, scheduler: Any, args: argparse.Namespace, *, steps: int) -> None:
    """Train to step `steps`, and print the loss and save checkpoints on the way."""
    engine.train()
    first, began = engine.num_steps, time.monotonic()
    for step, batch in batches(loader, first, steps):
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        scheduler.step()
        if step % args.log_every == 0 or step == steps:
            mean = all_reduce(loss.detach(), engine.data).item() / engine.data.size  # over the ranks' equal shares
            speed = (step - first) * args.batch * args.sequence / (time.monotonic() - began)
            if engine.data.rank == 0:
                print(f"step {step}/{steps}  loss {mean:.6f}  {speed:,.0f} tokens/s", flush=True)
        if step % args.save_every == 0 or step == steps or engine.stop_signal:
            engine.save_checkpoint(args.output, {"scheduler": scheduler.state_dict()})


def batches(loader: Any, first: int, steps: int) -> Iterator[tuple[int, Any]]:
    """Yield the steps after `first` up to `steps` with their batches, epoch after epoch.

    The loader draws the same batches in every run, so a resumed run leaves out those that it has trained on.
    """
    step = 0
    while step < steps:
        for batch in loader:
            step += 1
            if step > first:
                yield step, batch
            if step == steps:
                return


def small_model(sequence: int) -> OPTForCausalLM:
    """Return a new OPT of 0.8 million parameters, whose tokens are bytes."""
    sizes: dict[str, Any] = dict(hidden_size=128, word_embed_proj_dim=128, num_attention_heads=8, ffn_dim=512)
    sizes |= dict(num_hidden_layers=4, vocab_size=ByteTokenizer.vocab_size, max_position_embeddings=sequence)
    return OPTForCausalLM(OPTConfig(**sizes, dropout=0.0))


def read_tokenizer(model: str | None, vocab_size: int) -> Any:
    """Return the tokenizer of the model; for a model with a vocabulary of bytes, one whose tokens are bytes."""
    if model and vocab_size != ByteTokenizer.vocab_size:
        return AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        ByteTokenizer().save(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def read_samples(args: argparse.Namespace, tokenizer: Any) -> tuple[Samples, Samples]:
    """Return the text, Python's manual by default, cut into samples: those to train on, and those to evaluate.

    The samples to evaluate are the last twentieth, in whole batches and at least one batch.
    """
    if args.text is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = args.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    samples: Samples = [{"input_ids": x, "labels": x} for x in tokens.split(args.sequence) if len(x) == args.sequence]
    if len(samples) < 2 * args.batch:
        raise parallel.DataError(
            f"--text: {len(tokens)} tokens make {len(samples)} samples of {args.sequence}: too few for a batch of"
            f" {args.batch} to train on and one to evaluate. Use a longer text, or a smaller --sequence or --batch."
        )
    num_held_out = max(1, len(samples) // args.batch // 20) * args.batch
    return samples[:-num_held_out], samples[-num_held_out:]


@torch.no_grad()
def perplexity(model: Any, samples: Samples) -> float:
    """Return the perplexity of a Hugging Face model, one sample at a time."""
    losses = [model.eval()(**{name: x[None] for name, x in sample.items()}).loss.item() for sample in samples]
    return math.exp(sum(losses) / len(losses))


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--model", help="a Hugging Face directory, or a name on the hub (default: a new, small OPT)")
    add("--text", type=Path, metavar="FILE.txt", help="the text to train on (default: Python's manual)")
    add("--output", type=Path, default=Path("runs/finetune_opt"), metavar="DIR", help="(default: %(default)s)")
    one_of.add_argument("--config", metavar="FILE.py", help="a config of this library: ZeRO, precision, clipping, ...")
    one_of.add_argument("--stage", type=int, default=0, help="the stage of ZeRO, without a config (default: 0)")
    add("--steps", type=int, help="the number of steps (default: those of --epochs)")
    add("--epochs", type=int, default=1, help="the number of passes over the text (default: 1)")
    add("--batch", type=int, default=16, help="samples in a step, of all ranks together (default: 16)")
    add("--sequence", type=int, default=128, help="tokens in a sample (default: 128)")
    add("--lr", type=float, help="the learning rate (default: 2e-5, for a new model 1e-3)")
    add("--log-every", type=int, default=10, metavar="STEPS", help="print the loss this often (default: 10)")
    add("--save-every", type=int, default=100, metavar="STEPS", help="save a checkpoint this often (default: 100)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = read_arguments()
    try:
        main(arguments)
    except (parallel.ColonnadeError, OSError, UnicodeError) as error:  # the last two are errors of reading files
        if parallel.Place.from_environment().rank > 0:
            time.sleep(5)  # torchrun ends all ranks when the first one exits: let rank 0 print why
        print(error, file=sys.stderr)
        sys.exit(2)
