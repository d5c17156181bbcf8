"""Models and criteria whose losses count their labels in different ways, with batches that count unevenly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, Any]
SAMPLES, LENGTH, VOCABULARY, CLASSES = 8, 6, 31, 5


@dataclass(frozen=True)
class Loss:
    """A module, the criterion if it has no loss of its own, and a batch; all are made anew by `make`."""

    module: nn.Module
    batch: Batch
    criterion: Callable[[Any, Any], Any] | None = None


def ids(*, seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(4, VOCABULARY, (SAMPLES, length), generator=torch.Generator().manual_seed(seed))


def uneven(labels: Tensor, ignored: int = -100) -> Tensor:
    """Ignore labels so that samples count different numbers, the second and the last sample none."""
    rows, columns = torch.meshgrid(torch.arange(len(labels)), torch.arange(labels.shape[1]), indexing="ij")
    is_counted = (columns <= rows) & (rows != 1) & (rows < len(labels) - 1)
    return torch.where(is_counted, labels, ignored)


class RenamedOPT(OPTForCausalLM):
    """A user's subclass, which shifts its labels though its name does not say so."""


# -- Hugging Face's models, whose loss is their own


def opt(kind: type[nn.Module], **more: Any) -> nn.Module:
    shape: Any = dict(vocab_size=VOCABULARY, hidden_size=8, word_embed_proj_dim=8, num_attention_heads=2, ffn_dim=8)
    shape |= dict(num_hidden_layers=2, max_position_embeddings=8, dropout=0.0, init_std=0.5) | more
    return kind(OPTConfig(**shape))


def bart(kind: type[nn.Module], **more: Any) -> nn.Module:
    shape: Any = dict(vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=8)
    shape |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8, dropout=0.0, init_std=0.5)
    return kind(BartConfig(**shape, max_position_embeddings=16, **more))


def bert(kind: type[nn.Module], **more: Any) -> nn.Module:
    shape: Any = dict(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(intermediate_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES)
    return kind(BertConfig(**shape | more, initializer_range=0.5, max_position_embeddings=16))


def t5() -> nn.Module:
    shape: Any = dict(vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    shape |= dict(decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**shape))


def vit() -> nn.Module:
    shape: Any = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=4)
    shape |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, patch_size=2, num_labels=CLASSES)
    return ViTForImageClassification(ViTConfig(**shape, initializer_range=0.5))


