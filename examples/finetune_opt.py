"""Load a Hugging Face model, divide it over the ranks, fine-tune it on a text, measure, export.

    python examples/finetune_opt.py                                    a small OPT from scratch, a minute on a laptop
    torchrun --nproc-per-node 2 examples/finetune_opt.py --stage 3 --model facebook/opt-125m --text FILE.txt

Model, tokenizer, optimizer, scheduler and loop are those of a script for one process; the rest says `parallel` or
`engine`. In the folder --output are then checkpoints/, for --resume, and export/, for `from_pretrained`.
"""

import argparse
import math
import sys
import tempfile
import time
from itertools import chain, islice, repeat
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
    batch_sizes = dict(global_batch_size=args.batch, micro_batch_size=1)  # micro: what `evaluate` takes at a time
    context = parallel.launch_from_torch(args.config or dict(zero=dict(stage=args.stage), train=batch_sizes))
    is_first = context.place.rank == 0
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    with parallel.sharded_init():  # in ZeRO stage 3 no rank ever holds the whole model
        model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else small_model(args.sequence)
    if args.sequence > (longest := model.config.max_position_embeddings):
        raise parallel.DataError(
            f"--sequence: {args.sequence} tokens are more than the {longest} that the model has room for."
        )
    tokenizer = read_tokenizer(args.model, model.config.vocab_size)
    training, held_out = read_samples(args, tokenizer)

    lr = args.lr or (2e-5 if args.model else 1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    train_loader: Any = DataLoader(training, args.batch, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    eval_loader: Any = DataLoader(held_out, args.batch)  # type: ignore[arg-type]
    steps = args.steps or args.epochs * len(train_loader)
    scheduler: Any = CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)

    engine, train_loader, eval_loader, scheduler = parallel.initialize(
        model, optimizer, train_dataloader=train_loader, eval_dataloader=eval_loader, lr_scheduler=scheduler
    )
    if args.resume:
        scheduler.load_state_dict(engine.load_checkpoint(args.output)["scheduler"])
    first, before = engine.num_steps, engine.evaluate(eval_loader)
    if is_first:
        print(f"perplexity {math.exp(before):.4f} on {len(held_out)} samples, {len(training)} to train on", flush=True)

    torch.manual_seed(context.place.rank)  # of dropout, which is each replica's own
    engine.train()
    began = time.monotonic()
    # The loader draws the same batches in every run: a resumed one passes over those that it has seen.
    for step, batch in islice(enumerate(chain.from_iterable(repeat(train_loader)), 1), first, steps):
        engine.zero_grad()
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        scheduler.step()
        if step % args.log_every == 0 or step == steps:
            mean = all_reduce(loss.detach(), engine.data).item() / engine.data.size
            speed = (step - first) * args.batch * args.sequence / (time.monotonic() - began)
            if is_first:
                print(f"step {step}/{steps}  loss {mean:.6f}  {speed:,.0f} tokens/s", flush=True)
        if step % args.save_every == 0 or step == steps:
            engine.save_checkpoint(args.output, {"scheduler": scheduler.state_dict()})

    after, export = engine.evaluate(eval_loader), args.output / "export"
    engine.save_pretrained(export)
    parallel.leave()
    if is_first:  # from here on it is Hugging Face alone, in one process
        tokenizer.save_pretrained(export)
        print(f"perplexity {math.exp(after):.4f} after training; the model is in {export}")
        print(f"perplexity {perplexity(AutoModelForCausalLM.from_pretrained(export), held_out):.4f} of what it has")


def small_model(sequence: int) -> OPTForCausalLM:
    sizes: dict[str, Any] = dict(hidden_size=128, word_embed_proj_dim=128, num_attention_heads=8, ffn_dim=512)
    sizes |= dict(num_hidden_layers=4, vocab_size=ByteTokenizer.vocab_size, max_position_embeddings=sequence)
    return OPTForCausalLM(OPTConfig(**sizes, dropout=0.0))


def read_tokenizer(model: str | None, vocab_size: int) -> Any:
    """The model's own; to one with a vocabulary of bytes, a token is a byte."""
    if model and vocab_size != ByteTokenizer.vocab_size:
        return AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        ByteTokenizer().save(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def read_samples(args: argparse.Namespace, tokenizer: Any) -> tuple[Samples, Samples]:
    """A text, Python's manual if none is named, cut into samples: whole batches of the last twentieth are held out."""
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
    kept = max(1, len(samples) // args.batch // 20) * args.batch
    return samples[:-kept], samples[-kept:]


@torch.no_grad()
def perplexity(model: Any, samples: Samples) -> float:
    losses = [model.eval()(**{name: x[None] for name, x in sample.items()}).loss.item() for sample in samples]
    return math.exp(sum(losses) / len(losses))


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, one_of = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--model", help="a Hugging Face directory, or a name on the hub (default: a new, small OPT)")
    add("--text", type=Path, metavar="FILE.txt", help="what to train on (default: Python's manual)")
    add("--output", type=Path, default=Path("runs/finetune_opt"), metavar="DIR")
    one_of.add_argument("--config", metavar="FILE.py", help="a config of this library: ZeRO, precision, clipping, ...")
    one_of.add_argument("--stage", type=int, default=0, help="of ZeRO, where there is no config (default: 0)")
    add("--steps", type=int, help="how many (default: those of --epochs)")
    add("--epochs", type=int, default=1)
    add("--batch", type=int, default=16, help="samples a step, of all ranks together")
    add("--sequence", type=int, default=128, help="tokens a sample")
    add("--lr", type=float, help="(default: 2e-5, from scratch 1e-3)")
    add("--log-every", type=int, default=10, metavar="STEPS")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = read_arguments()
    try:
        main(arguments)
    except (parallel.ColonnadeError, OSError, UnicodeError) as error:  # the last two: of files
        if parallel.Place.from_environment().rank > 0:
            time.sleep(5)  # torchrun ends all ranks once one has gone: the first shall be the one that says why
        print(error, file=sys.stderr)
        sys.exit(2)