def mixtral(**more: Any) -> nn.Module:
    shape: Any = dict(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    shape |= dict(num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, max_position_embeddings=16)
    return MixtralForCausalLM(MixtralConfig(**shape, **more | dict(experts_implementation="eager")))


def language() -> Batch:
    return dict(input_ids=ids(), labels=uneven(ids()))


def questions() -> Batch:
    """Return a batch in which the last samples have no answer: their positions are outside of the sequence."""
    start = torch.arange(SAMPLES) % LENGTH
    start[5:] = LENGTH
    return dict(input_ids=ids(), start_positions=start, end_positions=start.clone())


def images() -> Batch:
    pixels = torch.randn(SAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return dict(pixel_values=pixels, labels=uneven(torch.arange(SAMPLES)[:, None] % CLASSES)[:, 0])


def some_classes() -> Tensor:
    return uneven(torch.arange(SAMPLES)[:, None] % CLASSES)[:, 0]


def targets(*shape: int) -> Tensor:
    return torch.rand(SAMPLES, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# -- a plain module, and criteria


class Tagger(nn.Module):
    """ids[B, S] -> logits[B, S, classes], without a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        out: Tensor = self.head(x)
        return out


def tags(ignored: int = -100) -> Batch:
    return dict(input_ids=ids(), labels=uneven(ids(seed=3) % (CLASSES - 1) + 1, ignored))


def cross_entropy(output: Tensor, labels: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), labels.flatten(), **more)


def class_weights() -> Tensor:
    return torch.tensor([0.0, 1.0, 2.0, 0.25, 4.0], dtype=torch.float64)


def masked_mean(output: Tensor, labels: Tensor) -> Tensor:
    """Return a mean as it is often written by hand: 0 / 0, with a gradient of NaN, for samples without a label."""
    losses = F.cross_entropy(output.flatten(0, 1), labels.flatten().clamp(0), reduction="none")
    mask = (labels != -100).flatten()
    return (losses * mask).sum() / mask.sum()


def selected_mean(output: Tensor, labels: Tensor) -> Tensor:
    mask = labels != -100
    return F.cross_entropy(output[mask], labels[mask], reduction="none").mean()


def two_means(output: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([cross_entropy(output, labels) / 4 / 5, 0.5 * cross_entropy(-output, labels)]).sum()


def sum_and_count(output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(output, labels, reduction="sum").exp().log(), (labels != -100).sum()


def summed(output: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(output, labels, reduction="sum")


def clamped_mean(output: Tensor, labels: Tensor) -> Tensor:
    """Return a mean by hand that is zero without a label: that is then no label more."""
    losses = F.cross_entropy(output.flatten(0, 1), labels.flatten().clamp(0), reduction="none").view(labels.shape)
    mask = labels != -100
    return (losses * mask.double()).sum() / mask.sum().clamp(min=1)


def filled_mean(output: Tensor, labels: Tensor) -> Tensor:
    losses: Tensor = (output - 1).square().mean(-1).masked_fill(labels == -100, 0)
    mean: Tensor = losses.sum() / torch.maximum((labels != -100).sum(), torch.ones_like(labels.sum()))
    return mean


def weighted_by_samples(output: Tensor, labels: Tensor) -> Tensor:
    """Return a mean with a weight for each sample."""
    weights = 1 + (labels != -100).sum(1).to(output) / 4
    losses = F.cross_entropy(output.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (losses.sum(1) * weights).sum() / weights.sum()


def mean_over_samples(output: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over labels by the number of samples, those without labels included."""
    return summed(output, labels) / len(labels)


def tagger(criterion: Callable[..., Any], batch: Callable[[], Batch] = tags) -> Loss:
    return Loss(Tagger(), batch(), criterion)


def regression(function: Callable[..., Tensor]) -> Loss:
    batch = dict(input_ids=ids(), labels=targets(LENGTH, CLASSES))
    return Loss(Tagger(), batch, lambda output, labels: function(output, labels.to(output)))


def weighted_bce(output: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, labels, pos_weight=class_weights().to(output))


LOSSES: dict[str, Callable[[], Loss]] = {
    "a language model that shifts its labels": lambda: Loss(opt(OPTForCausalLM), language()),
    "a subclass with any name": lambda: Loss(opt(RenamedOPT), language()),
    "a language model without labels in the batch": lambda: Loss(opt(RenamedOPT), dict(input_ids=ids())),
    "a language model that does not shift": lambda: Loss(
        bart(BartForCausalLM, is_decoder=True, is_encoder_decoder=False), language()
    ),
    "seq2seq (Bart)": lambda: Loss(bart(BartForConditionalGeneration), language()),
    "seq2seq (T5)": lambda: Loss(t5(), language()),
    "masked language model": lambda: Loss(bert(BertForMaskedLM), language()),
    "token classification": lambda: Loss(
        bert(BertForTokenClassification), dict(input_ids=ids(), labels=uneven(ids() % CLASSES))
    ),
    "image classification": lambda: Loss(vit(), images()),
    "sequence classification": lambda: Loss(
        bert(BertForSequenceClassification), dict(input_ids=ids(), labels=some_classes())
    ),
    "multi-label classification": lambda: Loss(
        bert(BertForSequenceClassification), dict(input_ids=ids(), labels=targets(CLASSES).round())
    ),
    "regression": lambda: Loss(
        bert(BertForSequenceClassification, num_labels=1), dict(input_ids=ids(), labels=targets())
    ),
    "question answering": lambda: Loss(bert(BertForQuestionAnswering, num_labels=2), questions()),
    "mixture of experts without a router loss": lambda: Loss(mixtral(), language()),
    "mean over labels": lambda: tagger(cross_entropy),
    "mean with another ignored label": lambda: tagger(
        lambda o, y: cross_entropy(o, y, ignore_index=0), lambda: tags(0)
    ),
    "mean with class weights": lambda: tagger(lambda o, y: cross_entropy(o, y, weight=class_weights().to(o))),
    "mean with smoothed labels": lambda: tagger(lambda o, y: cross_entropy(o, y, label_smoothing=0.2)),
    "smoothed labels and class weights": lambda: tagger(
        lambda o, y: cross_entropy(o, y, label_smoothing=0.2, weight=class_weights().to(o))
    ),
    "mean of a mask": lambda: tagger(masked_mean),
    "mean of selected labels": lambda: tagger(selected_mean),
    "several means": lambda: tagger(two_means),
    "sum over labels": lambda: tagger(summed),
    "sum and count": lambda: tagger(sum_and_count),
    "sum divided by a count": lambda: tagger(lambda o, y: -0.5 * summed(o, y) / (y != -100).sum().clamp(1)),
    "mean of a mask that may be empty": lambda: tagger(clamped_mean),
    "mean of what is not filled": lambda: tagger(filled_mean),
    "mean with weights of samples": lambda: tagger(weighted_by_samples),
    "sum divided by the samples": lambda: tagger(mean_over_samples),
    "sum divided by a number of labels": lambda: tagger(mean_by_pythons_count),
    "mean of what is set to zero": lambda: tagger(mean_of_what_is_set_to_zero),
    "mean over channels": lambda: tagger(mean_over_channels),
    "mse": lambda: regression(F.mse_loss),
    "l1": lambda: regression(F.l1_loss),
    "huber": lambda: regression(F.huber_loss),
    "bce": lambda: regression(weighted_bce),
    "mean of means of samples": lambda: regression(lambda o, y: ((o - y) ** 2).mean((1, 2)).mean()),
    "probabilities as targets": lambda: regression(lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten(0, 1))),
    "kl divergence": lambda: regression(lambda o, y: F.kl_div(o.log_softmax(-1), y, reduction="batchmean")),
}


def with_a_constant(output: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(output, labels) + output.detach().abs().sum()


def router() -> Loss:
    return Loss(mixtral(output_router_logits=True), language())


def with_norm(output: Tensor, labels: Tensor) -> Tensor:
    size: Tensor = output.norm()
    return cross_entropy(output, labels) + 0.1 * size


def sum_times(output: Tensor, labels: Tensor) -> Tensor:
    return summed(output, labels) * 0.1


def mean_and_sum(output: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(output, labels) + output.pow(2).sum()


def different_means(output: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(output, labels) + output.pow(2).mean()


def mean_of_a_list(output: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([F.mse_loss(x, x.detach() * 2) for x in output]).mean()


def mean_times_labels(output: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(output, labels) * (labels != -100).sum()


def by_a_constant(output: Tensor, labels: Tensor) -> Tensor:
    return summed(output, labels) / 100


def halved_quotient(output: Tensor, labels: Tensor) -> Tensor:
    return summed(output, labels) * (1 / len(labels)) / 2


def sum_of_quotients(output: Tensor, labels: Tensor) -> Tensor:
    mask = labels != -100
    losses = F.cross_entropy(output.flatten(0, 1), labels.flatten().clamp(0), reduction="none").view(labels.shape)
    return (losses * (mask / mask.sum())).sum()


def mean_by_a_mean(output: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != -100).to(output)
    losses = F.cross_entropy(output.flatten(0, 1), labels.flatten().clamp(0), reduction="none").view(labels.shape)
    return (losses * mask / mask.mean()).mean()


def quotient_by_a_tensor(output: Tensor, labels: Tensor) -> Tensor:
    return summed(output, labels) / torch.full((), 100.0, dtype=output.dtype)


def means_of_samples(output: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([F.mse_loss(x, x.detach() * 2) for x in output]).sum()


def contrastive(output: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of CLIP: each sample's first output is to be like its own second one, and not like others'."""
    logits = 10 * F.normalize(output[:, 0], dim=-1) @ F.normalize(output[:, 1], dim=-1).T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def mean_times_samples(output: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(output, labels) * len(labels)


def mean_by_pythons_count(output: Tensor, labels: Tensor) -> Tensor:
    return summed(output, labels) / max(1, int((labels != -100).sum()))


def mean_of_what_is_set_to_zero(output: Tensor, labels: Tensor) -> Tensor:
    losses, mask = (output - 1).square().mean(-1), labels != -100
    losses[~mask] = 0
    mean: Tensor = losses.sum() / mask.sum().clamp(min=1)
    return mean


def mean_over_channels(output: Tensor, labels: Tensor) -> Tensor:
    """Return a mean over masked patches and their channels, as models that learn to fill in images have it."""
    mask = (labels != -100).to(output)
    losses = (output - 1).abs() * mask[..., None]
    return losses.sum() / (mask.sum() + 1e-9) / output.shape[-1]


REFUSED: dict[str, tuple[Callable[[], Loss], str]] = {
    "a router's loss": (router, "loss: it is not known which labels it is a mean over: "),
    "what has no gradient": (lambda: tagger(with_a_constant), "it adds what has no gradient"),
    "a norm": (lambda: tagger(with_norm), "LinalgVectorNormBackward0 made it"),
    "a sum times a number": (lambda: tagger(sum_times), "it is a sum that is multiplied by a number"),
    "a sum by a constant": (lambda: tagger(by_a_constant), "it is a sum that is divided by 100"),
    "a sum by a tensor": (
        lambda: tagger(quotient_by_a_tensor),
        "it is a sum that is divided by a tensor, which",
    ),
    "means of samples": (lambda: tagger(means_of_samples), "it adds a mean for each sample"),
    "a contrastive loss": (lambda: tagger(contrastive), "it compares the samples of a microbatch with each other"),
    "a quotient, halved": (lambda: tagger(halved_quotient), "it is a sum that is multiplied by a number"),
    "a sum of quotients": (lambda: tagger(sum_of_quotients), "its losses are multiplied by numbers before"),
    "a mean, divided by a mean": (lambda: tagger(mean_by_a_mean), "its losses are multiplied by numbers before"),
    "a mean times its labels": (lambda: tagger(mean_times_labels), "its constant factors differ"),
    "a mean and a sum": (lambda: tagger(mean_and_sum), "it adds a sum to a mean"),
    "means over different labels": (lambda: tagger(different_means), "it adds means over different numbers of labels"),
    "no loss at all": (lambda: Loss(Tagger(), dict(input_ids=ids())), "got NoneType. Pass a criterion."),
    "one mean for each sample": (lambda: tagger(mean_of_a_list), "it adds more terms in some microbatches"),
}
