"""A table of bugs that distributed training is prone to, each with the name of the test that must notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A bug: `before`, which stands exactly once in `file`, becomes `after`; then `test` must fail.

    `breaks` says what the bug does.
    """

    name: str
    breaks: str
    file: str
    before: str
    after: str
    test: str


RULES = "tests/test_gradient_rules.py"
STAGES = "tests/test_zero.py"
LOADED = "tests/test_sharded_init.py::test_a_model_loaded_in_shards_is_the_one_that_from_pretrained_loads[2-3]"
ONE_SEED = (
    "tests/test_sharded_init.py::"
    "test_a_model_constructed_in_shards_has_one_seeds_values_in_every_stage_on_any_ranks[2-3]"
)
OVERLAP = "tests/test_chunk.py::test_a_chunk_is_summed_during_the_last_backward_and_never_before"
ANY_MODULE = "tests/test_module_engine.py::test_every_stage_trains_a_module_as_plain_torch_does"
PLACEMENT_TESTS = "tests/test_placement.py"
ROUNDING_TESTS, DISK_TESTS = "tests/test_rounding.py", "tests/test_disk.py"
INPUT_TESTS = "tests/test_inputs.py"
MANAGER, WORKLOADS = "parallel/placement/manager.py", "parallel/placement/workloads.py"
MANAGER_TESTS = "tests/test_placement_manager.py"
MODULE_STATE = "tests/test_module_state.py"
REFUSALS = "tests/test_module_refusals.py::test_what_one_rank_alone_does_to_a_module_is_refused_by_name_on_every_rank"
HALF = "tests/test_fp16_and_recompute.py"
TOPOLOGY = "tests/test_topology.py::test_coordinates_are_the_position_of_a_rank_in_a_row_major_box"
GROUPS = "tests/test_topology.py::test_groups_are_the_rows_once_their_axes_are_moved_innermost"
SCHEDULE = "tests/test_schedule_properties.py::test_each_microbatch_passes_each_stage_once_in_order_where_the_config_has_the_stage"
PLAN_PROPERTIES = "tests/test_schedule_properties.py"
LINKS = "tests/test_schedule.py::test_a_receive_is_posted_when_its_message_is_sent"
REPLICAS = "tests/test_data.py::test_replicas_together_take_the_samples_of_the_step[2]"
LOSS = f"{RULES}::test_loss_and_gradient_of_large_logits_in_two_slices_equal_torch[apart]"
NEAR = LOSS.replace("apart", "near")
BF16 = "tests/test_training.py::test_one_seed_draws_one_model_in_every_layout[bf16]"
SEED = f"{RULES}::test_the_ranks_of_a_layout_draw_one_model_and_own_each_element_once[1d2]"
RESUMES, STRICT, RESUMED_RUNS = (f"tests/test_{name}.py" for name in ("resume", "strict", "resumed_runs"))
STATE, GROUP_FIELDS = "parallel/engine/state.py", "parallel/optim/param_groups.py"
EVERY_FIELD = f"{RESUMES}::test_every_field_of_every_group_resumes_in_every_stage_and_placement_as_in_plain_torch"
THAWED = f"{RESUMES}::test_what_is_frozen_is_saved_and_what_is_thawed_starts_with_new_states"
NAMED = f"{STRICT}::test_names_left_over_and_missing_are_refused_on_every_rank_and_named_without_strict"
LOSS_TERMS = "parallel/modules/loss_terms.py"
LABELS = "a mean over labels, in a class of any name"
MASKED = "a sum that is divided by a tensor, `(losses * mask).sum() / mask.sum()`"
AGREED, SHARES = "parallel/engine/agreed_batches.py", "parallel/modules/shares.py"
SURGERY_TESTS = "tests/test_surgery.py"
SAVED, GRAPH_TESTS = "parallel/zero/saved.py", "tests/test_graphs.py"
WRITTEN, ACCESS = "tests/test_user_writes.py", "tests/test_parameter_access.py"
PARTED = "tests/test_parting.py::test_a_rank_that_parts_is_named_as_the_table_says[{}]"
EXPORTS = "tests/test_export.py"


def torch_norm(layout: str) -> str:
    """Return the test that norms over a split dim and over heads equal torch's in this layout."""
    return f"tests/test_norms.py::test_a_split_norm_equals_torch[{layout}]"


def trains(layout: str) -> str:
    """Return the test that two steps in this layout equal Hugging Face's, from the same weights."""
    return f"{RULES}::test_unequal_microbatches_train_as_one_batch_of_hugging_face[{layout}]"


def drops(part: str) -> str:
    """Return the test that no two samples or positions share a dropout mask in this part of a block."""
    return f"{RULES}::test_no_two_samples_and_no_two_positions_have_one_dropout_mask[{part}]"


def counts(row: str) -> str:
    """Return the test that losses of this row of the documentation's table equal those of one batch."""
    return f"tests/test_any_loss.py::test_every_loss_equals_plain_torchs_with_all_samples_in_one_batch[{row}-0]"


def graph(row: str) -> str:
    """Return the test of a row of the document's table of graphs."""
    return f"{GRAPH_TESTS}::test_what_the_document_says_of_graphs_is_so[{row}]"


def folder_row(what: str) -> str:
    """Return the test of a row of the table of model folders."""
    return f"tests/test_folders.py::test_what_users_bring_as_a_model_is_treated_as_the_table_says[{what}]"


def text_row(what: str) -> str:
    """Return the test of a row of the table of texts and tokenizers."""
    return f"tests/test_texts.py::test_what_users_bring_as_text_is_treated_as_the_table_says[{what}]"


LINE, GRID, MATMUL = (f"parallel/tensor/{name}.py" for name in ("line", "grid", "matmul"))
MODE, LAYERS, CROSS_ENTROPY = (f"parallel/tensor/{name}.py" for name in ("mode", "layers", "loss"))
IN_TORCH = "parallel/ops/kernels/cross_entropy.py"
NORMS, RESIDUAL = "parallel/tensor/norms.py", "parallel/tensor/residual.py"
SPLIT, RING, BLOCKS, KERNELS = (f"parallel/sequence/{name}.py" for name in ("split", "ring", "blocks", "kernels"))
ACROSS = "tests/test_sequence.py::test_attention_across_ranks_equals_its_formula"
SEEN = "tests/test_sequence.py::test_every_pair_is_computed_once_and_every_rank_computes_as_many"
WHOLE = "tests/test_grouped_attention.py::test_whole_sequences_are_attended_to_as_the_formula_says"
PARTS = "tests/test_grouped_attention.py::test_split_sequences_are_attended_to_as_the_formula_says"
IMPORTS, MARKS = "tests/test_imports.py", "parallel/ops/compiling.py"
TORCH_OPTIM, LEAVES = "parallel/optim/torch_optimizer.py", "parallel/optim/leaves.py"
ENGINE, COUNTS, LAYOUT = "parallel/engine/engine.py", "parallel/optim/update_counts.py", "parallel/layout/layout.py"
REPLICA_BATCHES = "parallel/engine/replica_batches.py"
ROUND = "parallel/optim/rounding.py"
CHUNK, SPEC, ACCUMULATOR, BUFFER, GRADIENT = (
    f"parallel/chunk/{name}.py" for name in ("chunk", "spec", "accumulator", "parameters", "gradient")
)
CHUNK_SUM = "parallel/optim/chunk_sum.py"
RUNNER, CONJUGATE, NORM = "parallel/pipeline/runner.py", "parallel/mesh/conjugate.py", "parallel/optim/grad_norm.py"
BASE = "parallel/engine/base.py"
INPUTS, INPUT = "parallel/activations/offload.py", "parallel/activations/kept_input.py"
SWAPPER = "parallel/storage/swapper.py"
MODULE, GATHERER = "parallel/engine/module_engine.py", "parallel/zero/gatherer.py"
SHARDED, LAZY, RECORDER, CONSTRUCTION = (
    f"parallel/modules/{name}.py" for name in ("sharded", "lazy", "recorder", "construction")
)
LAYER, OPT, BUILD, HF = "models/layer.py", "models/opt/layers.py", "models/build.py", "models/hf.py"
ATTENTION = "models/attention.py"
SHAPE, OPT_SHAPE = "models/shape.py", "models/opt/shape.py"
INITIAL_VALUES = "models/initial_values.py"

# fmt: off
DROPPED_REDUCTIONS = (
    Mutant("1d-output-not-reduced", "linear_out leaves each rank its partial sum",
           LINE, "LinearCollectives(copy_x=t), LinearCollectives(reduce_y=t)",
           "LinearCollectives(copy_x=t), LinearCollectives()", trains("1d2")),
    Mutant("1d-input-gradient-not-reduced", "linear_in's dx stays a partial sum",
           LINE, "LinearCollectives(copy_x=t), LinearCollectives(reduce_y=t)",
           "LinearCollectives(), LinearCollectives(reduce_y=t)", trains("1d2")),
    Mutant("1d-lookup-not-reduced", "a token's embedding is zero on every rank that does not hold its row",
           LINE, "self.reduce_rows = t", "pass", trains("1d2")),
    Mutant("grid-lookup-not-summed", "a column keeps its slice of the embeddings in its own rows, not of the sum over all rows",
           MODE,
           "return reduce(scatter(rows, *self.scatter_rows), self.reduce_rows)",
           "dim, axis = self.scatter_rows; return reduce(rows.chunk(axis.size, dim)[axis.rank], self.reduce_rows)",
           trains("2d1x2")),
    Mutant("cube-product-not-summed", "the matmul's partial sums over o are sliced, not added",
           MATMUL,
           "return all_reduce(reduce_scatter(y, *self.scatter_y), self.reduce_y)",
           "dim, axis = self.scatter_y; return all_reduce(y.chunk(axis.size, dim)[axis.rank], self.reduce_y)",
           trains("3d2x2x2")),
    Mutant("input-gradient-not-summed", "each rank keeps its slice of its own dx, without what the other ranks add to it",
           MATMUL,
           "return start_reduce_scatter(dx, *self.gather_x)",
           "return Pending(dx.chunk(self.gather_x[1].size, self.gather_x[0])[self.gather_x[1].rank])",
           trains("2d1x2")),
    Mutant("weight-gradient-not-summed", "each rank keeps its slice of its own dW, without what the other ranks add to it",
           MATMUL,
           "return reduce_scatter(dw, -1, self.gather_w)",
           "return dw.chunk(self.gather_w.size, -1)[self.gather_w.rank]",
           trains("2d2x1")),
    Mutant("cube-lookup-not-summed", "each rank keeps only the rows found in its own slice of the vocabulary",
           MODE,
           "return reduce(scatter(rows, *self.scatter_rows), self.reduce_rows)",
           "dim, axis = self.scatter_rows; return reduce(rows.chunk(axis.size, dim)[axis.rank], self.reduce_rows)",
           trains("3d2x2x2")),
    Mutant("layer-norm-mean-not-reduced", "mean and variance are those of this rank's part of the hidden dim",
           RESIDUAL, "statistics = all_gather(statistics, 0, axis)", "pass", trains("2d1x2")),
    Mutant("layer-norm-mean-gradient-not-reduced", "dx lacks what comes through mean and variance from other ranks",
           NORMS, "sums = ctx.dim.sum(sums)", "pass", trains("2d1x2")),
    Mutant("layer-norm-variance-of-parts", "the variance leaves out how far the ranks' means are apart",
           RESIDUAL, "(variances + (means - mean).square()).mean(0)", "variances.mean(0)", trains("2d1x2")),
    Mutant("loss-denominator-not-reduced", "the softmax is over this rank's part of the vocabulary only",
           CROSS_ENTROPY,
           "x = all_reduce(x, axis)\n",
           "x = torch.stack([x[0], all_reduce(x[1], axis)])\n",
           trains("1d2")),
    Mutant("loss-target-not-reduced", "the label's logit is counted only on the rank that holds it",
           CROSS_ENTROPY,
           "x = all_reduce(x, axis)\n",
           "x = torch.stack([all_reduce(x[0], axis), x[1]])\n",
           trains("1d2")),
    Mutant("reduce-twice", "reduce's backward sums a gradient that is whole already",
           CONJUGATE,
           "_reduce = _conjugate(all_reduce, _identity)",
           "_reduce = _conjugate(all_reduce, all_reduce)",
           trains("1d2")),
    Mutant("gather-backward-not-summed", "a gathered tensor's gradient is sliced, not summed over ranks",
           CONJUGATE,
           "_gather = _conjugate(all_gather, reduce_scatter)",
           "_gather = _conjugate(all_gather, lambda grad, dim, axis: grad.chunk(axis.size, dim)[axis.rank])",
           trains("2d2x1")),
)

GRADIENT_RULE = (
    Mutant("data-not-summed", "each replica keeps its own gradient",
           MODE,
           'for name in ("data", "context", *self.token_axes) if name not in done)), *heads]',
           'for name in ("context", *self.token_axes) if name not in done)), *heads]',
           trains("dp2")),
    Mutant("depth-not-summed", "each depth of 2.5d keeps its own gradient",
           GRID,
           'token_axes = ("depth", "row")\n    merged = (("depth",), ("depth", "row"))',
           'token_axes = ("row",)\n    merged = (("row",),)',
           trains("2.5d-depth2")),
    Mutant("row-not-summed", "gradients of LayerNorms, biases and positions are those of one row's tokens",
           GRID, 'token_axes = ("depth", "row")', 'token_axes = ("depth",)', trains("2d2x1")),
    Mutant("layer-norm-gradient-not-summed", "LayerNorm's own gradient stays local",
           MODE,
           "layout = self.layout((hidden,), self.hidden) if affine else None",
           "layout = Layout((hidden,), (self.hidden,), (), self.layout((hidden,), self.hidden).sync)",
           trains("2.5d-depth2")),
    Mutant("tied-gradient-not-summed", "the first and the last stage's copies of the tied embedding become different",
           MODE, "sync.append(self.mesh.ends)", "pass", trains("pp2")),
    Mutant("gradient-left-in-place", "a microbatch's gradient is added again with the next one's",
           CHUNK_SUM, "gradient, parameter.grad = parameter.grad, None", "gradient = parameter.grad", trains("single")),
    Mutant("gradient-of-the-last-microbatch-alone", "microbatches replace each other's gradients",
           ACCUMULATOR, "accumulate(gradient, view, is_first=not self.arrivals[i])",
           "accumulate(gradient, view, is_first=True)", trains("single")),
    Mutant("sum-before-the-last-microbatch", "a gradient is summed over ranks before the last microbatch was added to it",
           CHUNK_SUM,
           "self.waits_for = num_microbatches * self", "self.waits_for = self",
           OVERLAP),
    Mutant("sum-after-the-backward", "no sum over ranks is launched until the last gradient has arrived",
           CHUNK_SUM, "        if not self.missing:\n            self.completed(self)\n", "", OVERLAP),
    Mutant("padding-of-a-gradient-left-as-it-was", "uninitialized padding is counted in the norm",
           ACCUMULATOR,
           "self.buffer[end:stop].zero_()",
           "pass",
           "tests/test_chunk.py::test_the_padding_of_a_new_gradient_is_zero"),
    Mutant("gradient-of-the-last-step-kept", "gradients are accumulated from step to step",
           ACCUMULATOR,
           "        self.arrivals = [0] * len(self.spec.infos)\n",
           "        self.arrivals = getattr(self, 'arrivals', [0] * len(self.spec.infos))\n",
           trains("single")),
)

ZERO = (
    Mutant("last-round-alone", "where each microbatch's gradient is reduce-scattered, the last one replaces the others",
           CHUNK_SUM,
           "arrived if gradient.total is None else gradient.on_device().add_(arrived)", "arrived",
           f"{STAGES}::test_accumulation_keeps_stage_1_bit_for_bit_and_the_others_within_rounding[dp2]"),
    Mutant("updated-slices-not-gathered", "each rank goes on with its own slice updated and all other slices not",
           CHUNK,
           "return self.parameters.all_gather() if self.sharing.slice_is_view else Pending(self.parameters.own)",
           "return Pending(self.parameters.own)",
           f"{STAGES}::test_with_one_microbatch_every_stage_equals_stage_0_bit_for_bit_in_fp32[dp2]"),
    Mutant("narrow-parameters-not-refreshed", "a bf16 model goes on with the parameters of the step before",
           BUFFER, "            self.own.copy_(master)\n", "            pass\n",
           "tests/test_chunk.py::test_parameters_become_views_of_one_buffer_and_keep_their_values"),
    Mutant("parameters-kept-after-a-forward", "a layer's parameters stay gathered after its forward",
           "parallel/zero/gatherer.py", "            self.units[i].make_released()\n", "            pass\n",
           f"{STAGES}::test_a_step_sends_what_the_table_of_stages_says[3]"),
    Mutant("range-without-its-last-row", "no checkpoint has the end of a parameter's slice",
           LAYOUT, "    yield from _in_row(shape, last, last * row, stop)\n", "",
           f"{STAGES}::test_rectangles_are_the_elements_of_a_range_in_order"),
)

NORM_AND_CLIP = (
    Mutant("norm-counts-replicas", "parameters that several ranks hold are counted several times in the norm",
           SPEC, "(*self.axes[1:], *self.infos[0].layout.copies)", "self.axes[1:]", trains("1d2")),
    Mutant("norm-counts-a-slice-of-every-replica-whole", "replicas count the same elements in the norm",
           GRADIENT, "return self.spec.counted_slice(self.total)", "return self.total", trains("dp2")),
    Mutant("norm-counts-the-tied-embedding-twice", "the first and the last stage both count it",
           SPEC, "(*self.axes[1:], *self.infos[0].layout.copies)", "self.infos[0].layout.copies", trains("pp2")),
    Mutant("norm-of-this-rank", "each rank clips by the norm of its own parameters only",
           NORM, "found = all_reduce(torch.cat([total.view(1), numbers.view(-1)]), world)",
           "found = torch.cat([total.view(1), numbers.view(-1)])", trains("1d2")),
    Mutant("overflow-of-a-replica-missed", "an infinity on a rank whose copy is not counted is not noticed",
           NORM,
           "total = (squares * to_device(is_counted, squares.device)).sum()",
           "total = squares[is_counted.bool()].sum()",
           f"{HALF}::test_an_overflow_on_any_rank_makes_every_rank_skip_and_halve[1d2-1]"),
    Mutant("skipped-step-moves-the-schedule", "the learning-rate schedule goes on although nothing was updated",
           BASE, "learning_rate(schedule, rate, self.num_updates,", "learning_rate(schedule, rate, self.num_steps,",
           f"{HALF}::test_an_overflow_on_any_rank_makes_every_rank_skip_and_halve[single-0]"),
    Mutant("clip-without-epsilon", "the clip coefficient lacks the 1e-6 that torch has in its denominator",
           NORM, "(clip / (norm + 1e-6))", "(clip / norm)", trains("single")),
    Mutant("clip-scales-up", "a gradient whose norm is below the limit is scaled up to it",
           NORM, ".clamp(max=1.0) if clip", " if clip", f"{RULES}::test_clipping_equals_torch[50.0]"),
)

MEANS = (
    Mutant("no-mean", "the gradient is that of the summed loss, not of its mean",
           REPLICA_BATCHES, "scale = self.steps.loss_scale.scale / max(1, tokens)", "scale = 1.0", trains("single")),
    Mutant("count-of-this-replica", "the mean is over one replica's labels",
           REPLICA_BATCHES,
           "tokens, refused, total, squares = all_reduce(sums, self.data).tolist()",
           "tokens = int(sums[0]); _, refused, total, squares = all_reduce(sums, self.data).tolist()",
           trains("dp2")),
    Mutant("mean-of-replica-means", "each replica divides by its own count, then they average",
           REPLICA_BATCHES,
           "tokens, refused, total, squares = all_reduce(sums, self.data).tolist()",
           "tokens = int(sums[0]) * self.data.size; _, refused, total, squares = all_reduce(sums, self.data).tolist()",
           trains("dp2")),
    Mutant("mean-of-microbatch-means", "each microbatch has the same weight, however many labels it has",
           RUNNER,
           "[self.ends.pop(key)], [gradient]",
           "[self.ends.pop(key)], [gradient if gradient is not None else "
           "sum((each.labels != -100).sum() for each in self.microbatches).double() / len(self.microbatches)"
           " / (self.microbatches[key[1]].labels != -100).sum()]",
           trains("single")),
    Mutant("padding-has-labels", "a label of -100 is counted in the mean",
           REPLICA_BATCHES, "num_counted(staged.whole.labels)", "staged.whole.labels.numel()", trains("single")),
    Mutant("labels-not-shifted", "the label of a token is the token itself",
           "parallel/pipeline/staged.py", "                shift(x, out)\n", "                out.copy_(x)\n",
           trains("single")),
    Mutant("loss-counted-on-every-rank", "a loss that several ranks compute is added several times",
           MODE,
           "return all(self.mesh.axis(name).rank == 0 for name in self.axes if",
           "return True or all(self.mesh.axis(name).rank == 0 for name in self.axes if",
           trains("1d2")),
)

PARAMETERS = (
    Mutant("bias-on-every-rank", "a bias is added to every rank's partial sum, so once for each rank",
           MATMUL, "None if is_partial else bias)", "bias)", trains("1d2")),
    Mutant("bias-left-out", "the bias is not added where partial sums are",
           MATMUL, "return y.add_(bias) if is_partial and bias is not None else y", "return y", trains("1d2")),
    Mutant("decay-on-fused-biases", "the biases of q, k and v, in one tensor of two dims, decay like a matrix",
           LAYOUT, "return all(len(source.shape) >= 2 for source in self.sources)", "return len(self.layout.shape) >= 2",
           trains("single")),
    Mutant("padding-token-gets-a-gradient", "the padding token's embedding gets a gradient from the lookup",
           LAYERS, "padding_idx = self.padding_idx - first", "padding_idx = None", trains("single")),
    Mutant("padding-token-of-every-slice", "row 1 of every slice of the vocabulary is treated as the padding token's",
           LAYERS,
           "and 0 <= self.padding_idx - first < self.weight.shape[0]:\n            padding_idx = self.padding_idx - first",
           ":\n            padding_idx = self.padding_idx",
           trains("1d2")),
    Mutant("first-row-off-by-one", "every slice of the vocabulary but the first one begins at a row that is too early",
           LAYOUT,
           "return index_along(self.axes_of_dims[0]) * self.local_shape[0]",
           "return index_along(self.axes_of_dims[0]) * (self.local_shape[0] - 1)",
           trains("1d2")),
    Mutant("padding-rows-in-the-softmax", "the vocabulary's padding takes part in the loss",
           IN_TORCH, "logits[..., len(entries) :].fill_", "logits[..., len(entries) + 1 :].fill_", trains("1d2")),
    Mutant("last-row-left-out", "a label on the last row of a slice is on no rank",
           IN_TORCH,
           "mine = (index >= 0) & (index < len(entries))",
           "mine = (index >= 0) & (index < len(entries) - 1)",
           LOSS),
    Mutant("no-maximum-in-the-loss", "the exponential of a large logit overflows",
           IN_TORCH,
           "own_total = own_total * (own_top - top).exp()",
           "own_total, top = own_total * own_top.exp(), 0 * top",
           LOSS),
    Mutant("maximum-added-again", "two large logits are added before they are subtracted",
           IN_TORCH,
           "loss = ((total.log() - target)",
           "loss = (((total.log() + top) - (target + top))",
           NEAR),
    Mutant("maximum-of-this-rank", "each rank sums exponentials relative to its own maximum",
           CROSS_ENTROPY, "x = all_reduce(x, axis, MAX)", "pass", LOSS),
    Mutant("drawn-by-rank", "a rank draws its slice as if it were the whole tensor",
           INITIAL_VALUES,
           "draw_normal(piece.shape, piece.box, wanted.std",
           "draw_normal(tuple(piece.data.shape), tuple((0, n) for n in piece.data.shape), wanted.std",
           SEED),
    Mutant("masters-rounded", "the master weights of a bf16 model start as its rounded weights",
           BUILD, "master_dtype(context.dtype),\n        sequence", "context.dtype,\n        sequence", BF16),
    Mutant("padding-row-drawn", "the embedding of the padding token starts with drawn values instead of zeros",
           INITIAL_VALUES, "drawn[shape.padding_row - start] = 0", "pass", SEED),
    Mutant("every-replica-owns", "a checkpoint and an export get an element twice",
           SPEC, "return self.is_counted and (self.zero >= 1 or self.axes[0].rank == 0)", "return True",
           trains("dp2")),
)

PLACES = (
    Mutant("rows-and-columns-swapped", "the grid's weights are split along K over the columns",
           GRID, "self.k_in = self.k_out = (row,)", "self.k_in = self.k_out = (col,)", trains("2d2x2")),
    Mutant("inner-axis-first", "the parts of a dim that is split over two axes are numbered in the wrong order",
           LAYOUT,
           "    for axis in axes:\n        index = index",
           "    for axis in reversed(axes):\n        index = index",
           trains("3d2x2x2")),
    Mutant("ranks-column-major", "the outermost axis varies fastest",
           "parallel/mesh/topology.py", "math.prod(sizes[i + 1 :])", "math.prod(sizes[:i])", TOPOLOGY),
    Mutant("merged-axes-in-the-wrong-order", "the ranks of a merged axis are numbered in the wrong order",
           "parallel/mesh/topology.py",
           "for axis in self.shape if axis in axes]",
           "for axis in reversed(list(self.shape)) if axis in axes]",
           GROUPS),
    Mutant("replicas-take-the-same-samples", "every replica reads the first one's rows",
           "models/data/loader.py", "slice(replica * rows, (replica + 1) * rows)", "slice(0, rows)", REPLICAS),
    Mutant("queries-are-keys", "Hugging Face's q and k are exchanged when they are read",
           OPT_SHAPE, '("self_attn.q_proj", "self_attn.k_proj"', '("self_attn.k_proj", "self_attn.q_proj"', trains("single")),
)

MODEL = (
    Mutant("positions-from-zero", "positions do not start at 2, as OPT's do",
           OPT, "* mask - 1 + POSITION_OFFSET", "* mask", trains("single")),
    Mutant("a-token-sees-the-future", "attention has no causal mask",
           SPLIT, "device=q.device).tril()", "device=q.device)",
           trains("single")),
    Mutant("padding-is-attended-to", "the attention mask is ignored",
           SPLIT, "else seen & masking.tokens[:, None, None, :]", "else seen[None, None]",
           trains("single")),
    Mutant("dropout-the-same-for-every-sample", "a dropout mask depends on the position only",
           LAYER, "rows = samples.unsqueeze(1) * batch.length", "rows = samples.unsqueeze(1) * 0",
           drops("block")),
    Mutant("attention-dropout-the-same-for-every-sample", "a dropout mask of attention depends on head and position only",
           ATTENTION, "samples.unsqueeze(1) * self.all_heads + heads", "samples.unsqueeze(1) * 0 + heads",
           drops("attention")),
    Mutant("dropout-the-same-on-every-replica", "replicas give the same numbers to their samples",
           REPLICA_BATCHES,
           "first = num_samples + self.data.rank * len(ids)",
           "first = num_samples",
           f"{RULES}::test_replicas_have_the_dropout_masks_of_a_single_rank"),
    Mutant("dropout-the-same-in-every-step", "the numbers of samples start again in each step",
           REPLICA_BATCHES,
           "first = num_samples + self.data.rank * len(ids)",
           "first = self.data.rank * len(ids)",
           f"{RULES}::test_a_batch_repeated_in_the_next_step_has_other_dropout_masks"),
)

SEQUENCES = (
    Mutant("ring-sees-the-future", "a rank attends to the later part of another rank's keys instead of the earlier one",
           RING, "Block(queries, keys[:1], length", "Block(queries, keys[1:], length", SEEN),
    Mutant("ring-takes-the-later-half", "a block describes one half of another rank's keys, and its kernel gets the other half",
           RING, "masking), ALL, slice(0, local // 2)", "masking), ALL, slice(local // 2, local)", SEEN),
    Mutant("ring-gradients-not-returned", "gradients of keys and values that other ranks compute are not sent back to their owner",
           RING, "in_flight = start_rotate(dkv, axis)", "in_flight = Pending(dkv)", f"{ACROSS}[2-ring-causal]"),
    Mutant("ring-sums-in-16-bits", "gradients of keys and values are rounded on every rank they pass",
           RING, "options.zigzag.axis, torch.promote_types(q.dtype, torch.float32)", "options.zigzag.axis, q.dtype",
           "tests/test_sequence.py::test_a_block_sends_as_much_as_the_table_says[ring 2]"),
    Mutant("ring-keeps-remote-blocks", "the keys and values of other ranks stay in memory until backward",
           RING, "            del keys, values  # or they would be held beside the next ones\n",
           "            ctx.keys = keys\n",
           "tests/test_sequence.py::test_a_block_keeps_only_its_own_tokens[ring 2]"),
    Mutant("ring-sends-late", "the next part is sent only after attention to the one before is computed",
           RING, "            in_flight = start_rotate(received, axis)\n        else:\n            del in_flight\n"
           "        keys, values = received.unbind(0)\n        del received\n"
           "        yield (axis.rank - step) % axis.size, keys, values\n",
           "            pass\n        keys, values = received.unbind(0)\n"
           "        yield (axis.rank - step) % axis.size, keys, values\n        in_flight = start_rotate(received, axis)\n",
           "tests/test_sequence.py::test_keys_are_in_flight_while_others_are_attended_to"),
    Mutant("ring-attends-by-flash", "a GPU does not use its faster kernel",
           KERNELS, "return ON_GPU[chosen]", "return ON_GPU[SDPBackend.FLASH_ATTENTION]",
           "tests/test_sequence.py::test_a_gpu_attends_with_the_kernel_that_torch_would_choose"),
    Mutant("kernel-asked-for-the-whole", "torch is asked for a kernel for blocks twice as long as they are",
           KERNELS, "q[..., : max(1, q.shape[-2] // 2), :]", "q",
           "tests/test_sequence.py::test_a_gpu_attends_with_the_kernel_that_torch_would_choose"),
    Mutant("ring-waits-before-it-computes", "the gradients of a block are not computed until those that they are added to have come",
           RING, "        results = [contribution(part, keys, values) for part in parts]\n"
           "        dkv = torch.zeros_like(own_dkv) if in_flight is None else in_flight.wait()\n",
           "        dkv = torch.zeros_like(own_dkv) if in_flight is None else in_flight.wait()\n"
           "        results = [contribution(part, keys, values) for part in parts]\n",
           "tests/test_sequence.py::test_keys_are_in_flight_while_others_are_attended_to"),
    Mutant("rotates-backwards", "what should come from the previous rank comes from the next one",
           "parallel/mesh/collectives.py",
           "to[(axis.rank + 1) % axis.size] = source[(axis.rank - 1) % axis.size]",
           "to[(axis.rank - 1) % axis.size] = source[(axis.rank + 1) % axis.size]",
           "tests/test_sequence.py::test_all_to_all_and_rotate_move_the_right_parts"),
    Mutant("positions-of-the-first-part", "every rank numbers its tokens from the beginning of the sequence",
           LAYER, "self.blocks_mode.tokens_between(self.learned.rows_of(batch))",
           "self.blocks_mode.local(self.learned.rows_of(batch), self.blocks_mode.batch)[:, : found.shape[1]]",
           "tests/test_training.py::test_padded_samples_train_as_in_hugging_face[ring3]"),
    Mutant("dropout-numbers-a-part", "a sample's last positions share dropout masks with the next sample's first ones",
           LAYER, "samples.unsqueeze(1) * batch.length", "samples.unsqueeze(1) * sequence",
           "tests/test_property.py::test_eight_ranks_equal_a_single_rank[dp2-a2a2-1d2]"),
    Mutant("a-mask-of-ones-is-kept", "attention uses a kernel for padding where nothing is padded",
           REPLICA_BATCHES, "if mask is not None and bool(mask.all()):", "if mask is not None and not bool(mask.any()):",
           "tests/test_batches.py::test_a_mask_without_padding_is_left_out"),
    Mutant("16-bit-scores", "attention scores are rounded to 16 bits before the softmax",
           KERNELS, "scores = _products(q, k.mT, wide)", "scores = _products(q, k.mT, q.dtype).to(wide)",
           "tests/test_sequence.py::test_unfused_attention_is_as_exact_as_flash"),
    Mutant("ring-merges-the-other-way", "the weights of the earlier and the new result are exchanged when they are merged",
           RING, "(logsumexp - own).sigmoid_()", "(own - logsumexp).sigmoid_()", f"{ACROSS}[2-ring-causal]"),
    Mutant("ring-drops-what-other-ranks-added", "the gradients of keys and values start from zero again on every rank",
           RING, "if in_flight is None else in_flight.wait()\n        for",
           "if True else in_flight.wait()\n        for",
           f"{ACROSS}[3-ring-causal]"),
    Mutant("ring-keeps-one-parts-logsumexp", "the softmax is over the keys that came first only",
           RING, "own.copy_(torch.logaddexp(own, logsumexp))", "own", f"{ACROSS}[2-ring-causal]"),
    Mutant("zigzag-order-missing", "ranks hold consecutive tokens, while attention expects the zigzag order",
           MODE, "return self.sequence.local_part(self.local(x, batch))",
           "x = self.local(x, batch)\n        return x.chunk(self.sequence.axis.size, 1)[self.sequence.axis.rank]",
           "tests/test_parity.py::test_training_equals_hugging_face[ring3-fp64]"),
    Mutant("exchange-drops-the-same-on-every-rank", "the heads of every rank use the dropout masks of the first heads",
           SPLIT, "heads=local_slice(drop.heads, 1, self.axis)", "heads=drop.heads[:, :own_heads]",
           f"{ACROSS}[2-all_to_all-dropout]"),
    Mutant("padding-of-other-ranks", "the padding mask of the first keys is used for all keys",
           BLOCKS, "tokens[:, self.columns]", "tokens[:, : len(self.columns)]", f"{ACROSS}[2-ring-padded]"),
    Mutant("context-not-summed", "gradients are not summed over the ranks that split a sequence",
           MODE, 'for name in ("data", "context", *self.token_axes)', 'for name in ("data", *self.token_axes)',
           "tests/test_parity.py::test_training_equals_hugging_face[a2a2-fp32]"),
    Mutant("dropout-by-a-ranks-own-positions", "two parts of a sequence share a dropout mask",
           LAYER, "mode.positions_between(sequence, y.device)", "torch.arange(sequence, device=y.device)",
           "tests/test_property.py::test_eight_ranks_equal_a_single_rank[pp2-ring2-2d-1x2]"),
)

ORDER = (
    Mutant("rate-of-the-next-step", "the learning rate is that of the next step",
           BASE,
           "learning_rate(schedule, rate, self.num_updates,",
           "learning_rate(schedule, rate, self.num_updates + 1,",
           trains("single")),
    Mutant("gpipe-forward-left-out", "the first forward after the warm-up is left out",
           "parallel/pipeline/orders.py",
           "zip_longest(islice(self.forwards, self.num_warmup, None), self.backwards)",
           "zip_longest(islice(self.forwards, self.num_warmup + 1, None), self.backwards)",
           SCHEDULE),
    Mutant("received-after-use", "a stage computes before its input has been received",
           "parallel/pipeline/transfers.py",
           "(end, 0, rank, message)",
           "(end, 2, rank, message)",
           LINKS),
    Mutant("weight-gradients-before-the-message", "the previous stage waits until this one has computed the gradients of its weights",
           RUNNER, "with self.weight_gradients.deferring(key):", "if True:",
           "tests/test_chunk.py::test_gradients_of_weights_are_computed_after_the_gradient_for_the_stage_before_is_sent"),
    Mutant("weight-gradients-never-computed", "W computes nothing: a stage that sends a gradient never computes those of its weights",
           RUNNER, "self.weight_gradients.run_deferred(key)", "pass", trains("pp2-gpipe")),
    Mutant("oldest-activation-sent-again", "the next stage gets another microbatch's activations",
           RUNNER,
           "start_send(kept.pop((action.stage, action.microbatch)), axis",
           "start_send(kept.setdefault((-1, -1), kept.pop((action.stage, action.microbatch))), axis",
           trains("pp2-gpipe")),
    Mutant("gradient-to-another-microbatch", "the backward of one microbatch starts from the gradient of another",
           RUNNER,
           "(x := self.inputs.pop(key, None))",
           "(x := next(iter(self.inputs.values()), None))",
           trains("pp2-gpipe")),
)

SHARDED_INIT = (
    Mutant("every-rank-keeps-the-first-slice", "a gathered parameter repeats its first part",
           SHARDED, "[i * size : (i + 1) * size]", "[:size]", LOADED),
    Mutant("tied-placeholders-compared", "a tied weight that is stored under both its names is loaded as two weights",
           RECORDER, "self.read(x) if self.is_recorded(x) else x", "torch.rand(x.shape) if self.is_recorded(x) else x",
           LOADED),
    Mutant("loaded-weights-stay-whole", "all weights stay whole while a model is loaded",
           RECORDER,
           "Shard.of(x.detach().to(HOST), self.axis), x.shape",
           "Shard.of(x.detach().to(HOST), dataclasses.replace(self.axis, size=1, rank=0)), x.shape",
           "tests/test_sharded_init.py::test_a_rank_holds_its_shards_and_one_parameter_at_most"),
    Mutant("overwritten-values-kept", "values that an initialization overwrites are kept until the model is complete",
           RECORDER,
           "blank = dataclasses.replace(target, content=None)",
           "blank = target",
           "tests/test_sharded_init.py::test_a_rank_holds_its_shards_and_one_parameter_at_most"),
    Mutant("each-rank-draws-its-own-model", "each rank draws its slices with a seed of its own",
           CONSTRUCTION, "broadcast(torch.get_rng_state(), replicas)", "torch.get_rng_state()", ONE_SEED),
    Mutant("a-draw-for-each-reading", "a value computed from a drawn weight is computed from another draw of it",
           LAZY,
           "torch.default_generator.manual_seed(self.seed)",
           "torch.default_generator.seed()",
           "tests/test_sharded_init.py::test_a_users_own_initialization_is_kept"),
    Mutant("missing-weight-unsaid", "a tensor that is missing in a directory is drawn at random, without a word",
           CONSTRUCTION,
           'if hasattr(root, "from_pretrained") and not',
           "if False and not",
           "tests/test_sharded_init.py::test_a_missing_tensor_is_drawn_as_hugging_face_draws_it_and_named_once"),
)

MODULES = (
    Mutant("sum-over-replicas", "a module's gradients are summed over replicas instead of averaged",
           "parallel/engine/parameter_access.py", "self.loss_scale.scale * self.data.size", "self.loss_scale.scale",
           ANY_MODULE),
    Mutant("unused-parameter-updated", "weights that got no gradient decay, and so do their moments",
           TORCH_OPTIM, "leaf.grad = None if segment.info.parameter in self.unused else", "leaf.grad =",
           ANY_MODULE),
    Mutant("replicas-start-with-different-weights", "each replica keeps the weights that it drew",
           "parallel/modules/parameters.py", "            broadcast(info.parameter.data, axis)\n", "            pass\n",
           ANY_MODULE),
    Mutant("problem-of-one-rank-kept", "the other ranks wait for a rank that has raised an error",
           "parallel/mesh/agreement.py", "    raise error(all_problems)", "    raise error(problem)", f"{REFUSALS}[cast]"),
    Mutant("recomputed-layer-released", "a layer is gathered once more after its recomputation",
           GATHERER, "if _backward() < 0 and not self._is_running(i):", "if True:",
           "tests/test_module_cost.py::test_a_step_sends_what_the_table_of_stages_says"),
    Mutant("layers-kept-through-backward", "all layers are still gathered at the end of a backward",
           GATHERER, "        self._release_unused(i, following[i])\n", "",
           "tests/test_module_cost.py::test_no_more_than_two_layers_are_whole_at_once_and_none_is_left"),
    Mutant("microbatches-weigh-the-same", "the loss is a mean of the microbatches' means, whatever their numbers of labels",
           MODULE, "(found.factor * factor)", "(1 / len(microbatches))",
           f"{MODULE_STATE}::test_train_step_takes_the_mean_over_all_labels_however_replicas_share_them"),
    Mutant("checkpoint-without-steps", "Adam resumes with the same number of steps for every parameter",
           TORCH_OPTIM, "steps.get(name, updates if", "{}.get(name, updates if",
           f"{MODULE_STATE}::test_a_checkpoint_of_one_stage_resumes_in_another_as_if_nothing_had_happened"),
    Mutant("each-replica-shuffles", "replicas take parts of different batches",
           AGREED, "pickle.loads(broadcast_bytes(packed, self._agreement.axis))", "pickle.loads(packed)",
           f"{MODULE_STATE}::test_a_dataloader_gives_every_replica_its_part_of_the_same_batches"),
)

PLACEMENT = (
    Mutant("computation-without-end", "the whole of a profiled step is counted as computation",
           "parallel/placement/profile.py", "self._clock.seconds(self._begun, self._computed)",
           "self._clock.seconds(self._begun, self._clock.now())",
           f"{MANAGER_TESTS}::test_the_time_after_the_computation_is_not_counted_as_computation"),
    Mutant("host-parameters-not-refreshed", "parameters that are offloaded to the host are not updated",
           BUFFER, "            self.written = copies.download(master.to(self.own.dtype), self.own)\n",
           "            pass\n", f"{PLACEMENT_TESTS}::test_chunks_may_move_between_any_two_steps"),
    Mutant("narrow-parameters-left-on-the-host", "parameters on the host do not get the rounding of what streamed through the device",
           "parallel/optim/streaming.py", "            self._copies.download(on_device.own, on_host.own)\n",
           "            pass\n", f"{PLACEMENT_TESTS}::test_training_from_the_host_is_the_same_in_every_precision"),
    Mutant("rounds-on-the-host-replaced", "only the last microbatch's gradient is kept on the host",
           GRADIENT, "        self.memory.copies.upload(self.total, found, after=self.written).wait()\n",
           "        found.zero_()\n", f"{PLACEMENT_TESTS}::test_training_from_the_host_is_the_same_in_every_precision"),
    Mutant("moved-masters-not-updated", "a user's optimizer updates the memory in which the master weights were before they moved",
           LEAVES, "            leaf.data = renewed[segment.info].data\n", "            pass\n",
           f"{PLACEMENT_TESTS}::test_a_users_own_module_trains_the_same_under_every_policy"),
    Mutant("plan-beyond-its-budget", "parameters are kept on the device although they do not fit",
           "parallel/placement/policy.py", "num_states, k) <= allowed)", "num_states, k) <= 2 * allowed)",
           f"{PLACEMENT_TESTS}::test_a_plan_fits_and_everything_stays_on_the_device_if_it_fits"),
    Mutant("host-beyond-its-budget", "states are kept on the host although they do not fit",
           "parallel/placement/policy.py", "k) <= host.budget:", "k) <= 2 * host.budget:",
           f"{PLACEMENT_TESTS}::test_a_plan_fits_and_everything_stays_on_the_device_if_it_fits"),
    Mutant("slots-not-counted", "the host's budget leaves out the buffers through which states on a disk are read and written",
           "parallel/placement/policy.py", "max((chunk.slots for", "max((0 for",
           f"{DISK_TESTS}::test_states_on_a_disk_change_nothing_and_the_host_keeps_to_its_budget"),
    Mutant("slot-read-before-it-is-written", "reading ahead overwrites updated states that are not written yet",
           SWAPPER, "        for job in written:\n            job.result()\n", "",
           f"{DISK_TESTS}::test_files_have_the_same_content_in_parts_and_as_mapped_memory"),
    Mutant("updates-left-in-their-slots", "updated states are not written to the disk",
           SWAPPER, "        file.write_at(start, buffer[: stop - start])\n", "",
           f"{DISK_TESTS}::test_files_have_the_same_content_in_parts_and_as_mapped_memory"),
    Mutant("states-read-before-they-are-written", "a checkpoint reads states that are still being written",
           SWAPPER, "        self.wait()\n", "",
           f"{DISK_TESTS}::test_files_have_the_same_content_in_parts_and_as_mapped_memory"),
    Mutant("input-kept-on-the-device", "an input is copied to the host, and is kept on the device too",
           INPUT, "        del self._x\n", "        self.__dict__.setdefault('left', []).append(self._x)\n",
           f"{INPUT_TESTS}::test_what_is_kept_on_the_device_does_not_grow_with_the_number_of_blocks"),
    Mutant("module-input-kept-on-the-device", "transformers' own activation checkpointing is not replaced",
           "parallel/modules/recompute.py",
           "                _replace_checkpoint(module, inputs)\n",
           "                pass\n",
           f"{INPUT_TESTS}::test_what_is_kept_on_the_device_does_not_grow_with_a_modules_layers[opt]"),
    Mutant("input-not-prefetched", "each backward waits until its input is copied from the host",
           INPUTS, "            previous.prefetch()\n", "            pass\n",
           f"{INPUT_TESTS}::test_an_input_is_offloaded_and_copied_back_while_a_layer_computes"),
    Mutant("newest-input-offloaded", "the input that the next backward begins with is copied to the host and back",
           INPUTS, "        self._newest, self._is_first = weakref.ref(kept), False",
           "        kept.offload()\n        self._newest, self._is_first = weakref.ref(kept), False",
           f"{INPUT_TESTS}::test_there_are_as_many_buffers_as_inputs_on_the_host_at_once_and_an_evaluation_keeps_none"),
    Mutant("buffer-not-reused", "host buffers are not reused, so that their memory grows with every step",
           INPUT, "            self._pool.release(self._buffer)\n", "            pass\n",
           f"{INPUT_TESTS}::test_there_are_as_many_buffers_as_inputs_on_the_host_at_once_and_an_evaluation_keeps_none"),
    Mutant("buffer-reused-twice", "two inputs share one host buffer",
           "parallel/activations/host_pool.py", "return self._free.pop(id(fitting))", "return self._free[id(fitting)]",
           f"{INPUT_TESTS}::test_inputs_on_the_host_with_dropout_equal_no_recompute_bit_for_bit[single]"),
    Mutant("input-of-the-first-backward-alone", "a second backward through the same layers finds another input in the buffer",
           INPUT, "        x = self._x\n        self._give_up()\n",
           "        x = self._x\n        self._give_up()\n        self._pool.release(self._buffer)\n",
           f"{INPUT_TESTS}::test_a_users_own_module_trains_the_same_bit_for_bit[twice-1-cuda]"),
    Mutant("computes-after-it-gathers", "a layer waits for the copy of the next one's parameters",
           BUFFER, "        with copies.on_upload_stream():  # behind",
           "        arrival.wait()\n        with copies.on_upload_stream():  # behind",
           "tests/test_chunk.py::test_a_chunk_is_uploaded_and_gathered_while_the_device_computes"),
    Mutant("planned-by-a-skipped-step", "a plan is made from a step whose update was skipped",
           MANAGER, "        if skipped:\n            if state", "        if False:\n            if state",
           f"{MANAGER_TESTS}::test_a_step_whose_update_was_skipped_is_neither_planned_by_nor_measured"),
    Mutant("update-out-of-memory", "an update that runs out of memory gives no advice",
           "parallel/engine/user_loop.py",
           "        with self.memory_guard.explained(lambda: \"update\"):\n            self._update(norm, divisor,",
           "        if True:\n            self._update(norm, divisor,",
           "tests/test_placement.py::test_a_step_that_does_not_fit_says_what_would_help"),
    Mutant("evaluation-mode-not-ended", "a module stays in evaluation mode after an evaluation",
           "parallel/modules/evaluation.py", "            part.training = was_training\n", "            pass\n",
           "tests/test_module_state.py::test_an_evaluation_leaves_a_module_training_as_it_was"),
    Mutant("uneven-samples", "replicas with different numbers of samples wait for each other",
           REPLICA_BATCHES, "if total**2 != self.data.size * squares:", "if False:",
           "tests/test_batches.py::test_replicas_with_different_numbers_of_samples_are_refused"),
    Mutant("loader-counts-what-is-left-out", "a loader's length is not the number of batches that it yields",
           AGREED, "return len(self._batches)", "return len(self._batches) - 1",
           "tests/test_module_shapes.py::test_a_divided_loader_is_as_long_as_what_it_yields"),
    Mutant("step-time-of-one-slow-step", "the reported step time of a plan is that of one slow step",
           "parallel/placement/report.py", "median(self._seconds[SETTLING:])", "max(self._seconds[SETTLING:])",
           "tests/test_placement.py::test_auto_keeps_to_its_budget_and_logs_what_it_plans"),
    Mutant("embedding-gradient-of-the-last-tokens", "the gradient from some tokens replaces that from the others",
           CROSS_ENTROPY, "add_product if start else write_product", "write_product",
           f"{RULES}::"
           "test_loss_and_gradients_do_not_depend_on_how_many_logits_exist_at_a_time[dtype0-4]"),
    Mutant("received-too-early", "a receive occupies the GPU's multiprocessors while another microbatch computes",
           RUNNER, "for action in actions:", "for action in sorted(actions, key=lambda a: a.op is not Op.RECV_F):",
           "tests/test_chunk.py::test_gradients_of_weights_are_computed_after_the_gradient_for_the_stage_before_is_sent"),
    Mutant("recomputed-to-the-end", "recomputation repeats a block's last product and its sum over ranks, which nothing uses",
           MATMUL, "    if is_recomputation():", "    if False:",
           "tests/test_fp16_and_recompute.py::"
           "test_a_recomputation_ends_before_the_last_product_of_its_block"),
    Mutant("changed-input-computed-with", "an input that was changed in place is copied to the host, or used in a recomputation",
           INPUT, "if self._x._version != self._version:", "if False:",
           f"{INPUT_TESTS}::test_an_input_changed_in_place_is_refused_instead_of_used"),
    Mutant("longer-steps-unnoticed", "a plan for short sequences is kept for long ones",
           WORKLOADS, "return any(len(size)", "return bool(self.sizes) or any(len(size)",
           f"{MANAGER_TESTS}::test_larger_steps_are_planned_for_again_and_smaller_ones_keep_the_plan"),
    Mutant("skipped-layer-unnoticed", "a plan is kept although a layer is used that the profiled step did not use",
           WORKLOADS, "self._has_grown or not self._layers_of_step <= self._layers", "self._has_grown",
           f"{MANAGER_TESTS}::test_a_layer_that_was_skipped_so_far_and_longer_inputs_end_a_plan"),
    Mutant("plan-of-another-budget", "a resumed run uses a plan that was made for more memory",
           MANAGER, 'fits = state.get("key") == self._agreement.key', "fits = bool(state)",
           f"{MANAGER_TESTS}::test_a_resumed_run_keeps_its_plan"),
    Mutant("parts-not-freed", "the parts of an update are kept on the host although their chunk has moved",
           "parallel/optim/shared_update.py", "Side(counts[0],", "Side(_elements(streamed),",
           f"{PLACEMENT_TESTS}::test_a_chunk_that_has_moved_leaves_nothing_where_it_was"),
    Mutant("engines-not-freed", "autograd keeps the chunks of an engine that is not referenced any more",
           CHUNK_SUM, "partial(_arrive, weakref.ref(self), i)", "partial(self.take, i)",
           "tests/test_long_run.py::test_an_engine_without_references_frees_its_memory[ours]"),
    Mutant("disk-timed-as-the-bus", "the host gets less of an update than it could do while the device waits for the disk",
           "parallel/optim/shared_update.py",
           "from_disk = [part for part in parts if part.is_on_disk]", "from_disk = []",
           "tests/test_disk.py::test_states_from_a_disk_are_timed_apart_from_those_that_the_host_may_update"),
    Mutant("tied-weight-updated-on-two-sides", "one stage updates a tied weight on the host, the other one on the device",
           "parallel/optim/shared_update.py", " and len(chunk.spec.axes) == 1", "",
           f"{MANAGER_TESTS}::test_a_weight_that_two_stages_hold_is_updated_on_the_same_side"),
)

ROUNDING = (
    Mutant("moments-rounded-to-the-nearest", "moments are rounded to the nearest: half a unit is added instead of noise",
           ROUND, "            bits += self._draw(part, k, update)\n", "            bits += 2**15\n",
           f"{ROUNDING_TESTS}::test_the_mean_over_updates_is_the_number_before_rounding[dtype0]"),
    Mutant("moments-cut-off", "moments are truncated, and so become too small with every update",
           ROUND, "            bits += self._draw(part, k, update)\n", "            pass\n",
           f"{ROUNDING_TESTS}::test_the_mean_over_updates_is_the_number_before_rounding[dtype0]"),
    Mutant("one-noise-for-all-updates", "an element gets the same noise in every update",
           ROUND, "seed_of(piece.name, moment, update, dim)", "seed_of(piece.name, moment, dim)",
           f"{ROUNDING_TESTS}::test_the_mean_over_updates_is_the_number_before_rounding[dtype0]"),
    Mutant("both-moments-have-one-noise", "both moments of an element get the same noise",
           ROUND, "seed_of(piece.name, moment, update, dim)", "seed_of(piece.name, update, dim)",
           f"{ROUNDING_TESTS}::test_noise_differs_between_moments_updates_tensors_and_elements"),
    Mutant("noise-of-a-part", "an element's noise depends on its position in a part of an update",
           ROUND, "part.chunk.spec.pieces(noise, first=part.first)", "part.chunk.spec.pieces(noise, first=0)",
           f"{ROUNDING_TESTS}::test_the_noise_of_an_element_depends_on_neither_ranks_nor_parts[2]"),
    Mutant("rows-read-one-place", "all rows of a matrix get the same noise",
           ROUND, "starts = (rows.flatten() + offsets[-1]", "starts = (0 * rows.flatten() + offsets[-1]",
           f"{ROUNDING_TESTS}::test_noise_differs_between_moments_updates_tensors_and_elements"),
    Mutant("noise-of-a-rank", "an element's noise depends on its position on its rank",
           ROUND, "dim) + start for dim,", "dim) for dim,",
           f"{ROUNDING_TESTS}::test_one_seed_gives_one_model_in_every_layout[1d2]"),
    Mutant("zero-gets-noise", "a moment of zero is rounded up",
           ROUND, "            bits &= -(2**16)\n", "            bits += 2**15\n            bits &= -(2**16)\n",
           f"{ROUNDING_TESTS}::test_zero_and_numbers_that_bf16_can_represent_stay_the_same"),
    Mutant("updates-of-the-others", "a parameter's bias correction counts updates in which it got no gradient",
           COUNTS, "updates = self.total - self._missed.get(info, 0)", "updates = self.total",
           ANY_MODULE),
    Mutant("unused-elements-updated", "weights that got no gradient decay by our own AdamW, and so do their moments",
           COUNTS, "            if info.parameter in self._unused:\n                continue\n", "",
           ANY_MODULE),
)

COMPILING = (
    Mutant("inlined-by-the-compiler", "compiled code inlines a function that communicates",
           MARKS, "    function._torchdynamo_disable = True  # type: ignore[attr-defined]\n", "",
           f"{IMPORTS}::test_compiled_code_does_not_look_into_a_marked_function"),
    Mutant("callee-compiled-by-itself", "what a function that communicates calls is compiled by itself",
           MARKS, "_FrameExecStrategy(skip, skip)", "_FrameExecStrategy(skip, eval_frame._FrameAction.DEFAULT)",
           f"{IMPORTS}::test_compiled_code_does_not_look_into_a_marked_hook"),
    Mutant("compiler-imported", "every process imports torch's compiler",
           "parallel/mesh/conjugate.py", "@not_compiled\ndef exchange", "@torch.compiler.disable\ndef exchange",
           f"{IMPORTS}::test_no_compiler_is_imported_by[0---check]"),
)


COUNTED = (
    Mutant("counts-of-the-batch", "the gradient is divided by the labels of the batch, whichever of them the loss counts",
           MODULE, "totals.divisor / max(1, expected), totals.loss", "1.0, totals.loss", counts(LABELS)),
    Mutant("ignored-labels-counted", "the labels that a loss function ignores are counted",
           LOSS_TERMS, "counted = target != ignored_label(node)", "counted = target == target", counts(LABELS)),
    Mutant("weights-of-classes-not-counted", "a microbatch counts its labels, and not their weights",
           LOSS_TERMS, "if weight is None or not is_mean:", "if True:", counts("class weights, smoothed labels")),
    Mutant("empty-mask-counts-one", "a microbatch without a label counts as one label, since its count is clamped",
           LOSS_TERMS, "count = path.divisor * (found | (path.divisor > 1))", "count = path.divisor", counts(MASKED)),
    Mutant("nan-of-an-empty-mask", "the gradient of a mean over nothing is NaN, also times zero",
           LOSS_TERMS, "    node.register_hook(_zero_where_nothing(scalar))\n", "", counts(MASKED)),
    Mutant("quotients-added", "a sum of losses that were divided by their count is taken for a sum of losses",
           LOSS_TERMS, "if is_scaled(node, path.num_samples, by_weights=not is_mean and path.divisor is None):", "if False:",
           "tests/test_any_loss.py::test_a_loss_that_is_no_mean_over_labels_is_refused_by_name_on_every_rank[0]"),
    Mutant("differing-counts-kept", "terms of a loss that count different labels are weighted as the first of them",
           "parallel/modules/loss_sums.py", "differing > 0,", "False,",
           "tests/test_any_loss.py::test_a_loss_that_is_no_mean_over_labels_is_refused_by_name_on_every_rank[0]"),
    Mutant("any-divisor-counts", "a sum is taken for a mean over as many labels as the number it is divided by",
           "parallel/modules/loss_sums.py", "not_labels > 0 and not_samples > 0", "False",
           "tests/test_any_loss.py::test_a_loss_that_is_no_mean_over_labels_is_refused_by_name_on_every_rank[0]"),
    Mutant("samples-taken-for-a-constant", "a factor that is the number of samples in each microbatch is kept",
           "parallel/modules/loss_sums.py", "of_size == microbatches", "False",
           "tests/test_any_loss.py::test_a_factor_that_may_be_the_number_of_samples_is_refused_unless_it_is_shown_to_be_a_constant"),
    Mutant("contrast-within-a-microbatch", "a contrastive loss is computed within each microbatch, without a word",
           LOSS_TERMS, "if compares_samples(node, path.num_samples):", "if False:",
           "tests/test_any_loss.py::test_a_loss_that_is_no_mean_over_labels_is_refused_by_name_on_every_rank[0]"),
    Mutant("samples-of-other-ranks-lost", "a sampler that divides samples by rank is given the samples of rank 0 alone",
           "parallel/engine/division_by_rank.py", "problem if is_divided else", "problem if False else",
           "tests/test_loader_table.py::test_every_row_of_the_table_of_loaders_is_so"),
    Mutant("datasets-of-ranks-mixed", "indexes that rank 0 draws stand for other samples on other ranks",
           "parallel/engine/loaders.py", 'f"the division of {described(loader)}"', '"the division of a dataloader"',
           "tests/test_loader_table.py::test_every_row_of_the_table_of_loaders_is_so"),
    Mutant("positions-ignored", "a batch's own positions are left out",
           OPT, "if batch.position_ids is not None:", "if False:",
           "tests/test_batch_keys.py::test_positions_of_a_batch_are_those_of_hugging_faces_opt[2d-0]"),
)


RESUMING = (
    Mutant("group-fields-forgotten", "of an optimizer's groups only lr is restored",
           GROUP_FIELDS, "for key, value in one.fields.items()", 'for key, value in one.fields.items() if key == "lr"',
           f"{RESUMES}::test_a_resumed_schedule_equals_plain_torchs[OneCycleLR]"),
    Mutant("tensor-lr-replaced", "a scheduler goes on with a tensor that no group has",
           GROUP_FIELDS, "return now.copy_(saved) if isinstance(saved, Tensor) else now.fill_(saved)", "return saved",
           f"{RESUMES}::test_a_resumed_schedule_equals_plain_torchs[StepLR of a tensor lr]"),
    Mutant("first-step-dampened", "a checkpoint before the first step changes that step of SGD",
           LEAVES, "self.inner.state.pop(leaf)", "pass", EVERY_FIELD),
    Mutant("frozen-not-gathered", "loaded values of frozen parameters do not reach the other ranks",
           BASE, "chunk.write_back().wait()", "chunk.is_frozen or chunk.write_back().wait()", THAWED),
    Mutant("thawed-as-old", "a parameter that was frozen counts the steps of the others",
           STATE, "steps = {info.name: 0 for info in infos if not new.isdisjoint(info.names)}", "steps = {}", THAWED),
    Mutant("larger-checkpoint-loads", "what a checkpoint has besides the model is left out silently",
           STATE, "if strict and problems:", "if False:", NAMED),
    Mutant("extra-of-rank-0", "every rank gets rank 0's extra",
           "parallel/checkpoint/saved_values.py", "axis.rank if len(entries) == axis.size else 0", "0",
           f"{STRICT}::test_each_rank_has_its_own_extra_again"),
    Mutant("position-in-steps", "after a change of the batch size a run takes samples again",
           "training/same_data.py", 'return int(counters["samples"])',
           'return int(counters["step"]) * int(dict(_flat(metadata["config"]))[BATCH])',
           f"{RESUMED_RUNS}::test_a_resumed_run_does_what_the_table_says[`train.global_batch_size`]"),
    Mutant("dropout-from-steps", "after a step of another size samples get dropout masks that others had",
           ENGINE, "self.num_samples += self.data.size * len(staged.whole.input_ids)", "self.num_samples += 1",
           f"{STRICT}::test_a_split_model_goes_on_bit_for_bit"),
)

LOADERS = (
    Mutant("shares-weigh-nothing", "the gradients of a smaller part of a batch count as much as those of a larger one",
           SHARES, "return self.own * self.num_replicas / self.total if self.total else 1.0", "return 1.0",
           "tests/test_loader_shares.py::test_a_users_loop_over_uneven_batches_trains_as_one_process[2-0]"),
    Mutant("read-ahead-unnoticed", "copies of a batch have the weight of the one that was read last",
           SHARES, "if self._reads_ahead or self._last is None:", "if self._last is None:",
           "tests/test_loader_shares.py::test_a_loss_whose_share_cannot_be_known_is_refused_on_every_rank"),
    Mutant("repeated-sample-counts", "the labels of a sample that an empty replica repeats are counted",
           "parallel/modules/microbatches.py", "if not counts:", "if counts is None:",
           "tests/test_loader_shares.py::"
           "test_train_step_and_evaluate_take_the_mean_over_the_labels_of_uneven_batches[3-0]"),
    Mutant("resumed-loader-draws-twice", "a resumed loader draws once more what was drawn before it was saved",
           "parallel/engine/division.py", "else self.generators.states()", "else None",
           "tests/test_loader_state.py::test_a_loader_goes_on_with_the_next_sample_on_any_number_of_replicas[2-1]"),
    Mutant("streams-not-compared", "ranks that read different samples are not noticed",
           "parallel/engine/part_iterators.py", "{part.digest:08x}", "",
           "tests/test_loader_table.py::test_every_row_of_the_table_of_loaders_is_so"),
)


SURGERY = (
    Mutant("each-rank-keeps-its-own-values", "a sharded parameter is mixed from the values of several ranks",
           SHARDED, "return cls(scatter(parts, axis), axis)", "return cls(parts[axis.rank].clone(), axis)",
           f"{SURGERY_TESTS}::test_values_that_differ_by_rank_are_the_first_ranks"),
    Mutant("memory-taken-for-empty", "values that were written into new memory before it became a parameter are lost",
           RECORDER, "            self.forget_allocation()\n        return result", "            pass\n        return result",
           f"{SURGERY_TESTS}::test_operations_on_weights_inside_the_block_are_those_of_plain_torch"),
    Mutant("placeholder-computed-with", "a computation with a parameter whose values are elsewhere gives NaN",
           SHARDED, "if name not in ABOUT | LIKE | NEW | CASTS or replaces_values:", "if False:",
           f"{SURGERY_TESTS}::test_what_differs_by_rank_or_needs_values_that_are_elsewhere_is_refused_on_every_rank"),
    Mutant("tied-weight-merged", "an adapter of the head is merged into the embedding that is tied to it",
           "parallel/engine/adapters.py", "if copied.has_changed(weight):", "if False:",
           f"{SURGERY_TESTS}::test_a_merge_that_makes_another_model_or_none_is_refused"),
    Mutant("wide-parameter-narrowed", "a router that a model has in fp32 is computed in bf16",
           "parallel/modules/precision.py", "dtype if dtype.itemsize > max(narrowest, precision.itemsize) else precision",
           "precision",
           f"{SURGERY_TESTS}::test_a_wide_parameter_in_a_narrow_model_keeps_its_dtype_and_whole_numbers_stay"),
    Mutant("adapter-beside-its-model", "an adapter stays beside the model that it was merged into, and is added twice",
           "parallel/checkpoint/hf_folder.py", "MODEL.replacing(ADAPTER_FILES)", "MODEL",
           f"{SURGERY_TESTS}::test_an_adapter_trains_is_exported_and_is_merged_as_by_peft_in_one_process[lora]"),
)

GRAPHS = (
    Mutant("late-loss-ungathered", "a backward that reaches a layer past its outputs computes with memory that is free",
           SAVED, "        self.use()\n", "",
           graph("a loss that reaches a layer past its outputs: on the layer itself, in a list, in a global")),
    Mutant("saved-views-of-parameters", "the graph keeps the memory of every layer until its backward",
           SAVED, "if found is not None and", "if False and",
           f"{GRAPH_TESTS}::test_a_graph_keeps_no_memory_of_layers_that_are_released"),
    Mutant("saved-versions-unchecked", "a backward computes with a tensor that was changed in place",
           SAVED, "if self.x._version != self.version:", "if False:",
           graph("a tensor changed in place that a backward needs")),
    Mutant("outer-hooks-replaced", "a recomputed layer keeps all its tensors, and takes a parameter's old place",
           SAVED, "        if self.outer is not None:\n", "        if False:\n",
           f"{GRAPH_TESTS}::test_a_checkpoint_around_a_layer_still_decides_what_is_kept"),
    Mutant("inputs-copied", "what a model appends to a list that it was given is lost",
           "parallel/modules/inputs.py", "return inputs if is_same else", "return",
           graph("lists and dicts that a layer or the model is given, and changes")),
    Mutant("offloaded-lists-copied", "what a layer appends to a list is lost where its inputs are offloaded",
           "parallel/activations/offload.py", "            if first:\n", "            if False:\n",
           f"{GRAPH_TESTS}::test_a_layer_whose_inputs_are_offloaded_appends_to_the_users_list"),
    Mutant("values-read-between-steps", "a parameter reads NaN while it has no values",
           GATHERER, "            mark_unavailable(parameters, unit.name, use)\n", "",
           graph("the values of any other parameter between two steps")),
)

USER_WRITES = (
    Mutant("write-overwritten", "the next update overwrites what a user has written into a rounded parameter",
           "parallel/chunk/writes.py", "            chunk.take_written()\n", "            pass\n",
           f"{WRITTEN}::test_what_is_written_counts_as_in_plain_torch[1-Tier.DEVICE-bf16]"),
    Mutant("write-through-data-missed", "only the writes that torch counts in versions are noticed",
           "parallel/chunk/writes.py", "return [(_fingerprints(chunks) != before).any()] if chunks else []", "return []",
           f"{WRITTEN}::test_what_is_written_counts_as_in_plain_torch[1-Tier.DEVICE-bf16]"),
    Mutant("written-chunk-loses-precision", "a write rounds the master weights of all elements of its chunk",
           "parallel/chunk/chunk.py", "torch.where(is_kept, self.master, own.to(self.master.dtype))",
           "own.to(self.master.dtype)",
           f"{WRITTEN}::test_what_is_written_counts_as_in_plain_torch[1-Tier.DEVICE-bf16]"),
    Mutant("replicas-write-differently", "ranks go on with the different values that were written on them",
           "parallel/chunk/writes.py", "        if any(names):\n", "        if False:\n",
           f"{WRITTEN}::test_ranks_that_write_different_values_are_refused_by_the_parameters_name[1-fp32]"),
    Mutant("write-in-forward-lost", "a layer whose forward writes into its weights is gathered again without that",
           "parallel/chunk/parameters.py", "            self.own.copy_(part)\n", "            pass\n",
           f"{WRITTEN}::test_what_a_forward_writes_into_its_own_weights_counts_in_every_stage"),
    Mutant("fingerprint-without-places", "a fingerprint does not see that elements have changed places",
           "parallel/ops/kernels/fingerprint.py", "return ((x ^ (x >> 27)) | 1).view(2, FEW)", "return torch.ones_like(x).view(2, FEW)",
           f"{WRITTEN}::test_a_fingerprint_sees_each_element_and_each_change_of_places"),
    Mutant("set-on-each-rank", "each rank keeps the values that it has set itself",
           "parallel/modules/full_parameters.py", "            broadcast(flat, spec.axes[0])\n", "            pass\n",
           f"{ACCESS}::test_parameters_are_read_and_set_by_name_and_rank_0s_values_count[0]"),
    Mutant("gradients-with-loss-scale", "whole gradients are not divided by the loss scale",
           "parallel/engine/parameter_access.py", "return self.loss_scale.scale * self.data.size",
           "return self.data.size",
           f"{ACCESS}::test_full_gradients_have_no_loss_scale_and_the_masters_precision[fp16]"),
    Mutant("clipped-by-config-too", "a norm that was clipped by hand is clipped as the config says",
           "parallel/engine/parameter_access.py", "if self._clipped is None else self._clipped\n\n    def _access",
           "\n\n    def _access",
           f"{ACCESS}::test_gradients_norm_and_clipped_step_are_those_of_one_process[max_norms1]"),
    Mutant("copy-with-hooks", "a copy of a module runs the hooks of the engine that trains the module",
           "parallel/modules/independent_copy.py", "        if added := self._added_hooks.get(name):\n",
           "        if added := set[int]():\n",
           f"{ACCESS}::test_every_row_of_the_table_is_answered_in_its_words_on_every_rank[0]"),
    Mutant("state-begins-with-zero", "every state of an optimizer begins with zeros, where no step has made it",
           "parallel/optim/leaves.py", "value.fill_(initial_value(kind, group_of[leaf]))", "value.zero_()",
           "tests/test_optimizers.py::test_each_elementwise_optimizer_trains_and_resumes_as_in_one_process[1]"),
)


PARTING = (
    Mutant("numbers-not-watched", "a run whose loss is NaN goes on, and keeps checkpoints of it",
           "parallel/engine/base.py", "if outcome not in (Outcome.LEFT_OUT, Outcome.STOPS):", "if True:",
           "tests/test_loop.py::test_a_run_whose_numbers_are_not_finite_ends_with_code_4_and_keeps_what_was_finite"),
    Mutant("other-config-accepted", "ranks train on with different learning rates",
           "parallel/watch/meeting.py", 'board.answer("\\n".join(differences(brought)))', 'board.answer("")',
           PARTED.format("has another config, code, torch or world")),
    Mutant("killed-process-overlooked", "a process that was killed is taken for one that is only slow",
           "parallel/watch/host_mates.py", "if has_ended(process)", "if False",
           PARTED.format("is killed, by the system or by `os._exit`")),
    Mutant("a-long-save-is-silence", "a rank that saves for longer than the time limit ends the run",
           "parallel/watch/judge.py", "not one.beat.waits and not one.beat.phase and", "not one.beat.waits and",
           "tests/test_parting.py::test_a_rank_is_not_missed_while_nobody_waits_for_it_in_vain[a long save]"),
    Mutant("one-message-of-many", "ranks agree although one does something else",
           "parallel/mesh/agreement.py", "found[0] == -found[1]", "found[0] == found[0]",
           PARTED.format("has a batch less, and then saves")),
)

FOLDERS = (
    Mutant("unusable-weights-are-none", "weights in a format that cannot be read are taken for none, and are drawn",
           HF, "        return True  # what cannot be read may be weights", "        return False",
           folder_row("weights in .bin, .pt, .msgpack, .h5 or .gguf alone")),
    Mutant("own-head-left-out", "a head that is not the embedding is left out",
           HF, "    if head in found and head not in expected:", "    if False:",
           folder_row("a head of its own, in a folder that says that it is tied")),
    Mutant("head-is-the-embedding", "a head of its own starts with the values of the embedding",
           SHAPE, 'elif module == "head.table" and self.tie_word_embeddings:', 'elif module == "head.table":',
           "tests/test_untied_head.py::test_a_head_of_its_own_trains_as_hugging_faces[plain-single]"),
    Mutant("joined-by-token-2", "texts are joined by OPT's end token, whatever the tokenizer is",
           "models/data/separator.py", "            return self.tokenizer.end\n", "            return 2\n",
           text_row("several texts")),
    Mutant("special-tokens-in-texts", "a text with </s> in it ends there, although the tokenizer takes it for text",
           "models/tokenizer.py", 'bool(self._files.config.get("split_special_tokens"))', "False",
           text_row("texts that contain `</s>` or another special token")),
    Mutant("export-ends-with-token-2", "an export ends a text with another token than its training did",
           "models/generation_config.py", "bos_token_id=begin, eos_token_id=end", "bos_token_id=begin",
           text_row("an end token that is not the model's")),
    Mutant("other-texts-unnoticed", "ranks of one replica train on other tokens, from the files of their hosts",
           "training/run.py", "    if len(set(read)) > 1:", "    if False:",
           text_row("texts that are not the same on every rank")),
    Mutant("other-weights-unnoticed", "ranks start from other weights, from the files of their hosts",
           INITIAL_VALUES, "    if len({(shape, files) for shape, files, _ in everywhere}) > 1:", "    if False:",
           folder_row("files that are not the same on every rank")),
)

# fmt: on

ACCESS_AND_STATE = (
    Mutant(
        "state-dict-without-writes",
        "engine.state_dict() lacks what was written into narrow parameters",
        "parallel/engine/state.py",
        '        self.agree_on("a state_dict")\n        self.writes.take_if_any()\n',
        '        self.agree_on("a state_dict")\n',
        "tests/test_access_and_state.py::test_a_state_dict_has_what_was_written_into_parameters",
    ),
    Mutant(
        "ranks-agree-on-lr-alone",
        "hyperparameters that differ by rank give each rank weights of its own",
        "parallel/engine/user_loop.py",
        "a step with {self.hyperparameters}",
        "a step with learning rate {self.lr}",
        "tests/test_access_and_state.py::test_every_hyperparameter_of_every_group_is_the_same_on_all_ranks",
    ),
)

TENSOR = (
    Mutant(
        "head-norm-not-summed-in-1d",
        "the weight of a norm over heads gets the gradient of one rank's heads",
        MODE,
        "if by_heads and axis.name not in own",
        'if by_heads and axis.name == "col"',
        torch_norm("1d2"),
    ),
    Mutant(
        "head-norm-not-summed-in-a-grid",
        "the weight of a norm over heads gets the gradient of one column's heads",
        MODE,
        "if by_heads and axis.name not in own",
        'if by_heads and axis.name == "t"',
        torch_norm("2d1x2"),
    ),
    Mutant(
        "head-norm-summed-twice",
        "an axis of a cube that splits tokens and heads is summed over twice",
        MODE,
        "*self.token_axes) if name not in done)), *heads]",
        "*self.token_axes) if name not in own)), *heads]",
        torch_norm("3d2x2x2"),
    ),
    Mutant(
        "rms-norm-eps-outside",
        "eps is added to 1 / √(mean of x²)",
        RESIDUAL,
        "(self.sum(local) / self.size).add_(self.eps).rsqrt_()",
        "(self.sum(local) / self.size).rsqrt_().add_(self.eps)",
        torch_norm("1d2"),
    ),
    Mutant(
        "rms-norm-of-a-part",
        "each column divides by the mean square of its own part",
        RESIDUAL,
        "(self.sum(local) / self.size)",
        "(local * 2 / self.size)",
        torch_norm("2d1x2"),
    ),
    Mutant(
        "rms-norm-gradient-of-a-part",
        "dx has the projection of each column's own part",
        NORMS,
        "ctx.dim.sum((dnormal * normal).sum(-1, keepdim=True))",
        "(dnormal * normal).sum(-1, keepdim=True)",
        torch_norm("2d1x2"),
    ),
    Mutant(
        "norm-statistics-in-bf16",
        "squares of bf16 numbers are added up in bf16",
        NORMS,
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x",
        "tests/test_norms.py::test_the_error_of_a_split_norm_in_bf16_is_at_most_twice_torchs[2d2x2]",
    ),
    Mutant(
        "groups-split-by-rows",
        "each rank has some rows of every group, and so parts of heads",
        MODE,
        "(groups, self.inner_hidden), (rows, ())",
        "(groups, ()), (rows, self.inner_hidden)",
        "tests/test_grouped_linear.py::test_a_grouped_linear_and_its_gradients_equal_one_that_is_not_split[1d2]",
    ),
)

GROUPED_ATTENTION = (
    Mutant(
        "window-one-too-long",
        "attention over whole sequences sees one key more than its window has",
        SPLIT,
        "seen.triu(1 - masking.window)",
        "seen.triu(-masking.window)",
        WHOLE,
    ),
    Mutant(
        "window-of-a-block-one-too-long",
        "attention that is computed block by block sees one key more than its window has",
        BLOCKS,
        "self.columns >= self.masking.window",
        "self.columns > self.masking.window",
        f"{PARTS}[ring-2]",
    ),
    Mutant(
        "window-not-in-the-ring",
        "a ring attends to all earlier keys of other parts, where the window hides some of them",
        RING,
        "if rows.stop - 1 - columns.start <= reach:",
        "if rows != columns:",
        f"{PARTS}[ring-3]",
    ),
    Mutant(
        "keys-before-the-window",
        "the keys that a ring computes with begin one after the first that its queries see",
        RING,
        "range(max(columns.start, rows.start - reach)",
        "range(max(columns.start, rows.start - reach + 1)",
        f"{PARTS}[ring-2]",
    ),
    Mutant(
        "heads-interleaved",
        "query heads use the key heads in turn, and not one key head for each group of neighbours",
        KERNELS,
        "x.unflatten(1, (kv_heads, -1)).flatten(2, 3)",
        "x.unflatten(1, (-1, kv_heads)).transpose(1, 2).flatten(2, 3)",
        WHOLE,
    ),
    Mutant(
        "repeated-heads-interleaved",
        "where no kernel takes groups, query heads use the key heads in turn",
        SPLIT,
        "k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1",
        "k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), 1",
        "tests/test_grouped_attention.py::test_keys_are_repeated_where_no_kernel_takes_groups",
    ),
    Mutant(
        "exchange-cuts-groups",
        "all_to_all sends each rank every second key head, and not those of its queries",
        SPLIT,
        "unflatten(2, (ranks, -1)).movedim(2, 0) for x in (q, k, v)]",
        "unflatten(2, (ranks, -1) if x is q else (-1, ranks)).movedim(2 if x is q else 3, 0) for x in (q, k, v)]",
        f"{PARTS}[all_to_all-2]",
    ),
    Mutant(
        "dk-of-one-query-head",
        "the gradient of a key is that of the first query head of its group",
        KERNELS,
        "_grouped(dscores, kv_heads).mT @ _grouped(q, kv_heads), dv",
        "dscores[:, :: q.shape[1] // kv_heads].mT @ q[:, :: q.shape[1] // kv_heads], dv",
        WHOLE,
    ),
)

SOURCES, SOURCES_TESTS = "parallel/layout/sources.py", "tests/test_sources.py"
PUBLIC = f"{SOURCES_TESTS}::test_the_pieces_of_all_ranks_are_the_public_tensors_each_element_once"
IN_FILES = f"{SOURCES_TESTS}::test_files_have_the_public_tensors_of_every_kind_of_parameter[last]"
STATES = f"{SOURCES_TESTS}::test_a_state_of_every_kind_of_parameter_is_loaded_in_another_layout"

PIECES = (
    Mutant(
        "transposed-box-not-reversed",
        "a piece of a transposed matrix has the box of the parameter",
        SOURCES,
        "return tuple(reversed(public) if self.transposed else public)",
        "return tuple(public)",
        PUBLIC,
    ),
    Mutant(
        "transposed-data-as-in-the-parameter",
        "a piece of a transposed matrix is no transposed view",
        LAYOUT,
        "view = view.T if source.transposed else view",
        "view = view",
        PUBLIC,
    ),
    Mutant(
        "wrong-group-row",
        "the rows of every group but the first are taken for others of the public tensor",
        SOURCES,
        "first = self.first + row * (end - begin)",
        "first = self.first + row",
        PUBLIC,
    ),
    Mutant(
        "first-row-left-out",
        "q, k and v in one public tensor all begin at its first row",
        SOURCES,
        "first = self.first + row * (end - begin)",
        "first = row * (end - begin)",
        IN_FILES,
    ),
    Mutant(
        "owned-by-name-alone",
        "a rank that saves a part of a public tensor saves all parts that it has of it",
        BASE,
        "or (piece.name, piece.box) in mine",
        "or piece.name in {name for name, _ in mine}",
        STATES,
    ),
)

GPT2_TESTS = "tests/test_gpt2.py"
GPT2 = (
    Mutant(
        "no-dropout-of-gpt2-embeddings",
        "GPT-2's embeddings have no dropout: a model trains with less noise than its config says",
        "models/gpt2/layers.py",
        "dropout_p=shape.embd_pdrop",
        "dropout_p=0.0",
        f"{GPT2_TESTS}::test_each_dropout_stands_where_transformers_has_it[2d1x2]",
    ),
    Mutant(
        "gpt2-has-a-padding-row",
        "the embedding of GPT-2's padding token gets no gradient from the lookup, though in transformers it does",
        "models/gpt2/shape.py",
        "padding_row = None",
        "padding_rows = None",
        f"{GPT2_TESTS}::test_each_dropout_stands_where_transformers_has_it[2d1x2]",
    ),
    Mutant(
        "gpt2-residual-matrices-drawn-too-large",
        "the matrices that lead back to GPT-2's residual stream are drawn as if there were one of them in a block",
        "models/gpt2/shape.py",
        "sqrt(2 * self.n_layer)",
        "sqrt(self.n_layer)",
        f"{GPT2_TESTS}::test_weights_are_drawn_as_transformers_draws_them",
    ),
)

LLAMA_LAYERS, ROTARY = "models/llama/layers.py", "models/rotary.py"
FAMILY_RUNS = "tests/test_family_runs.py"
FAMILY = "tests/test_parity.py::test_every_family_trains_in_every_layout_as_hugging_faces[{}]"
FAMILIES = (
    Mutant(
        "window-of-another-block",
        "every block has the window of the first one, or none",
        LLAMA_LAYERS,
        "rotary, windows[index]",
        "rotary, windows[0]",
        FAMILY.format("qwen2-pp4-uneven-fp64"),
    ),
    Mutant(
        "rotary-counts-from-zero-on-every-rank",
        "the positions of a part of a sequence begin with 0 on every rank",
        ROTARY,
        "mode.sequence.positions(sequence, like.device)",
        "torch.arange(sequence, device=like.device)",
        FAMILY.format("llama-ring3-fp64"),
    ),
    Mutant(
        "rotary-of-the-samples-between-blocks",
        "a cube turns q and k by the positions of the samples that a rank has between blocks, not inside",
        ROTARY,
        "mode.tokens(ids, mode.inner_batch)",
        "mode.tokens(ids, mode.batch)",
        f"{FAMILY_RUNS}::test_positions_of_a_batch_are_those_of_hugging_faces[llama-3d8]",
    ),
    Mutant(
        "gate-and-up-exchanged",
        "the activation is that of the up matrix, and not of the gate",
        "parallel/ops/kernels/activation.py",
        "activated: Tensor = ctx.activation(gate)\n        return activated.mul_(up)",
        "activated: Tensor = ctx.activation(up)\n        return activated.mul_(gate)",
        FAMILY.format("llama-single-fp64"),
    ),
    Mutant(
        "q-heads-of-groups-interleaved",
        "the q heads of a rank are in another order than their k, v heads",
        "parallel/ops/kernels/heads.py",
        "return x.flatten(2, -2).transpose(1, 2)",
        "return x.transpose(2, -2).flatten(2, -2).transpose(1, 2)",
        FAMILY.format("qwen3-single-fp64"),
    ),
    Mutant(
        "embeddings-dropped-in-evaluation",
        "an evaluation has the dropout of embeddings",
        LAYER,
        "if self.training and self.dropout > 0:\n            found =",
        "if self.dropout > 0:\n            found =",
        f"{FAMILY_RUNS}::test_evaluation_of_a_family_has_no_dropout_and_equals_hugging_faces[gpt2-ring3]",
    ),
)

TABLES = (
    Mutant(
        "flops-without-windows",
        "the MFU of a model with windows counts keys that no query sees",
        "models/llama/shared.py",
        "min(sequence_length, window or sequence_length)",
        "sequence_length",
        "tests/test_costs.py::test_blocks_with_a_window_count_the_keys_of_a_sequence_as_long_as_the_window[mistral]",
    ),
    Mutant(
        "flops-of-looked-up-rows",
        "the MFU of a model whose head is not tied counts its embedding as a matmul",
        "models/costs.py",
        "(set() if shape.tie_word_embeddings else {shape.embedding})",
        "set()",
        "tests/test_costs.py::test_flops_are_those_that_torch_counts_in_hugging_faces_model[llama]",
    ),
    Mutant(
        "k-and-v-not-counted",
        "what a block keeps for backward, and so the cut of the pipeline, leaves out k and v",
        "models/llama/shared.py",
        "inner = (2 * heads + 2 * groups) * size",
        "inner = 2 * heads * size",
        "tests/test_memory.py::test_a_block_of_each_family_keeps_what_its_shape_says[llama-serial]",
    ),
    Mutant(
        "q-and-k-kept-twice",
        "q and k are kept for backward before they are turned, too",
        ATTENTION,
        "            v = v.clone()",
        "            pass",
        "tests/test_memory.py::test_a_block_of_each_family_keeps_what_its_shape_says[llama-serial]",
    ),
)

LLAMA_TESTS = "tests/test_llama.py"

LLAMA = (
    Mutant(
        "rotary-turns-the-other-way",
        "the angles of rotary positions have the wrong sign",
        "parallel/ops/kernels/heads.py",
        "torch.cat((-second, first), -1)",
        "torch.cat((second, -first), -1)",
        f"{LLAMA_TESTS}::test_q_and_k_are_turned_as_hugging_face_does",
    ),
    Mutant(
        "rotary-positions-of-the-first-rank",
        "every rank of a split sequence turns q and k as if it had the first positions",
        ROTARY,
        "mode.sequence.positions(sequence, like.device).unsqueeze(0)",
        "torch.arange(sequence, device=like.device).unsqueeze(0)",
        f"{LLAMA_TESTS}::test_a_rank_turns_by_the_positions_that_it_has_of_the_whole_sequence[False]",
    ),
    Mutant(
        "rotary-tables-of-another-batch",
        "tables of the position ids of one microbatch are used for the next one of the same size",
        ROTARY,
        "self._key != key or self._ids is not ids or",
        "self._key != key or",
        f"{LLAMA_TESTS}::test_all_blocks_of_a_stage_share_the_tables_of_a_microbatch",
    ),
    Mutant(
        "linear-scaling-left-out",
        "angles of linear scaling are not divided by its factor",
        ROTARY,
        "return inv_freq / settings.factor",
        "return inv_freq",
        f"{LLAMA_TESTS}::test_the_tables_are_hugging_faces_to_the_last_bit",
    ),
    Mutant(
        "windows-in-the-wrong-blocks",
        "the first blocks of a Qwen have windows, and the later ones have none",
        "models/llama/shape.py",
        "if has_windows and layer >= first else",
        "if has_windows and layer < first else",
        f"{LLAMA_TESTS}::test_windows_are_those_of_hugging_faces_layers",
    ),
)

READING = (
    Mutant(
        "original-length-beside-the-dict-ignored",
        "an original length of the rotary positions that stands beside their dict is ignored",
        "models/llama/rope.py",
        "value.setdefault(ORIGINAL, original) != original",
        "value.get(ORIGINAL, original) != original",
        f"{LLAMA_TESTS}::test_an_original_length_beside_the_dict_is_the_one_that_hugging_face_uses",
    ),
)

EVALUATION = (
    Mutant(
        "different-weights-evaluated",
        "an evaluation does not look whether ranks have written different values into their parameters",
        ENGINE,
        "            self.writes.take_if_any()\n",
        "            pass\n",
        f"{WRITTEN}::test_what_is_written_into_a_stage_of_a_split_model_counts_too[0]",
    ),
    Mutant(
        "stage-changed-unseen",
        "a split model is trained on whose parameters are not the engine's any more",
        ENGINE,
        "            problem = self._original.change(are_shown=are_shown)\n",
        "            pass\n",
        f"{WRITTEN}::test_a_split_model_whose_parameters_are_not_the_engines_any_more_is_refused",
    ),
    Mutant(
        "shared-view-unseen",
        "a parameter that shows another one's part of the buffer counts as one that shows its own",
        "parallel/chunk/parameters.py",
        "            return not parameter.numel() or parameter.data_ptr() == address",
        "            return True",
        f"{WRITTEN}::test_a_split_model_whose_parameters_are_not_the_engines_any_more_is_refused",
    ),
)

COVERAGE_TESTS = "tests/test_coverage.py"
COVERAGE = (
    Mutant(
        "parameter-without-a-layout",
        "a parameter that is not the mode's is trained by no rank and saved by none, and nothing says so",
        "models/coverage.py",
        "if id(parameter) not in known:",
        "if False:",
        f"{COVERAGE_TESTS}::test_a_parameter_that_is_not_the_modes_is_refused[single]",
    ),
    Mutant(
        "rows-held-twice",
        "a part of a public tensor may be held by two parameters",
        "models/coverage.py",
        "if start != end:",
        "if start > end:",
        f"{COVERAGE_TESTS}::test_what_a_shape_says_otherwise_than_its_layers_is_refused_by_name",
    ),
    Mutant(
        "parts-by-head-exchanged",
        "q, k and v of a tensor by heads are read as if each were in one piece",
        "parallel/layout/sources.py",
        "first=(head * parts + part) * size",
        "first=(part * heads + head) * size",
        "tests/test_sources.py::test_sources_by_head_are_what_gpt_neox_makes_of_its_joint_tensor",
    ),
    Mutant(
        "last-elements-of-a-head-turned",
        "tables that are narrower than a head turn its last elements, not its first ones",
        "parallel/ops/kernels/heads.py",
        "(rotated(x[..., :size], cos, sin), x[..., size:])",
        "(x[..., :-size], rotated(x[..., -size:], cos, sin))",
        "tests/test_llama.py::test_tables_narrower_than_a_head_turn_its_first_elements_as_in_gpt_neox[4]",
    ),
)

BEST_TESTS = "tests/test_best_checkpoint.py"
LENGTHS_AND_BESTS = (
    Mutant(
        "best-checkpoint-deleted",
        "the checkpoint of the lowest validation loss is deleted like any older one",
        "parallel/checkpoint/checkpoint.py",
        "if best is None or folder.name != best.name:",
        "if folder:",
        f"{BEST_TESTS}::test_the_checkpoint_of_the_lowest_loss_survives_whatever_is_saved_after_it[losses1-options1-steps1-best_and_latest1]",
    ),
    Mutant(
        "best-loss-forgotten",
        "a resumed run takes its first evaluation for the best one",
        "training/resume.py",
        'LossHistory(BestLoss.restored(found.index.metadata.get("best")))',
        "LossHistory(BestLoss())",
        f"{BEST_TESTS}::test_a_run_resumes_from_its_best_checkpoint_and_remembers_its_loss",
    ),
    Mutant(
        "patience-begins-anew",
        "the evaluations before a resume are not counted, so that a run which is resumed often never ends early",
        "training/best_loss.py",
        'int(state["evaluations_since"])',
        "0",
        f"{BEST_TESTS}::test_the_evaluations_before_a_resume_are_counted",
    ),
    Mutant(
        "any-evaluation-resets-patience",
        "an evaluation that is no new lowest one sets the count back",
        "training/best_loss.py",
        "self.evaluations_since += 1",
        "self.evaluations_since = 1",
        f"{BEST_TESTS}::test_a_run_ends_after_evaluations_in_a_row_without_a_new_lowest_loss[losses0-4]",
    ),
    Mutant(
        "epochs-from-the-beginning",
        "a resumed run of epochs takes all of its samples again",
        "training/length.py",
        "left = -(-(total - taken.samples) //",
        "left = -(-total //",
        "tests/test_length.py::test_a_run_of_epochs_that_goes_on_with_another_batch_size_takes_the_samples_that_are_left",
    ),
    Mutant(
        "last-epoch-cut-short",
        "the last step of a run of epochs, which is not full, is left out",
        "training/length.py",
        "left = -(-(total - taken.samples) // train.global_batch_size)",
        "left = (total - taken.samples) // train.global_batch_size",
        "tests/test_length.py::test_the_fewest_steps_that_take_each_sample_as_often_as_the_epochs_say[8-1]",
    ),
    Mutant(
        "steps-logged-twice",
        "TensorBoard shows the values of a run and of its resumed run, one over the other",
        "training/tensorboard_logger.py",
        "purge = num_steps + 1 if num_steps else None",
        "purge = None",
        "tests/test_loggers.py::test_tensorboard_has_every_number_of_metrics_jsonl_and_a_resumed_run_replaces_its_steps",
    ),
    Mutant(
        "omitted-microbatches-cost-nothing",
        "the bubble of a long step is that of its first and last microbatches",
        "parallel/plan/timeline.py",
        "return self._num_simulated + self.num_omitted",
        "return self._num_simulated",
        "tests/test_picture.py::test_a_long_step_that_is_simulated_in_part_has_the_picture_and_figures_of_the_whole",
    ),
    Mutant(
        "labels-of-a-shorter-step",
        "the last microbatches of a long step have the numbers of the shorter one that was simulated",
        "parallel/pipeline/picture.py",
        "later = span.action, self.num_omitted if span.start > self.middle else 0",
        "later = span.action, 0",
        "tests/test_picture.py::test_a_long_step_that_is_simulated_in_part_has_the_picture_and_figures_of_the_whole",
    ),
)

INSTALLED = (
    Mutant(
        "own-packages-last",
        "a folder `models` of the user is imported instead of ours",
        "colonnade/__init__.py",
        "sys.meta_path.insert(0, OwnPackages)",
        "sys.meta_path.append(OwnPackages)",
        "tests/test_cli.py::test_a_package_of_the_user_is_not_imported_for_ours",
    ),
    Mutant(
        "fork-server-in-the-working-directory",
        "the ranks of --nprocs import a `training` of the user",
        "training/spawn.py",
        """    _set_values({"PYTHONPATH": searched, "PYTHONSAFEPATH": "1"})\n""",
        "",
        "tests/test_package.py::test_what_is_installed_trains_on_two_ranks_in_a_folder_with_packages_of_our_names",
    ),
    Mutant(
        "data-files-not-installed",
        "files of a package that are no Python are missing in the wheel",
        "pyproject.toml",
        '"*" = ["**/*"]',
        '"*" = ["*.json"]',
        "tests/test_package.py::test_the_wheel_has_every_file_of_our_packages_and_nothing_else",
    ),
    Mutant(
        "damaged-checkpoint-exported",
        "a checkpoint with a changed byte is exported",
        "training/export.py",
        "        verify(index, ALONE)\n",
        "",
        f"{EXPORTS}::test_a_checkpoint_that_cannot_be_exported_is_refused_by_name[change_a_byte]",
    ),
    Mutant(
        "download-replaced-by-an-export",
        "an export replaces weights that another program wrote",
        "models/hf.py",
        """path.suffix == ".safetensors" and is_ours(path)]""",
        """path.suffix == ".safetensors"]""",
        f"{EXPORTS}::test_a_target_that_is_no_earlier_export_is_refused_and_stays[of_another_program]",
    ),
    Mutant(
        "export-overflows",
        "weights that fp16 cannot hold are exported as infinite",
        "training/export.py",
        "    if problem and dtype is not None:",
        "    if not problem and dtype is not None:",
        f"{EXPORTS}::test_a_value_too_large_is_refused_for_a_dtype_that_was_asked_for_and_else_exported_in_a_wider_one",
    ),
    Mutant(
        "export-without-the-tokenizers-end",
        "an export ends its texts with another token than its tokenizer",
        "training/export.py",
        "    shape = exported_shape(saved.shape, tokenizer)",
        "    shape = saved.shape",
        f"{EXPORTS}::test_tokenizer_template_and_generation_config_come_along_and_what_is_gone_is_named",
    ),
)

DOCUMENT_TESTS = "tests/test_documents.py"
BY_ITSELF = f"{DOCUMENT_TESTS}::test_packed_documents_are_trained_on_as_each_by_itself"
DOCUMENTS = (
    Mutant(
        "documents-seen-before",
        "a query sees the keys of the documents before its own",
        "parallel/sequence/documents.py",
        "columns < starts.unsqueeze(-1)",
        "columns < 0 * starts.unsqueeze(-1)",
        f"{DOCUMENT_TESTS}::test_attention_stays_within_documents[torch's-None-whole]",
    ),
    Mutant(
        "documents-positions-go-on",
        "positions do not begin anew in a document",
        "parallel/pipeline/microbatch.py",
        "return self.documents.positions",
        "return None",
        f"{BY_ITSELF}[2d4-gpt2-False]",
    ),
    Mutant(
        "documents-positions-of-opt-go-on",
        "OPT counts the tokens of the documents before, too",
        "models/opt/layers.py",
        "if batch.documents is not None:",
        "if False and batch.documents is not None:",
        f"{BY_ITSELF}[pp2-opt-True]",
    ),
    Mutant(
        "documents-shifted-by-one",
        "the documents of a sample begin one token earlier",
        "models/data/packed.py",
        "self.row.starts[first:end]",
        "self.row.starts[first:end] - 1",
        f"{DOCUMENT_TESTS}::test_samples_are_the_row_with_the_documents_of_its_tokens",
    ),
    Mutant(
        "documents-lost-at-the-last-token",
        "a document that begins with the last token of a sample does not begin there",
        "models/data/packed.py",
        "(places.start + 1, places.stop)",
        "(places.start + 1, places.stop - 1)",
        f"{DOCUMENT_TESTS}::test_samples_are_the_row_with_the_documents_of_its_tokens",
    ),
    Mutant(
        "documents-of-another-microbatch",
        "the first microbatch takes the documents of the last one",
        "parallel/sequence/documents.py",
        "self.positions.split(size), self.bounds",
        "self.positions.split(size)[::-1], self.bounds",
        f"{BY_ITSELF}[pp2-opt-True]",
    ),
    Mutant(
        "documents-of-the-first-samples",
        "every part of a microbatch takes the documents of its first samples",
        "models/attention.py",
        "batch.documents.apply(lambda x: self.mode.local(x, self.mode.inner_batch))",
        "batch.documents.apply(lambda x: x[: len(self.mode.local(x, self.mode.inner_batch))])",
        f"{BY_ITSELF}[2d4-gpt2-False]",
    ),
    Mutant(
        "documents-lost-in-an-exchange",
        "after the exchange of all_to_all attention goes over the whole sequence",
        SPLIT,
        "super().attend(q, k, v, masking)",
        "super().attend(q, k, v, replace(masking, documents=None))",
        f"{BY_ITSELF}[a2a2-llama-False]",
    ),
    Mutant(
        "documents-counted-from-the-batch",
        "bounds of a microbatch count from the first token of the batch",
        "parallel/sequence/documents.py",
        "return bounds - bounds[0]",
        "return bounds",
        f"{DOCUMENT_TESTS}::test_documents_are_read_as_their_docstring_says",
    ),
    Mutant(
        "documents-guessed-from-nothing",
        "the first token of a document is a label",
        "parallel/pipeline/microbatch.py",
        "labels[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORED",
        "labels[:, 1:][documents[:, 1:] < documents[:, :-1]] = IGNORED",
        f"{DOCUMENT_TESTS}::test_by_default_the_first_token_of_a_document_is_no_label",
    ),
)

CACHE_TESTS, WINDOW_TESTS = "tests/test_cache.py", "tests/test_windows.py"
DATA = (
    Mutant(
        "cache-without-tokenizer",
        "tokens that another tokenizer made are taken from the cache",
        "models/data/corpus.py",
        '"tokenizer": tokenizer.identity,\n            "text_key"',
        '"tokenizer": "",\n            "text_key"',
        f"{CACHE_TESTS}::test_another_tokenizer_key_or_end_token_has_another_entry",
    ),
    Mutant(
        "cache-without-text-key",
        "the texts of another key of the records are taken from the cache",
        "models/data/corpus.py",
        '"text_key": text_key if source.kind.has_records else None,',
        '"text_key": None,',
        f"{CACHE_TESTS}::test_another_tokenizer_key_or_end_token_has_another_entry",
    ),
    Mutant(
        "cache-without-end",
        "texts that were joined by another token are taken from the cache",
        "models/data/corpus.py",
        '"end": end.id,',
        '"end": None,',
        f"{CACHE_TESTS}::test_another_tokenizer_key_or_end_token_has_another_entry",
    ),
    Mutant(
        "young-file-remembered",
        "a file whose size and time are those of another one is taken for it, however young it is",
        "models/data/contents.py",
        "if identity[1:] == _identity(after) and began - max(after.st_mtime, after.st_ctime) > SECONDS_OF_A_TICK:",
        "if identity[1:] == _identity(after):",
        f"{CACHE_TESTS}::test_a_large_file_that_has_not_changed_is_not_read_again",
    ),
    Mutant(
        "cache-without-lock",
        "processes that come together all do the work, and remove what the others write",
        "models/data/cache.py",
        "while not self._is_locked(lock):",
        "while False:",
        f"{CACHE_TESTS}::test_processes_that_come_together_do_the_work_once_and_the_others_wait",
    ),
    Mutant(
        "entry-that-was-changed",
        "an entry whose description was changed is read as it says",
        "models/data/cache.py",
        'if content.pop("digest") == _digest(content):',
        'if content.pop("digest"):',
        f"{CACHE_TESTS}::test_a_damaged_entry_is_made_again[_changed]",
    ),
    Mutant(
        "windows-joined-anywhere",
        "windows are joined where their tokens differ",
        "models/windows.py",
        "if other is not None and self._agree(before, index, after, other, of_words=of_words):",
        "if other is not None:",
        f"{WINDOW_TESTS}::test_windows_have_the_tokens_of_the_whole_text[llama2]",
    ),
    Mutant(
        "windows-joined-in-space",
        "windows are joined within space that a special token takes in",
        "models/windows.py",
        "return not before.is_space(spans[0][0], spans[near][0]) and",
        "return True or",
        f"{WINDOW_TESTS}::test_windows_have_the_tokens_of_the_whole_text[opt]",
    ),
    Mutant(
        "window-begins-the-row",
        "the tokens of an overlap are there twice",
        "models/windows.py",
        "current, first = following, joint[1]",
        "current, first = following, 0",
        f"{WINDOW_TESTS}::test_windows_have_the_tokens_of_the_whole_text[gpt2]",
    ),
    Mutant(
        "end-token-twice",
        "the token that ends a text stands twice where a text has it already",
        "models/data/documents.py",
        "if end not in (self._last, int(document.ids[0])):",
        "if True:",
        "tests/test_records.py::test_what_users_bring_as_data_is_treated_as_the_table_says"
        "[special tokens that the tokenizer puts around a text]",
    ),
)

CONVERSATION_TESTS, CONVERSATION_CODE = "tests/test_conversations.py", "models/data/conversations.py"
ANSWERS_ALONE = f"{CONVERSATION_TESTS}::test_an_answer_is_learned_with_what_ends_it_and_nothing_else_is[llama3]"
CONVERSATIONS = (
    Mutant(
        "users-learned",
        "what the user says is learned as if it were an answer",
        CONVERSATION_CODE,
        "is_learned[start:stop] = True",
        "is_learned[:stop] = True",
        ANSWERS_ALONE,
    ),
    Mutant(
        "end-of-turn-not-learned",
        "the token that ends an answer is not learned, so that the model never stops",
        CONVERSATION_CODE,
        "is_learned[start:stop] = True",
        "is_learned[start : stop - 1] = True",
        ANSWERS_ALONE,
    ),
    Mutant(
        "first-token-of-an-answer-not-learned",
        "the mask of an answer begins one token too late, as if it were shifted already",
        CONVERSATION_CODE,
        "is_learned[start:stop] = True",
        "is_learned[start + 1 : stop] = True",
        ANSWERS_ALONE,
    ),
    Mutant(
        "prompt-without-its-end",
        "the prompt before an answer has no beginning of the answer, whose header is learned then",
        CONVERSATION_CODE,
        "add_generation_prompt=True).text",
        "add_generation_prompt=False).text",
        ANSWERS_ALONE,
    ),
    Mutant(
        "second-first-token",
        "the tokenizer puts <s> before a text that has one from its template",
        "models/tokenizer.py",
        "self._tokenizer.encode(text, add_special_tokens=False).ids",
        "self._tokenizer.encode(text).ids",
        f"{CONVERSATION_TESTS}::test_a_template_that_writes_the_first_token_gets_no_second_one[llama3]",
    ),
    Mutant(
        "first-token-of-the-post-processor",
        "a conversation gets the special tokens of a text, beside those of its template",
        "models/tokenizer.py",
        "encoding = self._tokenizer.encode(text, add_special_tokens=False)",
        "encoding = self._tokenizer.encode(text)",
        f"{CONVERSATION_TESTS}::test_a_generation_mask_is_that_of_transformers",
    ),
    Mutant(
        "mark-within-a-token",
        "a token is learned only if all of its characters are in the block",
        CONVERSATION_CODE,
        "(places[:, 0] < stop) & (places[:, 1] > start)",
        "(places[:, 0] >= start) & (places[:, 1] <= stop)",
        f"{CONVERSATION_TESTS}::test_a_generation_mask_is_that_of_transformers",
    ),
    Mutant(
        "prefix-not-verified",
        "a template that changes earlier messages is not noticed, and what is learned is somewhere else",
        CONVERSATION_CODE,
        "if not text.startswith(part):",
        "if False:",
        "tests/test_conversation_records.py::test_conversations_that_users_bring_are_treated_as_the_table_says"
        "[a template that writes earlier messages in another way once others follow]",
    ),
    Mutant(
        "tokens-of-a-prefix-not-verified",
        "an answer begins within a token, and the token is counted to the prompt",
        CONVERSATION_CODE,
        "begin = self._tokenizer.encode(part)\n        if not _begins(ids, begin):",
        "begin = self._tokenizer.encode(part)\n        if False:",
        "tests/test_conversation_records.py::test_conversations_that_users_bring_are_treated_as_the_table_says"
        "[an answer that shares a token with the text before it]",
    ),
    Mutant(
        "answers-of-a-prompt-learned",
        "answers in a prompt of messages are learned",
        CONVERSATION_CODE,
        "if not any(start in part for part in unlearned):",
        "if True:",
        f"{CONVERSATION_TESTS}::test_answers_in_a_prompt_of_messages_are_not_learned[marks]",
    ),
    Mutant(
        "end-of-a-completion-not-learned",
        "the end token after a completion is not learned",
        CONVERSATION_CODE,
        "return Document(ids, np.arange(len(ids)) >= len(prompt))",
        "return Document(ids, (np.arange(len(ids)) >= len(prompt)) & (ids != self._end))",
        f"{CONVERSATION_TESTS}::test_a_completion_of_text_is_learned_with_an_end_as_trl_has_it[Is he- there]",
    ),
    Mutant(
        "labels-of-uint16",
        "labels have the dtype of the tokens, in which −100 is another token",
        "models/data/padded.py",
        "labels = np.where(is_learned, ids, np.int64(IGNORED))",
        "labels = np.where(is_learned, ids.astype(np.uint16), np.array(IGNORED).astype(np.uint16)).astype(np.int64)",
        f"{CONVERSATION_TESTS}::test_a_sample_is_a_conversation_that_is_cut_or_padded_on_the_right",
    ),
    Mutant(
        "cache-without-template",
        "conversations that another chat template wrote are taken from the cache",
        "models/data/corpus.py",
        '"template": None if template is None else template.content,',
        '"template": None,',
        "tests/test_conversation_records.py::test_tokens_in_the_cache_are_those_of_the_same_template[prefixes]",
    ),
    Mutant(
        "samples-without-a-label",
        "a conversation whose answer is cut off is a sample, of which nothing is learned",
        "models/data/padded.py",
        "(numbers,) = np.nonzero(counts.kept)",
        "(numbers,) = np.nonzero(counts.whole)",
        f"{CONVERSATION_TESTS}::test_a_sample_is_a_conversation_that_is_cut_or_padded_on_the_right",
    ),
)

GENERATE_TESTS = "tests/test_generate.py"
GREEDY = f"{GENERATE_TESTS}::test_greedy_texts_of_prompts_of_different_lengths_equal_hugging_faces"
GENERATION = (
    Mutant(
        "cache-written-one-position-off",
        "keys and values of a new token are kept one position before its own",
        "parallel/ops/kernels/cached_attention.py",
        "cache[:, texts, :, positions] =",
        "cache[:, texts, :, positions - 1] =",
        f"{GREEDY}[gpt2]",
    ),
    Mutant(
        "cache-mask-one-off",
        "a new token sees the position after its own, where the prompt's padding is",
        "parallel/sequence/cache.py",
        "keys > rows if",
        "keys > rows + 1 if",
        f"{GREEDY}[llama]",
    ),
    Mutant(
        "draws-not-keyed-by-sample",
        "texts of the same prompt are the same: a draw does not depend on its sample",
        "models/generation/sampling.py",
        "(samples << 32) + positions",
        "(samples << 64) + positions",
        f"{GENERATE_TESTS}::test_a_draw_depends_on_seed_sample_and_position_and_on_nothing_beside_it",
    ),
    Mutant(
        "window-ignored-for-new-tokens",
        "a new token sees all earlier keys, though the prompt's tokens have a window",
        "parallel/sequence/cache.py",
        "(keys > rows) | (keys <= rows - window)",
        "(keys > rows)",
        f"{GREEDY}[mistral]",
    ),
)

FUSED = "parallel/ops/kernels/cached_attention_triton.py"
FUSED_TEST = (
    "tests/test_cached_attention.py::test_the_interpreted_kernel_is_as_exact_as_torch_and_leaves_the_rest_of_the_cache"
)
FUSED_ATTENTION = (
    Mutant(
        "kernel-window-one-off",
        "the fused attention sees one key more than its window",
        FUSED,
        "tl.maximum(position - window + 1, 0)",
        "tl.maximum(position - window, 0)",
        FUSED_TEST,
    ),
    Mutant(
        "kernel-adds-the-new-key-in-every-part",
        "where programs share a query head, each of them counts the new key",
        FUSED,
        "tl.where(part == 0, tl.exp2(new_score - top), 0.0)",
        "tl.exp2(new_score - top)",
        FUSED_TEST,
    ),
    Mutant(
        "kernel-without-rescaling",
        "sums of values are not rescaled when a larger score comes",
        FUSED,
        "weighted * kept[:, None] + weights[:, None]",
        "weighted + weights[:, None]",
        FUSED_TEST,
    ),
    Mutant(
        "kernel-wrong-key-head",
        "neighbouring query heads use different key heads",
        FUSED,
        "kv_head = head // GROUP",
        "kv_head = head % (tl.num_programs(1) // GROUP)",
        FUSED_TEST,
    ),
    Mutant(
        "kernel-writes-the-value-as-key",
        "the new value is kept in the place of the new key",
        FUSED,
        "dims, new_key, mask",
        "dims, new_value, mask",
        FUSED_TEST,
    ),
)

READ_AGAIN = (
    Mutant(
        "tools-left-out",
        "a model is asked without the tools of its prompt",
        "models/generation/prompts.py",
        "template.write(dialogue.conversation, add_generation_prompt=True).text",
        "template.render(dialogue.conversation.messages, add_generation_prompt=True)",
        "tests/test_generate.py::test_messages_of_a_file_are_read_as_in_training",
    ),
    Mutant(
        "token-ids-taken-for-text",
        "the token ids of a folder are decoded as bytes by a generation from a checkpoint",
        "models/data/sources.py",
        "if kind is None or Path(path).is_dir():",
        "if kind is None:",
        "tests/test_records.py::test_a_folder_of_token_ids_is_told_from_texts",
    ),
)

TEXTS_ATTACKED = (
    Mutant(
        "packed-samples-without-a-label",
        "a sample of documents of one token each is trained on, and a step of such samples ends the run",
        "models/data/packed.py",
        "count_starts(row, sequence_length) < sequence_length - 1",
        "count_starts(row, sequence_length) < sequence_length",
        f"{DOCUMENT_TESTS}::test_every_packed_sample_has_a_label",
    ),
    Mutant(
        "documents-not-in-the-digest",
        "a run is resumed with documents that end elsewhere, and so with other labels",
        "models/data/chosen.py",
        "return self.row.digest_with_starts",
        "return self.row.digest",
        "tests/test_resumed_runs.py::"
        "test_a_resumed_run_does_what_the_table_says[with `data.document_mask`, the token that ends a document of token ids]",
    ),
    Mutant(
        "answers-of-no-weight-learned",
        "an answer with the weight 0 is learned as any other",
        "models/data/conversation_records.py",
        "number >= self.first and message.get(WEIGHT) != 0",
        "number >= self.first",
        "tests/test_conversation_records.py::"
        "test_conversations_that_users_bring_are_treated_as_the_table_says"
        "[an answer with the `weight` 0, as in OpenAI's format]",
    ),
    Mutant(
        "dynamic-angles-of-the-longest-document",
        "with dynamic scaling a document turns by the length of the longest one of its microbatch",
        "models/rotary.py",
        "if batch.documents is not None:",
        "if False:",
        "tests/test_llama.py::test_dynamic_tables_of_a_document_are_those_of_its_own_length",
    ),
    Mutant(
        "labels-in-a-narrow-dtype",
        "the label −100 of a batch in uint8 is 156, and is counted",
        "parallel/pipeline/microbatch.py",
        "{key: x.to(torch.int64) for",
        "{key: x if x.dtype == torch.uint8 else x.to(torch.int64) for",
        "tests/test_batch_keys.py::test_integers_of_any_dtype_are_those_of_int64",
    ),
)

ATTACKED_DATA = (
    Mutant(
        "digest-without-the-change",
        "a file that was replaced by one of the same size and time has the tokens of the one before",
        "models/data/contents.py",
        "[status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]",
        "[status.st_size, status.st_mtime_ns, status.st_ino]",
        f"{CACHE_TESTS}::test_a_large_file_that_has_not_changed_is_not_read_again",
    ),
    Mutant(
        "halves-of-large-ids",
        "ids of 4 bytes of a large vocabulary are read as twice as many of 2 bytes",
        "models/data/token_files.py",
        "if upper.any() and not is_small:",
        "if upper.any():",
        "tests/test_records.py::test_what_users_bring_as_data_is_treated_as_the_table_says[a .bin of another dtype]",
    ),
    Mutant(
        "parts-of-others-removed",
        "without locks a process removes the files of an entry that another one is writing",
        "models/data/cache.py",
        "        if excludes_others(lock):\n            for left",
        "        if True:\n            for left",
        f"{CACHE_TESTS}::test_where_a_file_system_has_no_locks_all_may_make_the_same_entry_at_once",
    ),
)

SEEN_AND_GENERATED = (
    Mutant(
        "beginning-of-a-stop-told",
        "while a text grows its screen shows the beginning of a stop, which the text does not have",
        "models/generation/text_generator.py",
        "return text[: len(text) - max(begun, default=0)]",
        "return text",
        f"{GENERATE_TESTS}::test_what_is_told_of_a_growing_text_stays",
    ),
    Mutant(
        "prompts-split-within-a-line",
        "a character that Unicode calls the end of a line makes two prompts of one",
        "models/generation/prompts.py",
        'return text.split("\\n")',
        "return text.splitlines()",
        f"{GENERATE_TESTS}::test_a_line_of_a_file_of_prompts_ends_at_a_line_feed_alone",
    ),
    Mutant(
        "callbacks-share-a-line",
        "what a callback takes out of the metrics of a step, the run does not find in them",
        "training/callbacks.py",
        "(*deepcopy(arguments))",
        "(*arguments)",
        "tests/test_callbacks.py::test_what_a_callback_changes_in_a_line_nothing_else_sees",
    ),
    Mutant(
        "best-names-what-is-replaced",
        "a run that is killed while it replaces its best checkpoint leaves a name of nothing",
        "parallel/checkpoint/replaced_folder.py",
        "        at_last()\n        folder.rename(old)\n",
        "        folder.rename(old)\n",
        "tests/test_best_checkpoint.py::test_best_names_a_whole_checkpoint_also_while_one_is_replaced",
    ),
)

DAMAGE, AUTO = "tests/test_damage.py", "tests/test_resume_auto.py"
INTEGRITY = (
    Mutant(
        "contents-not-verified",
        "a flipped bit in a file with tensors is loaded",
        "parallel/checkpoint/verify.py",
        "if _sha256_of(content) != index.sums[name]:",
        "if False:",
        f"{DAMAGE}::test_forty_flipped_bits_are_each_refused_by_the_name_of_the_file",
    ),
    Mutant(
        "index-not-verified",
        "a counter that was changed in the index moves the run in its data",
        "parallel/checkpoint/index.py",
        "if hashlib.sha256(content).hexdigest() != sums.pop(INDEX):",
        "if not sums.pop(INDEX):",
        f"{DAMAGE}::test_an_altered_counter_is_refused[samples]",
    ),
    Mutant(
        "files-of-other-ranks-not-verified",
        "a rank leaves out files that no other rank reads",
        "parallel/checkpoint/verify.py",
        "sorted(files)[axis.rank :: axis.size]",
        "sorted(files)[axis.rank :: axis.size + 1]",
        f"{DAMAGE}::test_a_shard_of_another_rank_is_refused_by_its_name",
    ),
    Mutant(
        "index-names-any-file",
        "an index has a file outside its folder read",
        "parallel/checkpoint/index.py",
        "if not FILE_NAME.fullmatch(name):",
        "if not name:",
        f"{DAMAGE}::test_an_index_that_no_save_has_written_is_refused_though_its_checksum_is_right[a name with a folder]",
    ),
    Mutant(
        "overlap-unnoticed",
        "two parts of a tensor that overlap hide that elements are missing",
        "parallel/layout/cover.py",
        "        if not _are_disjoint([box[1:] for box in met]):",
        "        if False:",
        "tests/test_checkpoint.py::test_covered_once_notices_a_gap_and_an_overlap_of_equal_size",
    ),
    Mutant(
        "allocated-before-checked",
        "values of a size that the checkpoint does not have are allocated",
        "parallel/checkpoint/saved_values.py",
        "            if prod(sizes):",
        "            if False:",
        "tests/test_access_and_state.py::test_metadata_of_no_engine_are_refused_and_change_nothing",
    ),
    Mutant(
        "damage-found-after-the-folder-was-touched",
        "config.json of a run is written anew before its damaged checkpoint is refused",
        "training/run.py",
        "    job = with_whole_checkpoint(job, context.mesh.world)\n",
        "    job.folder.make(job.config)\n    job = with_whole_checkpoint(job, context.mesh.world)\n",
        f"{AUTO}::test_a_damaged_checkpoint_that_was_named_is_refused_with_the_one_before_and_nothing_is_touched[a flipped bit]",
    ),
    Mutant(
        "auto-begins-anew",
        "where no checkpoint is whole a run begins from the beginning",
        "parallel/checkpoint/newest.py",
        "    if others:\n",
        "    if False:\n",
        f"{AUTO}::test_where_all_files_are_gone_auto_refuses_too",
    ),
    Mutant(
        "damaged-kept-for-whole",
        "a damaged checkpoint is kept, and the whole one before it deleted",
        "training/resume.py",
        "        folder.rename(aside)\n",
        "        aside.exists()\n",
        f"{AUTO}::test_a_whole_checkpoint_is_not_deleted_for_a_damaged_one_that_was_passed_over",
    ),
    Mutant(
        "replaced-checkpoint-not-found",
        "the only checkpoint of a run is lost when a save is killed between its renamings",
        "parallel/checkpoint/checkpoint.py",
        'checkpoints.glob("*step_*")',
        'checkpoints.glob("step_*")',
        f"{AUTO}::test_a_checkpoint_that_another_one_of_its_step_was_about_to_replace_is_found",
    ),
    Mutant(
        "position-of-the-damaged-one",
        "a run goes on at the place of the checkpoint that it has passed over",
        "training/preflight.py",
        "        return Inputs.of(self.request, self.corpus, find_another(self.found, self.request.resume, damage))",
        "        other = find_another(self.found, self.request.resume, damage)\n"
        "        return Inputs(self.request, self.config, self.corpus, other, self.messages)",
        f"{AUTO}::test_the_steps_of_epochs_follow_from_the_checkpoint_that_is_taken",
    ),
)

NONFINITE, NONFINITE_RUNS = "tests/test_nonfinite.py", "tests/test_nonfinite_runs.py"
NO_BIT = f"{NONFINITE}::test_a_step_that_is_left_out_changes_no_bit"
NAMED_WHERE = f"{NONFINITE}::test_what_is_not_finite_is_named_on_every_rank_and_nothing_has_changed"

NUMBERS = (
    Mutant(
        "left-out-step-updates",
        "the device updates weights with a gradient that is not finite",
        "parallel/ops/kernels/adamw.py",
        "        found_inf=step.found_inf,\n",
        "        found_inf=0.0 * step.found_inf,\n",
        f"{NO_BIT}[single-0-fp32-device-fp32]",
    ),
    Mutant(
        "left-out-step-updates-on-the-host",
        "the flag does not travel to the host with the clip factor",
        "parallel/optim/adamw.py",
        "found_inf=found_inf.float())",
        "found_inf=0.0 * found_inf.float())",
        f"{NO_BIT}[single-0-bf16-host-bf16]",
    ),
    Mutant(
        "left-out-step-is-counted",
        "the bias correction counts a step that was left out",
        "parallel/optim/update_counts.py",
        "        self.total, self._missed = self._before\n",
        "        pass\n",
        f"{NO_BIT}[single-0-fp32-device-fp32]",
    ),
    Mutant(
        "loss-not-looked-at",
        "only the norm decides whether a step updates",
        "parallel/engine/base.py",
        "self.lr, found_inf(norm, loss))",
        "self.lr, found_inf(norm))",
        f"{NONFINITE}::test_a_loss_that_is_not_finite_stops_a_step_whose_gradient_is",
    ),
    Mutant(
        "scale-without-a-floor",
        "the loss scale falls for ever, and no step is ever told to be not finite",
        "parallel/optim/loss_scale.py",
        "return self.is_dynamic and self.scale > LOWEST",
        "return self.is_dynamic",
        f"{NONFINITE}::test_an_overflow_of_fp16_is_the_scales_business_until_the_scale_is_one",
    ),
    Mutant(
        "receiver-of-a-weight-named",
        "the rank is named that has gathered a weight, and not the one that it came from",
        "parallel/modules/first_not_finite.py",
        "found.time, not found.is_own, found.rank",
        "found.time, found.is_own, found.rank",
        f"{NAMED_WHERE}[dp2-3-fp32-weight-1]",
    ),
    Mutant(
        "later-stage-first",
        "a stage that has received what is not finite is named",
        "parallel/modules/first_not_finite.py",
        "-found.stage if is_backward else found.stage",
        "found.stage if is_backward else -found.stage",
        f"{NAMED_WHERE}[pp2-0-fp32-data-0]",
    ),
    Mutant(
        "saved-without-a-look",
        "weights that are not finite are saved over those that are",
        "training/checkpoints.py",
        '        engine.check_finite("It is not saved, and earlier checkpoints stay.", states=True)\n',
        "",
        f"{NONFINITE_RUNS}::test_a_row_that_no_token_uses_is_seen_when_it_is_to_be_saved",
    ),
    Mutant(
        "done-without-a-look",
        "a run whose weights are not finite is exported and called done",
        "training/run.py",
        '        engine.check_finite("The run has not come to a model: nothing is exported.")\n',
        "",
        f"{NONFINITE_RUNS}::test_a_row_that_no_token_uses_is_seen_when_it_is_to_be_saved",
    ),
    Mutant(
        "row-of-leavings-forgotten",
        "a checkpoint forgets how many steps were left out",
        "parallel/optim/step_counts.py",
        '("steps", "in_a_row"))',
        '("steps", "steps"))',
        f"{NONFINITE}::test_ten_steps_in_a_row_end_the_run_and_an_update_begins_the_count_anew",
    ),
    Mutant(
        "marked-for-ever",
        "what is marked does not enter the history",
        "training/outliers.py",
        "            history.append(value)\n",
        "            history.extend([value] * (key not in marked))\n",
        f"{NONFINITE_RUNS}::test_a_level_that_has_changed_for_good_is_marked_a_few_times_and_not_for_ever",
    ),
)

SAVED_BEHIND = (
    Mutant(
        "update-before-the-copy",
        "an update on the device changes what a checkpoint in the background is yet to copy",
        "parallel/optim/adamw.py",
        "                chunk.guard.wait()\n            self._update(",
        "                pass\n            self._update(",
        "tests/test_saver.py::test_a_checkpoint_written_during_training_equals_one_that_training_waited_for[few]",
    ),
    Mutant(
        "offloaded-update-before-the-copy",
        "an update of offloaded states changes what a checkpoint in the background is yet to copy",
        "parallel/optim/adamw.py",
        "            chunk.guard.wait()\n        # Chunks",
        "            pass\n        # Chunks",
        "tests/test_saver.py::test_a_checkpoint_written_during_training_equals_one_that_training_waited_for[few]",
    ),
    Mutant(
        "settled-before-the-copy",
        "an optimizer of torch's changes what a checkpoint in the background is yet to copy",
        "parallel/chunk/chunk.py",
        "        self.guard.wait()\n",
        "",
        "tests/test_saver.py::test_whatever_settles_a_chunk_waits_for_its_guard",
    ),
    Mutant(
        "released-before-it-is-written",
        "states that are written without a copy may change when the first piece of a chunk is written",
        "parallel/checkpoint/snapshot.py",
        "            if not held.num_left:\n",
        "            if held.num_left:\n",
        "tests/test_saver.py::test_a_chunk_is_released_when_its_last_piece_is_written",
    ),
    Mutant(
        "users-writes-in-a-checkpoint",
        "a program that writes into its parameters after a save writes into the checkpoint",
        "parallel/checkpoint/saver.py",
        "        if not guarded:\n",
        "        if False:\n",
        "tests/test_saver.py::test_what_a_program_changes_after_a_save_is_not_in_the_checkpoint[0-False-fp64]",
    ),
    Mutant(
        "failed-save-untold",
        "a checkpoint that could not be written in the background is not an error",
        "parallel/checkpoint/saver.py",
        'self.notices.set("save_failed", 1)',
        "pass",
        "tests/test_saver.py::test_a_save_that_fails_on_one_rank_is_an_error_of_the_next_step_on_every_rank",
    ),
    Mutant(
        "replaced-checkpoint-deleted-early",
        "a save that is killed between two renames has deleted the only checkpoint",
        "parallel/checkpoint/replaced_folder.py",
        "        folder.rename(old)\n    temporary.rename(folder)\n",
        "        folder.rename(old)\n        shutil.rmtree(old)\n    temporary.rename(folder)\n",
        "tests/test_crash_points.py::"
        "test_after_each_file_operation_of_a_save_the_old_checkpoint_or_the_new_one_is_whole[2-False]",
    ),
)

NO_ROOM_TESTS, MEMORY_TESTS = "tests/test_no_room.py", "tests/test_out_of_memory.py"
NO_ROOM = (
    Mutant("cut-line-stays", "leaves the part of a line that a full disk took",
           "parallel/storage/no_room.py", "            os.ftruncate(descriptor, before)", "            pass",
           f"{NO_ROOM_TESTS}::test_a_line_that_a_limit_cuts_is_taken_back"),
    Mutant("quota-is-no-full-disk", "takes a quota that is reached for an error of the checkpoint",
           "parallel/storage/no_room.py", "FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)",
           "FULL = (errno.ENOSPC, errno.EFBIG)",
           f"{NO_ROOM_TESTS}::test_an_error_of_a_file_says_whether_its_disk_is_full_or_broken"),
    Mutant("resumed-metrics-keep-a-step", "keeps the line of the first step that a resumed run takes again",
           "training/metrics_file.py", '["step"] or 0) > last:', '["step"] or 0) > last + 1:',
           f"{NO_ROOM_TESTS}::test_a_resumed_run_cuts_the_lines_that_it_takes_again"),
    Mutant("cut-trace-is-whole", "keeps a trace that a full disk has cut",
           "training/tracer.py", "                check_whole(temporary)", "                pass",
           f"{NO_ROOM_TESTS}::test_a_trace_that_was_cut_is_not_taken_for_a_whole_one"),
    Mutant("always-before-the-first-step", "refuses a config for a memory that runs out in the middle of a run",
           "parallel/placement/memory_guard.py", "self.has_stepped = num_steps, True",
           "self.has_stepped = num_steps, False",
           f"{MEMORY_TESTS}::test_a_memory_that_runs_out_in_a_step_is_told_with_the_phase_and_the_largest_tensors"),
    Mutant("master-weights-counted-twice", "counts master weights as moments, too",
           "parallel/placement/held.py", "max(0, state_bytes - chunk.master.nbytes)", "state_bytes",
           f"{MEMORY_TESTS}::test_all_that_the_chunks_and_the_optimizer_hold_is_in_the_list"),
    Mutant("pieces-of-memory-unseen", "does not see that memory which is reserved would be enough",
           "parallel/placement/memory_report.py", "use.unused >= shortage.asked", "use.unused >= 2 * shortage.asked",
           f"{MEMORY_TESTS}::test_what_helps_comes_in_the_order_of_what_takes_the_memory"),
    Mutant("every-kill-for-memory", "says of every killed rank that the system had no memory left",
           "parallel/watch/control_groups.py", "now > (self._before or 0)", "now >= (self._before or 0)",
           f"{MEMORY_TESTS}::test_a_rank_that_the_system_killed_for_memory_is_said_to_be"),
    Mutant("half-a-checkpoint-is-enough", "warns too late of a disk without room for the checkpoints",
           "training/disk_room.py", "left + free >= most * size:", "left + free >= (most - 1) * size:",
           f"{NO_ROOM_TESTS}::test_a_disk_without_room_for_the_checkpoints_is_told_of_before_the_run"),
)  # fmt: skip

WATCH_PARTS, COMPARED = "tests/test_watch_parts.py", "tests/test_debug_comm.py"
WATCHED = (
    Mutant(
        "stopped-in-a-phase-overlooked",
        "a rank that is stopped while it saves is never named",
        "parallel/watch/judge.py",
        "stopped = [one.beat for one in living if one.quiet >= timeout]",
        "stopped = [one.beat for one in living if one.quiet >= timeout and not one.beat.phase]",
        "tests/test_parting.py::test_a_rank_that_is_lost_or_silent_is_named[a process that is stopped in a phase]",
    ),
    Mutant(
        "any-process-of-a-number-killed",
        "the process that took over the number of a rank is killed in its place",
        "parallel/watch/process.py",
        'if _state(identity) in ("", *ENDED):',
        "if False:",
        f"{WATCH_PARTS}::test_a_process_that_took_over_a_number_is_not_killed",
    ),
    Mutant(
        "background-thread-is-the-rank",
        "a rank seems to wait while a thread of it saves",
        "parallel/watch/stack.py",
        "waits=not waiting <= set(apart),",
        "waits=bool(waiting),",
        f"{WATCH_PARTS}::test_a_rank_waits_where_any_of_its_threads_does_unless_that_one_works_apart",
    ),
    Mutant(
        "judge-begins-from-nothing",
        "a stopped rank 0 is named twice as late as another one",
        "parallel/watch/judging.py",
        "self._takes_over_after - SECONDS_TO_PREPARE",
        "self._takes_over_after",
        f"{WATCH_PARTS}::test_the_rank_that_takes_over_names_a_stopped_rank_0_within_the_time_limit_and_three_seconds",
    ),
    Mutant(
        "end-without-hook",
        "the end of a run that lost a rank is not written down",
        "parallel/watch/last_line.py",
        "hook, self.on_end = self.on_end, None",
        "hook = None",
        f"{WATCH_PARTS}::test_what_was_registered_for_the_end_is_called_and_does_not_hold_up_the_end",
    ),
    Mutant(
        "group-fails-before-the-watch",
        "gloo's traceback comes before the line that names a rank",
        "parallel/mesh/process_groups.py",
        "max(LONGEST_WAIT, timedelta(seconds=2 * timeout_seconds + 60))",
        "LONGEST_WAIT",
        "tests/test_group_timeouts.py::test_the_timeout_of_every_process_group_exceeds_that_of_the_watch",
    ),
    Mutant(
        "reduction-not-compared",
        "ranks that reduce in different ways are not told",
        "parallel/mesh/collectives.py",
        '_begin("all_reduce", x, axis, f" ({_name_of(op)})")',
        '_begin("all_reduce", x, axis)',
        f"{COMPARED}::test_ranks_that_call_different_collectives_are_named_on_every_rank",
    ),
    Mutant(
        "debugging-unknown-to-others",
        "a rank that compares its calls waits for one that does not",
        "parallel/engine/context.py",
        '"debug_comm": debug_comm}',
        '"debug_comm": False}',
        f"{COMPARED}::test_a_launched_program_ends_with_what_differs",
    ),
)

HOSTILE_FILES = (
    Mutant(
        "pipe-opened",
        "a pipe in place of a file is waited for",
        "parallel/regular_file.py",
        "    if kind != stat.S_IFREG:\n",
        "    if kind not in (stat.S_IFREG, stat.S_IFIFO):\n",
        "tests/test_regular_file.py::test_what_is_no_regular_file_is_refused_before_it_is_opened[a pipe]",
    ),
    Mutant(
        "replaced-file-not-looked-at",
        "a pipe that takes the name of a file between the look and the opening is read",
        "parallel/regular_file.py",
        "            _check(file, os.fstat(descriptor), error)  # another one may have its name by now\n",
        "",
        "tests/test_regular_file.py::test_a_file_that_takes_the_name_of_another_one_is_not_opened_for_it",
    ),
    Mutant(
        "shard-outside-of-the-folder",
        "an index of weights names a file outside of its folder, and it is read",
        "models/weight_files.py",
        "    if outside := [name for name in names if name != Path(name).name]:\n",
        "    if outside := [name for name in names if not name]:\n",
        "tests/test_hostile_files.py::"
        "test_hostile_contents_are_refused_and_never_executed[a shard outside of the folder]",
    ),
    Mutant(
        "cached-bytes-not-compared",
        "a byte that has changed in an entry of the cache is trained on",
        "models/data/block_sums.py",
        "        if zlib.crc32(stream.read(BLOCK)) != expected:\n",
        "        if not zlib.crc32(stream.read(BLOCK)):\n",
        "tests/test_cache.py::test_a_damaged_entry_is_made_again[_flipped]",
    ),
    Mutant(
        "endless-template",
        "the rounds of a chat template's loops are not counted",
        "models/chat_limits.py",
        "        self._rounds += rounds\n",
        "        self._rounds = rounds\n",
        "tests/test_chat.py::test_rounds_of_loops_and_calls_are_counted_in_each_text[loops within a loop]",
    ),
)

KILLED = "tests/test_kills.py::test_a_killed_run_goes_on_bit_for_bit[{}]"
KILLS = (
    Mutant(
        "last-save-left-unsettled",
        "a run that is killed after its last save keeps more checkpoints than it should",
        "training/run.py",
        "    checkpoints.settle()\n",
        "",
        KILLED.format("one rank, validated"),
    ),
    Mutant(
        "replaced-checkpoint-settled",
        "a run that goes on from a checkpoint which was being replaced deletes it",
        "parallel/checkpoint/checkpoint.py",
        "    return STEP_FOLDER.fullmatch(folder.name) is not None\n",
        "    return True\n",
        "tests/test_kills.py::test_a_run_without_steps_left_leaves_the_only_whole_checkpoint_where_it_is",
    ),
    Mutant(
        "loss-scale-not-resumed",
        "a run in fp16 that goes on skips steps again until its loss scale has come down",
        "parallel/optim/step_counts.py",
        'self.loss_scale.scale, self.loss_scale.good_steps = state["loss_scale"], int(state["good_steps"])',
        "pass",
        KILLED.format("fp16 with overflows"),
    ),
)

ENDS_TEST = "tests/test_ends.py"
ENDS = (
    Mutant(
        "signal-before-a-save-ends",
        "a run that a signal ends is not saved where no checkpoint is due",
        "training/loop.py",
        " or number is not None:",
        ":",
        f"{ENDS_TEST}::test_a_run_that_a_signal_ends_goes_on_as_if_nothing_had_been",
    ),
    Mutant(
        "evaluation-cut-is-not-made-again",
        "the validation loss of the step at which a signal came is missing for ever",
        "training/loop.py",
        "        best.unevaluated = line\n",
        "        pass\n",
        f"{ENDS_TEST}::test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_first",
    ),
    Mutant(
        "same-signal-twice-ends-at-once",
        "a Ctrl-C that a launcher repeats ends a run without a checkpoint",
        "parallel/engine/stop_signals.py",
        "now - self._first_came > SECONDS_OF_ONE and",
        "",
        f"{ENDS_TEST}::test_a_second_signal_ends_at_once_and_one_within_a_second_is_the_same",
    ),
    Mutant(
        "own-folder-by-its-name-alone",
        "a run that is started again goes on from what an older run has left in its folder",
        "training/attempt.py",
        """return "auto" if start.has_saved or _has_own_checkpoint(start) else start.resumed_from or None""",
        """return "auto\"""",
        f"{ENDS_TEST}::test_a_later_attempt_begins_at_its_own_checkpoint_and_else_as_the_first_one_did",
    ),
    Mutant(
        "hosts-that-change-end-a-run",
        "a run is not started again after a host has come or gone, since torchrun sent it SIGTERM",
        "parallel/watch/launch_history.py",
        "None if attempt == self._attempt else Decision(code, text)",
        "Decision(code, text)",
        f"{ENDS_TEST}::test_a_later_attempt_learns_of_a_decision_and_the_same_one_does_not",
    ),
)

SPLIT_IN_1D = "tests/test_parity.py::test_training_equals_hugging_face[1d2-sp-fp64]"
SPLIT_TESTS = "tests/test_sequence_parallel.py"
SPLIT_TRAINS = f"{SPLIT_TESTS}::test_it_trains_as_a_single_process_with_dropout[{{}}]"
OF_REPLICAS = '(self.mesh.axis("data", "context"),)'

SEQUENCE_PARALLEL = (
    Mutant(
        "sequence-norms-not-summed",
        "the weights of norms get the gradient of a rank's own positions",
        MODE,
        "layout = self.layout((hidden,), self.hidden) if affine else None",
        f"layout = Layout((hidden,), (self.hidden,), {OF_REPLICAS}, self.length) if affine else None",
        SPLIT_IN_1D,
    ),
    Mutant(
        "sequence-biases-not-summed",
        "the biases of linears out of a block get the gradient of its own positions",
        MODE,
        "self.layout(sizes[:-1], *splits[:-1]) if bias else None",
        f"Layout(sizes[:-1], splits[:-1], {OF_REPLICAS}, () if any(splits[:-1]) else self.length) if bias else None",
        SPLIT_IN_1D,
    ),
    Mutant(
        "sequence-positions-not-summed",
        "the position table gets the gradient of a rank's own positions",
        MODE,
        "Embedding(self.layout((count, hidden), (), self.hidden), self._empty())",
        f"Embedding(Layout((count, hidden), ((), self.hidden), {OF_REPLICAS}, self.length), self._empty())",
        SPLIT_IN_1D,
    ),
    Mutant(
        "sequence-labels-follow-one-another",
        "the labels of a token slice are those of its first rank's positions",
        "parallel/tensor/loss.py",
        "labels[..., tokens].flatten(1)",
        "labels.flatten(1)[:, labels.shape[1] * start :][:, : logits.shape[1]]",
        f"{SPLIT_TESTS}::test_labels_of_a_token_slice_are_those_of_each_ranks_positions",
    ),
    Mutant(
        "sequence-dropout-by-own-positions",
        "the parts of a sequence share a dropout mask",
        MODE,
        "return self.local(self.sequence.positions(inside, device), self.length)",
        "return self.sequence.positions(local, device)",
        SPLIT_TRAINS.format("dp2-1d2-zero3-gpt2"),
    ),
    Mutant(
        "sequence-head-norms-summed-twice",
        "the gradient of a norm over each head is summed over t as tokens and heads",
        MODE,
        "*self.token_axes) if name not in done)), *heads]",
        "*self.token_axes) if name not in own)), *heads]",
        SPLIT_TRAINS.format("1d2-qwen3"),
    ),
)

OVERLAPPED_TEST = "tests/test_sliced.py::test_a_model_whose_linears_overlap_trains_as_in_one_process"
SLICED = "parallel/tensor/sliced.py"

OVERLAPPED = (
    Mutant(
        "sum-of-a-slice-left-out",
        "a slice of y or dx, the second one, stays a partial sum",
        SLICED,
        "        y.add(i, product)",
        "        if i != 1:\n            y.add(i, product)",
        f"{OVERLAPPED_TEST}[1d2]",
    ),
    Mutant(
        "columns-of-a-slice-left-out",
        "the second slice of dx and dW in a grid is what the memory held before",
        SLICED,
        "            found.add(i, a @ b.flatten(0, -2))",
        "            if i != 1:\n                found.add(i, a @ b.flatten(0, -2))",
        f"{OVERLAPPED_TEST}[2d4]",
    ),
    Mutant(
        "slices-in-the-wrong-order",
        "the slices of x after the first one arrive from the last to the second",
        SLICED,
        "following = start_all_gather(self.part(x, i), *gather)",
        "following = start_all_gather(self.part(x, len(self.ranges) - i), *gather)",
        f"{OVERLAPPED_TEST}[1d2-sequence]",
    ),
    Mutant(
        "last-slice-not-waited-for",
        "the last slice of dx and dW in a grid is in flight for ever, and not in its place",
        SLICED,
        "return Pending(found.out, found)",
        "return Pending(found.out)",
        f"{OVERLAPPED_TEST}[2d4]",
    ),
    Mutant(
        "rows-of-a-slice-not-kept",
        "all tokens but those of the first slice are multiplied by the memory in place of W's last rows",
        SLICED,
        "            self._whole[start:stop] = w",
        "            self._whole[start:stop] = w if stop < self.num_rows else 0",
        f"{OVERLAPPED_TEST}[2d4]",
    ),
)

W_TEST = "tests/test_weight_gradients.py"
WHOLE_STEP = f"{W_TEST}::test_steps_whose_weight_gradients_all_come_last_equal_hugging_face[2d2x2]"
DEFERRED_CALL = (
    "            receiver.deferred.call(_add_weight_gradient, dy.detach(), x.detach(), collectives, receiver)\n"
)
WEIGHT_GRADIENTS = (
    Mutant(
        "w-without-its-reduce-scatter",
        "a weight gradient that is computed later lacks what the other ranks add to it",
        MATMUL,
        "        dw = multiply(*_factors(pending_dy.wait(), pending_x))\n"
        "        return None if dw is None else self.scatter_dw(dw)\n",
        "        dw = multiply(*_factors(pending_dy.wait(), pending_x))\n"
        "        return None if dw is None else dw.chunk(self.gather_w.size, -1)[self.gather_w.rank]\n",
        WHOLE_STEP,
    ),
    Mutant(
        "w-of-its-own-x",
        "a weight gradient that is computed later has this rank's x in the place of the other ranks'",
        MATMUL,
        "pending_dy, pending_x = self.start_gather_dy(dy), self.start_gather_x(x)",
        "pending_dy = self.start_gather_dy(dy)\n"
        "        pending_x = Pending(torch.cat([x] * self.gather_x[1].size, self.gather_x[0]))",
        WHOLE_STEP,
    ),
    Mutant(
        "weight-gradient-added-twice",
        "a weight gradient is kept for later twice",
        MATMUL,
        DEFERRED_CALL,
        2 * DEFERRED_CALL,
        WHOLE_STEP,
    ),
    Mutant(
        "gathered-x-kept-for-w",
        "the x of all ranks is kept until the weight gradient is computed",
        MATMUL,
        DEFERRED_CALL,
        DEFERRED_CALL + "            receiver.deferred.call(torch.numel, collectives.start_gather_x(x).wait())\n",
        f"{W_TEST}::test_a_rank_keeps_its_own_parts_between_i_and_w_and_nothing_gathered",
    ),
)
ANY_PLAN_TEST = "tests/test_runner.py::test_a_drawn_plan_trains_as_a_single_process"
ONCE = "tests/test_runner.py::test_chunks_are_summed_once_for_each_round_and_layers_gathered_once_for_each_pass"

ANY_PLAN = (
    Mutant(
        "weight-gradients-of-another-microbatch",
        "W computes what the I of another microbatch has left",
        RUNNER,
        "run_deferred(key)",
        "run_deferred((action.stage, 0))",
        f"{ANY_PLAN_TEST}[line]",
    ),
    Mutant(
        "loss-of-the-last-rank",
        "the loss is taken from the last rank of the pipe, and not from the last stage",
        RUNNER,
        "return y.detach()",
        "return y.detach() * (self.pipe.rank == self.pipe.size - 1)",
        f"{ANY_PLAN_TEST}[v]",
    ),
    Mutant(
        "gradient-handed-to-another-microbatch",
        "a stage's gradient is that of the next one's oldest microbatch",
        RUNNER,
        "self.gradients.pop((action.stage + 1, action.microbatch), None)",
        "self.gradients.pop(min((k for k in self.gradients if k[0] == action.stage + 1), default=None), None)",
        f"{ANY_PLAN_TEST}[alone]",
    ),
    Mutant(
        "used-output-kept",
        "an output is kept after the next stage of the rank has used it",
        RUNNER,
        "x = self.outputs.pop((action.stage - 1, action.microbatch), None)",
        "x = self.outputs.get((action.stage - 1, action.microbatch))",
        "tests/test_memory_in_flight.py::test_after_each_action_what_is_kept_is_what_the_plan_says[0]",
    ),
    Mutant(
        "stage-input-kept-on-the-device",
        "the input of a stage stays on the device until its backward, whatever its layers keep",
        RUNNER,
        "x = _Input.apply(self.inputs[key], x)",
        "self.inputs[key] = x = x.detach().requires_grad_()",
        "tests/test_memory_in_flight.py::test_the_input_of_a_stage_is_kept_only_if_a_layer_keeps_it",
    ),
    Mutant(
        "one-group-for-both-directions",
        "two ranks send to each other in one group: a receive delays a send",
        "parallel/mesh/topology.py",
        "if not {*other}.isdisjoint(link)}",
        "if not {*other}.isdisjoint(link) and other != link[::-1]}",
        "tests/test_topology.py::test_the_links_of_a_rank_are_in_as_many_groups",
    ),
    Mutant(
        "shared-table-summed-early",
        "a table of two stages is summed when half of its gradients have arrived",
        CHUNK_SUM,
        "num_gradients.get(info.parameter, 1)",
        "1",
        f"{ONCE}[1]",
    ),
    Mutant(
        "layer-of-another-stage-gathered-ahead",
        "the layer is gathered ahead that comes after the end of a stage",
        "parallel/zero/gatherer.py",
        "NOTHING if name in last else i + 1",
        "i + 1",
        f"{ONCE}[3]",
    ),
    Mutant(
        "first-number-of-a-rank",
        "the number that is not finite is looked for in the order of ranks",
        "parallel/engine/engine.py",
        "first.microbatch = detail.stage,",
        "first.microbatch = self.pipe.rank,",
        "tests/test_nonfinite.py::test_what_is_not_finite_is_named_on_every_rank_and_nothing_has_changed"
        "[pp2-interleaved-0-fp32-weight-1]",
    ),
    Mutant(
        "head-of-the-last-rank",
        "generation takes the rank's own output, and not that of the last stage",
        "parallel/engine/inference.py",
        "all_reduce(x if self.is_last else torch.zeros_like(x), self",
        "all_reduce(x if self.pipe.rank == self.pipe.size - 1 else torch.zeros_like(x), self",
        "tests/test_generate.py::test_texts_are_the_same_in_every_layout[pp2-zbv]",
    ),
)

PARTITION, PIPELINE_CONFIG = "parallel/pipeline/partition.py", "parallel/config/parallel.py"
REPORT_TESTS = "tests/test_pipeline_report.py"
STAGES_OF_A_RANK = (
    Mutant(
        "layers-of-the-first-stages",
        "a rank is given the layers of the model's first stages, not of its own",
        BUILD,
        "[specs[i] for i in stages[stage]] for stage in own}",
        "[specs[i] for i in layers] for stage, layers in zip(own, stages, strict=False)}",
        f"{REPORT_TESTS}::test_layers_are_given_to_stages_in_the_order_of_the_model",
    ),
    Mutant(
        "v-placed-as-a-loop",
        "the second stages of a V go down the ranks as the first ones do",
        PIPELINE_CONFIG,
        "return rank, 2 * self.size - 1 - rank",
        "return rank, self.size + rank",
        f"{REPORT_TESTS}::test_layers_are_given_to_stages_in_the_order_of_the_model",
    ),
    Mutant(
        "chunks-not-summed",
        "of several chunks only the slowest one counts",
        PARTITION,
        "pace = later + largest_of(costs[start:stop], num_ranks)",
        "pace = max(later, largest_of(costs[start:stop], num_ranks))",
        f"{REPORT_TESTS}::test_layers_are_divided_by_cost_as_the_chunks_of_the_schedule_need_it",
    ),
    Mutant(
        "stages-by-cost-of-one-chunk",
        "layers are divided as if each rank had one stage",
        BUILD,
        "partition(costs, num_stages, chunks)",
        "partition(costs, num_stages, 1)",
        f"{REPORT_TESTS}::test_layers_are_divided_by_cost_as_the_chunks_of_the_schedule_need_it",
    ),
    Mutant(
        "omitted-microbatches-keep-nothing",
        "where all microbatches are in flight at once, those that are not simulated are not counted",
        "parallel/plan/timeline.py",
        "(peak == self._num_simulated * whole)",
        "0",
        f"{REPORT_TESTS}::test_a_long_step_of_gpipe_keeps_all_microbatches_also_those_that_are_not_simulated",
    ),
    Mutant(
        "activations-freed-before-weight-gradients",
        "activations in flight are counted until the gradient of the input, though W needs factors of its products",
        "parallel/plan/timeline.py",
        "kept += later[stage] - sizes[stage]",
        "kept -= sizes[stage]",
        f"{REPORT_TESTS}::test_the_bytes_in_flight_are_the_most_at_any_time",
    ),
    Mutant(
        "one-stages-activations-for-all",
        "each forward is counted with the bytes of the rank's first stage",
        "parallel/plan/timeline.py",
        "                kept += sizes[stage]",
        "                kept += sizes[0]",
        f"{REPORT_TESTS}::test_the_bytes_in_flight_are_the_most_at_any_time",
    ),
)

SCHEDULE_FILE_TEST, TIMELINE_TEST = "tests/test_schedule_file.py", "tests/test_timeline.py"

TIMELINES = (
    Mutant(
        "cell-of-another-microbatch",
        "a cell of a schedule's file is read as the one of the microbatch beside it",
        "parallel/config/schedule_file.py",
        "Action(Op(found[2]), int(found[1]), int(found[3]))",
        "Action(Op(found[2]), int(found[1]), int(found[3]) ^ 1)",
        f"{SCHEDULE_FILE_TEST}::test_every_action_of_torchs_schedules_is_read_at_its_place",
    ),
    Mutant(
        "placement-of-file-ignored",
        "the stages of a schedule's file are taken to go around the ranks",
        "parallel/config/parallel.py",
        "return self.file.stages[rank]",
        "return tuple(range(rank, self.num_stages, self.size))",
        f"{SCHEDULE_FILE_TEST}::test_stages_and_chunks_come_from_the_file",
    ),
    Mutant(
        "schedule-file-not-compared",
        "ranks run schedules of other files that have one name",
        "parallel/engine/facts.py",
        "None if file is None else file.digest[:16]",
        "None",
        f"{SCHEDULE_FILE_TEST}::test_ranks_that_read_other_schedules_under_one_name_differ_in_their_facts",
    ),
    Mutant(
        "cycle-in-file-accepted",
        "ranks of a schedule's file that wait for each other are not refused",
        "parallel/plan/computes.py",
        "    checked_starts(plan, lambda compute: 1)",
        "    pass",
        f"{SCHEDULE_FILE_TEST}::test_what_is_no_schedule_is_refused_with_its_place_marked",
    ),
    Mutant(
        "input-gradient-drawn-as-weights",
        "I is drawn as W",
        "parallel/pipeline/drawing.py",
        'return f"{span.action.op.value}{self.chunk_of[span.action.stage]}"',
        "return f\"{span.action.op.value.replace('I', 'W')}{self.chunk_of[span.action.stage]}\"",
        f"{TIMELINE_TEST}::test_every_action_is_a_box_where_it_runs_and_no_two_overlap",
    ),
    Mutant(
        "bubble-of-the-step-for-that-of-ranks",
        "the bubble of the whole step is given as that between a rank's first and last action",
        "training/timelines.py",
        "{timeline.bubble_of_ranks:.1%}",
        "{timeline.bubble_fraction:.1%}",
        f"{TIMELINE_TEST}::test_the_bubble_is_counted_between_first_forward_and_last_action_and_over_the_whole_step",
    ),
    Mutant(
        "clock-set-the-wrong-way",
        "a rank whose clock is ahead adds the difference to its times",
        "parallel/engine/action_times.py",
        "time.perf_counter() - offset.seconds",
        "time.perf_counter() + offset.seconds",
        f"{TIMELINE_TEST}::test_a_clock_that_is_ahead_is_set_back",
    ),
    Mutant(
        "most-in-flight-of-all-ranks",
        "beside each rank is written the most in flight of any rank",
        "parallel/pipeline/drawing.py",
        'f"max {round(peak, 2):g}"',
        'f"max {self.most_in_flight}"',
        f"{TIMELINE_TEST}::test_what_is_in_flight_peaks_at_the_timelines_number_and_ends_at_none",
    ),
)

PLANS = (
    Mutant(
        "one-microbatch-too-many-in-flight",
        "a rank runs one more forward before its first backward",
        "parallel/pipeline/zero_bubble.py",
        "num_ranks - 1 - rank).halved",
        "num_ranks - rank).halved",
        f"{PLAN_PROPERTIES}::test_activations_in_flight_are_at_most_those_of_the_papers",
    ),
    Mutant(
        "weights-put-off-too-long",
        "rank r puts the gradients of weights off by one microbatch more",
        "parallel/pipeline/zero_bubble.py",
        "halved(steady=rank, cooldown=rank)",
        "halved(steady=rank + 1, cooldown=rank + 1)",
        f"{PLAN_PROPERTIES}::test_activations_in_flight_are_at_most_those_of_the_papers",
    ),
    Mutant(
        "weights-not-put-off",
        "each W follows its I at once, as in 1F1B",
        "parallel/pipeline/zero_bubble.py",
        "halved(steady=rank, cooldown=rank)",
        "halved(steady=0, cooldown=0)",
        f"{PLAN_PROPERTIES}::test_the_bubble_is_the_papers_formula",
    ),
    Mutant(
        "v-cools-down-with-weights",
        "in the cool-down of ZB-V each I is followed by its W, for which the ranks before it wait",
        "parallel/pipeline/zero_bubble.py",
        "halved(steady=0, cooldown=2 * rank)",
        "halved(steady=0, cooldown=0)",
        f"{PLAN_PROPERTIES}::test_the_bubble_is_the_papers_formula",
    ),
    Mutant(
        "short-v-waits",
        "of a short ZB-V no weight gradient fills a wait",
        "parallel/pipeline/zero_bubble.py",
        "return plan if planned == num_microbatches else weights_in_waits(plan, 2 * num_ranks)",
        "return plan",
        f"{PLAN_PROPERTIES}::test_the_bubble_is_the_papers_formula",
    ),
    Mutant(
        "weights-before-inputs",
        "a W runs before its I",
        "parallel/pipeline/orders.py",
        "                yield Action(Op.I, *backward)\n                waiting.append(backward)\n",
        "                waiting.append(backward)\n                yield Action(Op.W, *waiting.pop())\n"
        "                yield Action(Op.I, *backward)\n",
        SCHEDULE,
    ),
    Mutant(
        "stages-on-another-rank",
        "the second stage of a rank is its neighbour's",
        "parallel/pipeline/orders.py",
        "return PipelineConfig(size=num_ranks, schedule=schedule, chunks=chunks).stages",
        "stages = PipelineConfig(size=num_ranks, schedule=schedule, chunks=chunks).stages\n    return tuple((r, *stages[num_ranks - 1 - r][1:]) for r in range(num_ranks))",
        SCHEDULE,
    ),
    Mutant(
        "groups-one-shorter",
        "a rank of the interleaved schedule runs one forward less before its first backward",
        "parallel/pipeline/interleaved.py",
        "num_warmup = (chunks - 1) * len(groups[0]) +",
        "num_warmup = (chunks - 1) * (len(groups[0]) - 1) +",
        f"{PLAN_PROPERTIES}::test_activations_in_flight_are_at_most_those_of_the_papers",
    ),
    Mutant(
        "groups-of-the-remainder",
        "the microbatches that are left over are a short group of their own",
        "parallel/pipeline/interleaved.py",
        "starts = [group * length + min(group, num_longer) for group in range(num_groups + 1)]",
        "starts = [*range(0, num_microbatches, num_ranks), num_microbatches]",
        f"{PLAN_PROPERTIES}::test_the_bubble_is_the_papers_formula",
    ),
    Mutant(
        "messages-in-the-order-of-ranks",
        "messages are sent in the order of ranks, not of time",
        "parallel/pipeline/transfers.py",
        "key=lambda event: event[:3]",
        "key=lambda event: (event[2], *event[:2])",
        SCHEDULE,
    ),
    Mutant(
        "received-last",
        "a receive is posted one compute after its message was sent",
        "parallel/pipeline/transfers.py",
        "(end, 0, rank, message)",
        "(end + 1, 2, rank, message)",
        SCHEDULE,
    ),
    Mutant(
        "order-at-the-receiver-unproved",
        "messages that cross are not refused",
        "parallel/plan/validate.py",
        "            if first != second:",
        "            if False:",
        "tests/test_schedule.py::test_messages_in_another_order_at_each_end_are_refused",
    ),
    Mutant(
        "weights-uncounted",
        "a plan that leaves a weight gradient out is not refused",
        "parallel/plan/computes.py",
        "1 if compute.op is not Op.W else compute in halves",
        "1 if compute.op is not Op.W else len(found)",
        "tests/test_schedule.py::test_a_weight_gradient_runs_once_after_its_input_gradient",
    ),
    Mutant(
        "kept-until-the-input-gradient",
        "activations count as free after I, though W needs them",
        "parallel/plan/timeline.py",
        "later = sizes if for_weights is None else for_weights",
        "later = [0] * len(sizes)",
        f"{PLAN_PROPERTIES}::test_activations_in_flight_are_at_most_those_of_the_papers",
    ),
    Mutant(
        "mark-of-another-rank",
        "the place that is marked is one compute too late",
        "parallel/plan/grid.py",
        "if position >= marked[rank]",
        "if position > marked[rank]",
        "tests/test_schedule.py::test_a_refused_plan_is_printed_with_the_place_marked",
    ),
)

LOSS_KERNELS = "parallel/ops/kernels/cross_entropy_triton.py"
LOSS_KERNELS_TEST = "tests/test_kernels.py::test_interpreted_kernels_are_as_exact_as_their_references[loss]"
LOOKUP_KERNELS = "parallel/ops/kernels/lookup_triton.py"

KERNELS_OF_THE_LOSS = (
    Mutant(
        "loss-kernel-writes-before-it-reads",
        "the gradient is written to the half of its row that is still to be read",
        LOSS_KERNELS,
        "[..., -columns:]",
        "[..., :columns]",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "loss-kernel-keeps-a-total",
        "a sum of exponentials is not rescaled when the maximum grows",
        LOSS_KERNELS,
        "total * _exp(largest - larger) + ",
        "total + ",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "loss-kernel-normalizes-padding",
        "the vocabulary's padding counts as logits",
        LOSS_KERNELS,
        "tl.where(at < entries, tile,",
        "tl.where(at < columns, tile,",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "loss-kernel-gradient-of-uncounted-labels",
        "a token whose label is not counted has a gradient",
        LOSS_KERNELS,
        "weight = counted * scale",
        "weight = scale",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "loss-kernel-tiles-in-registers-with-padding",
        "the first tile in registers that has padding is taken for one that has none",
        LOSS_KERNELS,
        "columns, entries, i < WHOLE,",
        "columns, entries, i <= WHOLE,",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "loss-kernel-forgets-a-maximum",
        "exponentials in registers are multiplied as if the maximum of all tiles had been subtracted in them",
        LOSS_KERNELS,
        "_exp(largest_kept - top)",
        "_exp(largest - top)",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "loss-kernel-change-unseen",
        "a second backward through the loss uses gradients that the first has multiplied",
        "parallel/ops/kernels/cross_entropy.py",
        "    increment_version(x)\n",
        "",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "lookup-kernel-loses-what-goes-on",
        "of a row whose tokens go on in other programs, only the first program's are summed",
        LOOKUP_KERNELS,
        "range(program + 1, end)",
        "range(program + 1, program + 1)",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "lookup-kernel-padding-row-has-a-gradient",
        "the row padding_idx gets a gradient through the lookup",
        LOOKUP_KERNELS,
        "is_row & (index != padding)",
        "is_row",
        LOSS_KERNELS_TEST,
    ),
)

UPDATE_KERNEL, SUMS_KERNEL = (f"parallel/ops/kernels/{name}_triton.py" for name in ("adamw", "sums"))
INTERPRETED = "tests/test_kernels.py::test_interpreted_kernels_are_as_exact_as_their_references[{}]"

UPDATES_IN_ONE_PASS = (
    Mutant(
        "kernel-updates-what-is-left-out",
        "the kernel updates although the step is not finite",
        UPDATE_KERNEL,
        "    if tl.load(found_inf) != 1.0:\n",
        "    if tl.load(found_inf) != 2.0:\n",
        INTERPRETED.format("update"),
    ),
    Mutant(
        "cast-of-infinity-saturates",
        "an infinite number becomes the largest of 8 bits, so nobody notices it",
        "parallel/ops/kernels/eight_bits_triton.py",
        "    y = x * scale + x * 0.0  # ∞ · 0 is NaN\n",
        "    y = x * scale\n",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "cast-loses-nan",
        "the largest magnitude of a tensor with NaN is a NaN, which a maximum over ranks may lose",
        "parallel/ops/kernels/eight_bits_triton.py",
        "    largest = tl.minimum(bits, 0x7F800000).to(tl.float32, bitcast=True)\n",
        "    largest = bits.to(tl.float32, bitcast=True)\n",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "kernel-without-noise-of-rows",
        "the kernel rounds all rows of a matrix with one noise",
        UPDATE_KERNEL,
        "((row + below) & (TABLE - 1))",
        "(row & (TABLE - 1))",
        INTERPRETED.format("update"),
    ),
    Mutant(
        "kernel-of-many-mixes-moments",
        "small chunks are rounded with the first moment's noise in the second",
        UPDATE_KERNEL,
        "tl.load(row + 12)",
        "tl.load(row + 10)",
        INTERPRETED.format("update"),
    ),
    Mutant(
        "kernel-forgets-the-bias-correction",
        "the kernel does not divide the second moment by its bias correction",
        UPDATE_KERNEL,
        "tl.fma(tl.sqrt_rn(v), root, eps)",
        "(tl.sqrt_rn(v) + eps)",
        INTERPRETED.format("update"),
    ),
    Mutant(
        "squares-of-the-first-blocks",
        "a program adds the first of its blocks again and again",
        SUMS_KERNEL,
        "first = start + k * BLOCK",
        "first = start + 0 * k * BLOCK",
        INTERPRETED.format("update"),
    ),
    Mutant(
        "squares-in-another-tensors-place",
        "the sum of a tensor is found in the place of another one",
        SUMS_KERNEL,
        "partial + out * parts + part",
        "partial + tl.program_id(1) * parts + part",
        INTERPRETED.format("update"),
    ),
    Mutant(
        "gathered-before-its-update",
        "a forward takes the parameters of a layer that the host is still updating",
        "parallel/storage/transfer.py",
        "                after.synchronize()\n",
        "                pass\n",
        "tests/test_shared_update.py::"
        "test_a_forward_that_does_not_wait_for_an_update_finds_what_it_has_written[0.5-fp32]",
    ),
    Mutant(
        "read-before-its-update",
        "states are saved while the host is still updating them",
        "parallel/chunk/chunk.py",
        "        self.parameters.written.synchronize()\n",
        "",
        "tests/test_shared_update.py::test_a_forward_begins_while_the_host_updates_later_layers[0]",
    ),
    Mutant(
        "root-updated-by-the-host",
        "every forward waits for the host, which updates a part of the root",
        "parallel/optim/shared_update.py",
        "key=lambda part: part.chunk.waits_when_used",
        "key=lambda part: False",
        "tests/test_shared_update.py::test_a_forward_begins_while_the_host_updates_later_layers[1]",
    ),
)

FP8_TEST, FP8_MATMUL = "tests/test_fp8_matmul.py", "parallel/tensor/fp8_matmul.py"
SAME_NUMBERS = f"{FP8_TEST}::test_every_layout_multiplies_the_same_8_bit_numbers"

EIGHT_BITS = (
    Mutant(
        "columns-gathered-along-the-wrong-dim",
        "the parts of W follow each other along its rows where dx is computed in 8 bits",
        FP8_MATMUL,
        "return start_all_gather(w.T, 0, self.gather_w).then(lambda columns: columns.T)",
        "return start_all_gather(w.T, 1, self.gather_w).then(lambda columns: columns.reshape(-1, len(w)).T)",
        f"{SAME_NUMBERS}[gather_x=(-1, 'col') gather_w=row]",
    ),
    Mutant(
        "transpose-of-own-tokens-alone",
        "dW in 8 bits is computed from this rank's part of dy, where all of dy was gathered",
        FP8_MATMUL,
        "if is_deferred or around.scatter_y[1].size > 1:",
        "if is_deferred:",
        f"{SAME_NUMBERS}[scatter_y=(1, 'col')]",
    ),
    Mutant(
        "scale-of-a-gradient-mistaken",
        "dx in 8 bits is divided by the scale of x and not of dy",
        FP8_MATMUL,
        "Scaled(dy.flatten(0, -2), self.scales.dy.inverse)",
        "Scaled(dy.flatten(0, -2), self.scales.x.inverse)",
        f"{SAME_NUMBERS}[alone]",
    ),
    Mutant(
        "weight-copy-not-cleared",
        "linears go on to multiply by the 8-bit weights of the first step",
        FP8_MATMUL,
        "        self._rows = self._columns = None",
        "        self._columns = None",
        f"{FP8_TEST}::test_a_weight_is_cast_once_until_its_copy_is_cleared",
    ),
    Mutant(
        "nan-not-recorded",
        "a maximum over ranks drops the NaN of a tensor, since it is recorded as it is",
        "parallel/ops/fp8.py",
        "return torch.where(amax.isfinite(), amax, torch.inf)",
        "return amax",
        f"{FP8_TEST}::test_what_is_not_finite_is_recorded_as_infinity_and_reaches_the_product",
    ),
)

NORM_KERNELS = "parallel/ops/kernels/norm_{}_triton.py"

NORMS_IN_ONE_PASS = (
    Mutant(
        "norm-kernel-mean-of-padding",
        "the variance counts what lies between the end of a row and the next power of 2",
        NORM_KERNELS.format("forward"),
        "tl.where(is_column[None, :], row - mean[:, None], 0.0)",
        "row - mean[:, None]",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "norm-kernel-drops-other-elements",
        "the kernel's mask of dropout is not that of the reference, and differs between layouts",
        NORM_KERNELS.format("rows"),
        "((z >> 27) & 0x1FFFFFFFFF)",
        "((z >> 26) & 0x1FFFFFFFFF)",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "norm-kernel-gradient-of-what-was-dropped",
        "elements that were dropped have a gradient",
        NORM_KERNELS.format("backward"),
        "0.0, gradient * tl.cast(scale, tl.float32))",
        "gradient, gradient * tl.cast(scale, tl.float32))",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "norm-kernel-forgets-the-residual-gradient",
        "the gradient of the sum itself is lost where a norm follows",
        NORM_KERNELS.format("backward"),
        "gradient += dnormal * deviation[:, None]",
        "gradient = dnormal * deviation[:, None]",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "norm-kernel-adds-up-some-programs",
        "the gradients of vectors are those of the first programs' rows",
        NORM_KERNELS.format("backward"),
        "(slots < programs)[:, None] & is_column[None, :]",
        "(slots < programs - 1)[:, None] & is_column[None, :]",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "bias-left-to-nobody",
        "the bias of a half's last linear is added neither by the linear nor by the kernel",
        RESIDUAL,
        "return Addend(linear.product(x), linear.flat_bias)",
        "return Addend(linear.product(x))",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "last-add-saves",
        "a block's last addition saves a tensor, so that a recomputation computes the last product again",
        RESIDUAL,
        "        ctx.mask, ctx.wants = mask, (None,",
        "        ctx.save_for_backward(y)\n        ctx.mask, ctx.wants = mask, (None,",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "norm-kernel-row-sums-of-a-part",
        "where ranks divide rows, the kernel's dx has the sums of each rank's own part",
        RESIDUAL,
        "sums, wants = ctx.dim.sum(local)",
        "sums, wants = local",
        "tests/test_residual.py::test_the_kernels_of_a_split_norm_equal_torch_on_whole_rows",
    ),
)

POINTWISE = (
    Mutant(
        "turned-the-other-way-in-a-kernel",
        "the kernel turns q and k by the negative angle",
        "parallel/ops/kernels/heads_triton.py",
        "return first * c - second * s, second * c + first * s",
        "return first * c + second * s, second * c - first * s",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "q-heads-of-another-group",
        "the kernel counts the q heads of a group from the first group on",
        "parallel/ops/kernels/heads_triton.py",
        "group * GROUP + place, group)",
        "place, group)",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "sum-of-what-came-in",
        "the gradient of a bias is summed before the activation's slope",
        "parallel/ops/kernels/activation_triton.py",
        "            total += dx",
        "            total += dy",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "up-gets-the-gates-gradient",
        "the gradient of the gate lacks what it multiplies",
        "parallel/ops/kernels/activation_triton.py",
        "dy * up * _slope(gate, KIND)",
        "dy * _slope(gate, KIND)",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "bias-summed-twice",
        "the linear sums the gradient of a bias that its caller sums",
        "parallel/tensor/layers.py",
        "None if self.flat_bias is None else self.flat_bias.detach()",
        "self.flat_bias",
        INTERPRETED.format("block"),
    ),
    Mutant(
        "gradient-of-the-last-vector-alone",
        "microbatches replace each other's gradients of vectors",
        ACCUMULATOR,
        "torch._foreach_add_([views[i] for i in later], addends)",
        "torch._foreach_copy_([views[i] for i in later], addends)",
        trains("single"),
    ),
)

SCALING, SCALES = "parallel/tensor/scaling.py", "parallel/engine/scales.py"
SCALING_TEST, FP8_LAYOUTS = "tests/test_scaling.py", "tests/test_fp8_layouts.py"
LARGEST_OF_ALL = f"{FP8_LAYOUTS}::test_all_ranks_have_the_largest_magnitudes_of_whole_tensors[1d2, dp2, zero3]"
SCALES_OF_LINEARS = (
    Mutant(
        "maxima-of-a-replica-alone",
        "largest magnitudes are not brought together over replicas",
        SCALES,
        'if name != "pipe"]',
        'if name not in ("pipe", "data")]',
        LARGEST_OF_ALL,
    ),
    Mutant(
        "maxima-of-a-part-of-a-tensor",
        "largest magnitudes are not brought together over the axis t",
        SCALES,
        'if name != "pipe"]',
        'if name not in ("pipe", "t")]',
        LARGEST_OF_ALL,
    ),
    Mutant(
        "maxima-of-an-evaluation",
        "an evaluation records largest magnitudes as a step does",
        "parallel/engine/engine.py",
        'explained(lambda: "an evaluation"), self.passes.casting(records=False):',
        'explained(lambda: "an evaluation"), self.passes.casting(records=True):',
        f"{FP8_LAYOUTS}::test_an_evaluation_uses_the_scales_and_records_nothing_and_a_step_left_out_does_not_count",
    ),
    Mutant(
        "a-window-of-one-step",
        "scales are made of the last step alone",
        SCALING,
        "largest = self.history.amax(0)",
        "largest = self.history[-1]",
        f"{SCALING_TEST}::test_a_scale_is_made_of_the_largest_magnitude_of_a_window_of_steps",
    ),
    Mutant(
        "the-history-of-a-step-that-is-left-out",
        "a step that updates nothing moves the history",
        SCALING,
        "torch.where(found_inf > 0, self.history, moved)",
        "moved",
        f"{SCALING_TEST}::test_a_step_that_is_left_out_leaves_history_and_scales_as_they_were",
    ),
    Mutant(
        "a-nan-that-a-maximum-loses",
        "a NaN is not made an infinity before the maximum over ranks",
        SCALING,
        "self.amax.nan_to_num(nan=torch.inf, posinf=torch.inf)",
        "self.amax.nan_to_num(nan=0.0, posinf=torch.inf)",
        f"{SCALING_TEST}::test_maxima_are_those_of_all_ranks_that_hold_a_part",
    ),
    Mutant(
        "copies-of-the-weights-that-were",
        "weights are cast in the first step alone",
        SCALING,
        "            copy.clear()",
        "            pass",
        f"{SCALING_TEST}::test_copies_of_weights_last_for_a_step_or_an_evaluation_and_only_a_step_records",
    ),
    Mutant(
        "a-scale-for-each-slice",
        "in stage 3 each rank scales its slice by the largest magnitude in it",
        "parallel/chunk/eight_bits.py",
        "cast(segment.data, scale.scale, E4M3, scale.amax)",
        "cast(segment.data, torch.exp2((224 / segment.data.abs().amax().float()).log2().floor()), E4M3)",
        f"{FP8_LAYOUTS}::test_a_slice_is_cast_by_the_scale_of_the_whole_weight",
    ),
    Mutant(
        "a-slice-of-the-step-before",
        "in stage 3 slices are cast in the first step alone",
        "parallel/chunk/eight_bits.py",
        "        self.own = None",
        "        pass",
        f"{FP8_LAYOUTS}::test_stage_3_changes_no_bit_nor_do_recomputed_blocks_on_the_host",
    ),
    Mutant(
        "scales-that-are-not-saved",
        "a checkpoint has no history of the scales",
        "parallel/engine/state.py",
        'values |= {} if self.scaling is None else {"scaling": histories_of_all(self.scaling, self.mesh)}',
        "values |= {}",
        f"{FP8_LAYOUTS}::test_a_resumed_run_goes_on_to_the_bit",
    ),
)

HOST = "tests/test_host_work.py"

HOST_WORK = (
    Mutant(
        "transposed-parameter-unseen",
        "a parameter that is transposed in its own memory stays what it is for the engine",
        "parallel/chunk/parameters.py",
        "            return [(x.data_ptr(), x.shape, x.is_contiguous()) for x in self._places] == self._views\n",
        "            return [x.data_ptr() for x in self._places] == [view[0] for view in self._views]\n",
        f"{HOST}::test_a_parameter_that_is_transposed_in_its_own_memory_has_been_written",
    ),
    Mutant(
        "renamed-parameter-unseen",
        "only the objects in a module tree are compared, and not their names",
        "parallel/modules/parameters.py",
        "    return [*chain.from_iterable(named)], [*map",
        "    return [], [*map",
        f"{HOST}::test_a_change_of_the_tree_is_refused[another name]",
    ),
    Mutant(
        "moved-chunk-unwatched",
        "writes into a chunk that a plan has moved to the device are not noticed in the next step",
        "parallel/chunk/writes.py",
        "        if any(_stays_whole(chunk) and chunk not in noted for chunk in self._chunks):\n",
        "        if False:\n",
        f"{HOST}::test_a_chunk_that_has_been_moved_to_the_device_is_watched_from_then_on",
    ),
    Mutant(
        "gradient-placed-twice",
        "compiled code overwrites the sum of a weight's gradients with that of a further microbatch",
        "parallel/chunk/accumulator.py",
        "        if self.dtype not in dtypes or self.arrivals[i] or i in self._placed:\n",
        "        if self.dtype not in dtypes:\n",
        "tests/test_compile.py::test_compiled_with_dropout_equals_eager",
    ),
)

ATTACKED_KERNELS = (
    Mutant(
        "8-bit-weight-available",
        "a hook reads NaN in the place of a weight that was gathered in 8 bits",
        "parallel/zero/gatherer.py",
        "        if chunk.parameters.is_in_8_bits:\n",
        "        if False:\n",
        "tests/test_fp8_layouts.py::test_whatever_uses_a_weight_that_was_gathered_in_8_bits_is_refused",
    ),
    Mutant(
        "noise-tables-on-a-stream",
        "the device computes half of the tables of noise in the stream that asks for them first",
        "parallel/optim/rounding.py",
        "    return order.to(device), (order % 2**16).to(device)\n",
        "    return order.to(device), order.to(device) % 2**16\n",
        "tests/test_rounding.py::test_the_device_computes_no_tables_in_the_stream_that_asks_for_them_first",
    ),
    Mutant(
        "host-buffer-freed-early",
        "a buffer of gradients on the host is freed while the last update may read it",
        "parallel/chunk/chunk.py",
        "        if before is not None and before is not self.gradient.host_buffer:\n",
        "        if False:\n",
        "tests/test_shared_update.py::test_a_host_buffer_is_freed_after_the_update_that_reads_it[all]",
    ),
)

CAPTURED = "tests/test_captured_step.py"

CAPTURED_STEPS = (
    Mutant(
        "replayed-batch-stale",
        "a graph is replayed with the batch of the step in which it was captured",
        "parallel/engine/captured_step.py",
        "        batch.copy_to(self.batch)\n",
        "        assert batch.form == self.batch.form\n",
        f"{CAPTURED}::test_replayed_steps_are_the_steps_that_run_as_usual[dropout]",
    ),
    Mutant(
        "replayed-state-incomplete",
        "after a replay no parameter of a chunk has been seen to get a gradient",
        "parallel/optim/chunk_sum.py",
        "        self.seen, self.was_launched = list(result.seen), True\n",
        "        self.was_launched = True\n",
        f"{CAPTURED}::test_a_replay_leaves_the_engine_as_a_step_that_runs_as_usual_does[fp8]",
    ),
    Mutant(
        "replayed-tables-freed",
        "a graph reads tables of positions that the next batch of another length frees",
        "models/rotary.py",
        "        owner = batch if is_capturing(like.device) else None\n",
        "        owner = None\n",
        f"{CAPTURED}::test_a_graph_reads_nothing_that_could_be_freed[llama]",
    ),
    Mutant(
        "replayed-factor-stale",
        "a graph is replayed for another number of labels than it was captured with",
        "parallel/pipeline/microbatch.py",
        "        return *shapes, self.scale, documents\n",
        "        return *shapes, documents\n",
        f"{CAPTURED}::test_steps_with_other_numbers_of_labels_are_not_captured",
    ),
    Mutant(
        "replayed-past-a-hook",
        "a hook of a module is not called once the step is a graph",
        "parallel/engine/step_code.py",
        "            or any(self._hooks)\n",
        "",
        f"{CAPTURED}::test_a_hook_is_called_in_each_step[a_forward_hook]",
    ),
    Mutant(
        "replayed-past-another-module",
        "a graph is replayed though a module has taken the place of another one",
        "parallel/engine/step_code.py",
        "        if len(now) != len(before) or not all(map(is_, now, before)) or _places_of",
        "        if len(now) != len(before) or _places_of",
        f"{CAPTURED}::test_what_is_changed_counts_from_the_next_step_on[a_module]",
    ),
    Mutant(
        "replayed-before-new-values",
        "a graph that was launched before a parameter's new values were taken over counts as the step",
        "parallel/engine/engine.py",
        "                self.captured_step.discard_early()\n",
        "                pass\n",
        f"{CAPTURED}::test_what_is_found_after_a_graph_was_launched_has_its_work_done_again[fp32]",
    ),
    Mutant(
        "replayed-in-vain",
        "a graph is launched early also after steps that were not replayed",
        "parallel/engine/captured_step.py",
        "        return self._was_replayed and not self._is_observed\n",
        "        return not self._is_observed\n",
        f"{CAPTURED}::test_a_hook_is_called_in_each_step[a_forward_hook]",
    ),
    Mutant(
        "looked-beside-another-step",
        "a graph that was launched for a step that failed is taken for that of the next step",
        "parallel/engine/engine.py",
        "            self.stopwatch.forget()\n            self.captured_step.discard_early()\n",
        "            self.stopwatch.forget()\n",
        f"{CAPTURED}::test_what_was_launched_for_a_step_that_was_refused_is_not_that_of_a_later_one",
    ),
    Mutant(
        "counted-in-vain",
        "a graph is launched early though it writes into a buffer of a module",
        "parallel/engine/captured_step.py",
        "        return not (self.writes_more or self.graph.draws)\n",
        "        return not self.graph.draws\n",
        f"{CAPTURED}::test_a_graph_that_does_more_than_compute_is_not_launched_in_vain[_Counting]",
    ),
    Mutant(
        "written-beside",
        "work beside a graph may read what has been written after it",
        "parallel/ops/captured.py",
        "            current.wait_stream(self._stream)\n",
        "            pass\n",
        "tests/test_captured.py::test_work_beside_a_graph_is_between_what_comes_before_the_graph_and_what_comes_after_it",
    ),
    Mutant(
        "failed-step-timed",
        "the seconds of a step that fails, and those until the next one, count in the next one",
        "parallel/engine/engine.py",
        "            self.stopwatch.forget()\n",
        "",
        f"{CAPTURED}::test_the_seconds_of_a_step_that_fails_are_those_of_no_later_one[early]",
    ),
    Mutant(
        "graph-without-room",
        "a graph keeps the memory that an evaluation may need",
        "parallel/engine/captured_step.py",
        "    return use.free + kept_by_torch >= graph.num_bytes\n",
        "    return use.free + kept_by_torch >= 0\n",
        f"{CAPTURED}::test_other_work_gets_the_memory_of_a_graph_if_little_is_free",
    ),
)

MENDED = (
    Mutant(
        "frozen-part-trained",
        "a parameter of a split model that is frozen between two steps moves on by its momentum",
        "parallel/engine/engine.py",
        'problem_of_frozen(self.part.infos) if self.writes.is_on else ""',
        '""',
        "tests/test_host_work.py::test_a_frozen_parameter_of_a_split_model_is_refused[fp32-True]",
    ),
)

TABLE_GRADIENTS = "tests/test_table_gradients.py"

TABLES_IN_PLACE = (
    Mutant(
        "tied-table-counted-once",
        "a chunk is summed over ranks when the head has brought its gradient, before the lookup has",
        "parallel/pipeline/part.py",
        "Counter(x for layer in self.layers for x in layer.parameters())",
        "Counter(self.parameters())",
        OVERLAP,
    ),
    Mutant(
        "room-in-a-later-round",
        "a gradient is computed where those of microbatches before are still to be added",
        CHUNK_SUM,
        "return None if self.was_launched else self.chunk.gradient.accumulator.room(i, dtypes)",
        "return self.chunk.gradient.accumulator.room(i, dtypes)",
        f"{TABLE_GRADIENTS}::test_a_place_in_the_buffer_is_given_to_the_first_gradient_of_a_step_alone",
    ),
    Mutant(
        "room-for-a-gradient-that-comes-later",
        "a gradient is computed where that of another microbatch arrives before it, by a schedule of a file",
        "parallel/plan/plan.py",
        "first.get((stage, True)) == microbatch",
        "first.get((stage, True)) is not None",
        "tests/test_schedule_file.py::test_the_first_backward_of_a_file_may_be_that_of_a_later_microbatch",
    ),
    Mutant(
        "rows-replace-the-sum",
        "the rows that a lookup brings replace those of the head, or of the microbatches before",
        LOOKUP_KERNELS,
        "    if not IS_FIRST:\n",
        "    if False:\n",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "rows-of-fresh-memory",
        "rows of a table that no token has looked up get the gradient that their memory had before",
        "parallel/ops/kernels/lookup.py",
        "        out.zero_()\n",
        "        pass\n",
        LOSS_KERNELS_TEST,
    ),
    Mutant(
        "frozen-table-trained",
        "the head brings a gradient of a table that is frozen",
        "parallel/tensor/loss.py",
        "receiver if e.requires_grad else None",
        "receiver",
        f"{TABLE_GRADIENTS}::test_a_frozen_table_gets_no_gradient",
    ),
    Mutant(
        "slices-added-narrow",
        "the head adds the products of its token slices in bf16",
        "parallel/tensor/loss.py",
        "room = receiver.room((dtype, wide))",
        "room = receiver.room((x.dtype, wide))",
        f"{TABLE_GRADIENTS}::test_one_microbatch_leaves_the_bits_that_autograd_returns[dtype1-4]",
    ),
)

SIZES_IN_8_BITS = (
    Mutant(
        "the-size-of-a-part-of-a-weight",
        "a linear is in 8 bits by the elements of its weight that a rank has",
        SCALES,
        'prod(x.layouts["weight"].shape)',
        "x.weight.numel()",
        f"{FP8_LAYOUTS}::test_a_linear_is_in_8_bits_by_the_size_of_its_whole_weight_in_every_layout[3d8]",
    ),
    Mutant(
        "slices-of-a-mixed-chunk",
        "in stage 3 slices in 8 bits are foreseen of a block that is gathered in bf16",
        "training/preview.py",
        "elif len(large) == len(spec.infos):",
        "else:",
        f"{FP8_LAYOUTS}::test_copies_of_weights_are_foreseen",
    ),
    Mutant(
        "copies-that-no-plan-counts",
        "weights that a plan of the placement moves to the device are kept in 8 bits beside",
        SCALES,
        "is_kept = keeps and not chunk.spec.is_partitioned",
        "is_kept = not chunk.spec.is_partitioned",
        f"{FP8_LAYOUTS}::test_copies_of_weights_are_kept_only_where_no_plan_places_chunks",
    ),
    Mutant(
        "small-linears-foreseen-in-8-bits",
        "the inputs of linears that stay in bf16 are foreseen in 8 bits",
        "models/kept.py",
        "in linears_in_8_bits(shape, config.train):",
        'in block_linears(shape) if config.train.precision == "fp8" else []:',
        f"{FP8_LAYOUTS}::test_a_block_keeps_the_bytes_in_8_bits_that_are_foreseen[opt-300]",
    ),
    Mutant(
        "scales-of-weights-without-a-history",
        "a run goes on with the scales that a checkpoint has, also if weights have none in it",
        SCALES,
        "    scaling.restore({} if missing else saved)\n",
        "    scaling.restore(saved and dict.fromkeys(missing, [*saved.values()][0]) | dict(saved))\n",
        f"{FP8_LAYOUTS}::test_scales_go_on_only_if_all_linears_have_a_history",
    ),
)

LAUNCHES, LAUNCHED_TESTS = "parallel/optim/launch_queue.py", "tests/test_shared_update.py"

LAUNCHED_LATER = (
    Mutant(
        "update-launched-at-once",
        "the copies of a whole update are before those of the next forward in the device's queue",
        "parallel/optim/shared_update.py",
        "queue.launch(len(from_disk) + sum(",
        "queue.launch(len(streamed) + sum(",
        f"{LAUNCHED_TESTS}::test_parts_are_launched_when_their_layer_is_gathered_and_a_few_ahead",
    ),
    Mutant(
        "nothing-launched-ahead",
        "the bus waits while a layer waits for its update",
        LAUNCHES,
        "min(num + AHEAD, self._num)",
        "min(num, self._num)",
        f"{LAUNCHED_TESTS}::test_parts_are_launched_when_their_layer_is_gathered_and_a_few_ahead",
    ),
    Mutant(
        "first-part-for-all",
        "a layer is read when the first part of it has been updated",
        LAUNCHES,
        "for i, part in enumerate(parts)}",
        "for i, part in reversed(list(enumerate(parts)))}",
        f"{LAUNCHED_TESTS}::test_whoever_reads_a_layer_has_its_update_launched[a settled chunk]",
    ),
    Mutant(
        "next-update-before-the-last",
        "an update begins while parts of the one before it have not been launched",
        "parallel/optim/shared_update.py",
        "        self._queue.launch_all()\n        self._thread",
        "        self._thread",
        f"{LAUNCHED_TESTS}::test_whoever_reads_a_layer_has_its_update_launched[the next update]",
    ),
    Mutant(
        "times-of-a-part-of-an-update",
        "a plan is made from the time of the parts that have been launched",
        "parallel/optim/shared_update.py",
        "            queue.launch_all()\n",
        "            times.extend([self._clock.now()] * (3 - len(times)))\n",
        f"{LAUNCHED_TESTS}::test_the_times_of_an_update_are_those_of_all_its_parts",
    ),
    Mutant(
        "check-leaves-out-the-disk",
        "a check says nothing of a folder for states that cannot be written",
        "training/preflight.py",
        "        partial(check_nvme_dir, config),\n",
        "",
        "tests/test_launch.py::test_a_check_says_which_folders_of_a_config_cannot_be_written",
    ),
    Mutant(
        "update-waits-for-the-forward",
        "an update that is launched beside a forward waits for it",
        "parallel/optim/shared_update.py",
        "        with torch.cuda.stream(self._beside):\n",
        "        self._wait_for_computation(())\n        with torch.cuda.stream(self._beside):\n",
        f"{LAUNCHED_TESTS}::test_a_part_that_is_launched_later_waits_for_the_computation_of_its_own_step",
    ),
    Mutant(
        "left-out-step-writes-parameters",
        "parameters on the host get the memory of another part in a step that is left out",
        "parallel/optim/streaming.py",
        "                on_device.own.copy_(on_device.states[0])",
        "                pass",
        f"{LAUNCHED_TESTS}::test_parameters_are_the_rounded_masters_after_an_update_that_changes_nothing",
    ),
    Mutant(
        "layer-on-the-device-waits-for-nothing",
        "a forward uses parameters on the device before their update, which is launched when it waits",
        GATHERER,
        "            chunk.wait_for_update()\n",
        "            pass\n",
        f"{LAUNCHED_TESTS}::test_an_engine_waits_for_each_layer_that_it_uses",
    ),
    Mutant(
        "updated-after-it-is-read",
        "parameters on the device that a user reads after a step are those from before it",
        CHUNK,
        "self.is_private and self.spec.shard_axis.size == 1",
        "self.spec.shard_axis.size == 1",
        f"{LAUNCHED_TESTS}::test_a_layer_on_the_device_waits_for_its_update_when_it_is_used",
    ),
    Mutant(
        "small-parts-left-to-the-host",
        "a forward begins with layers of which the host updates small parts",
        "parallel/optim/shared_update.py",
        "            if _is_movable(part.chunk):\n",
        "            if _is_movable(part.chunk) and len(part.gradient) <= room:\n",
        f"{LAUNCHED_TESTS}::test_the_host_updates_the_last_parts_without_gaps",
    ),
)

HOST_SHARE = (
    Mutant(
        "share-of-the-profiled-step",
        "the host gets the share of an update in which it could update all elements, though the plan leaves it fewer",
        "parallel/optim/shared_update.py",
        "        return cls(disk, host, movable)\n",
        "        return cls(disk, host, host)\n",
        f"{MANAGER_TESTS}::test_the_host_has_the_share_with_which_neither_side_waits_under_the_plan",
    ),
)

HOST_PATH = (
    Mutant(
        "run-resumes-without-scales",
        "a run that resumes leaves the scales of 8 bits in its checkpoint",
        "training/run.py",
        "        engine.restore_scales(found.index)\n",
        "",
        "tests/test_loop.py::test_a_resumed_run_multiplies_8_bits_by_the_scales_that_it_had",
    ),
    Mutant(
        "waits-in-data",
        "a host that waits for its device counts as reading data, once it has read the next batch",
        "parallel/engine/engine.py",
        '                self.stopwatch.mark("update")  # a device',
        '                # self.stopwatch.mark("update")  # a device',
        f"{HOST}::test_the_batch_of_the_next_step_is_read_while_the_device_computes",
    ),
    Mutant(
        "batch-of-another-step",
        "a step trains on whichever batch was read ahead",
        "training/batch_ahead.py",
        "ahead is not None and ahead[0] == first",
        "ahead is not None",
        f"{HOST}::test_a_batch_that_cannot_be_read_ahead_is_read_by_the_step_that_needs_it",
    ),
    Mutant(
        "moved-parameter-unseen",
        "parameters that could not be taken back into their buffer count as being there",
        "parallel/chunk/parameters.py",
        "                torch.autograd.graph.increment_version(parameter)\n        return False\n",
        "                torch.autograd.graph.increment_version(parameter)\n        return True\n",
        f"{WRITTEN}::test_a_split_model_whose_parameters_are_not_the_engines_any_more_is_refused",
    ),
    Mutant(
        "batch-copied-by-tensor",
        "a batch goes to its device microbatch by microbatch",
        "parallel/pipeline/staged.py",
        "        other.memory.copy_(self.memory, non_blocking=True)\n",
        "        for x, y in zip(other.microbatches, self.microbatches, strict=True):\n"
        "            torch._foreach_copy_(x.tensors, y.tensors)\n",
        f"{HOST}::test_a_batch_goes_to_a_device_by_one_copy[1]",
    ),
)

BATCHES = "tests/test_batches.py"
NOT_OF_A_STEP = f"{CAPTURED}::test_the_time_between_two_steps_is_that_of_neither_though_the_next_is_launched"
COMES_BETWEEN = f"{CAPTURED}::test_what_comes_between_two_steps_counts_though_the_next_is_launched"
LAUNCHED_BEFORE = f"{CAPTURED}::test_the_next_step_is_launched_before_this_one_returns_if_nobody_writes_in_between"

NEXT_BATCH = (
    Mutant(
        "launched-before-writes",
        "the next step is launched at the end of one though parameters may be written in between",
        ENGINE,
        "        if self.batches.ahead is not None and not self.writes.is_on:\n",
        "        if self.batches.ahead is not None:\n",
        f"{LAUNCHED_BEFORE}[True]",
    ),
    Mutant(
        "launched-twice",
        "a step that was launched at the end of the step before is launched once more",
        "parallel/engine/captured_step.py",
        " and not self._is_launched(batch):\n",
        ":\n",
        f"{LAUNCHED_BEFORE}[False]",
    ),
    Mutant(
        "launched-for-older-weights",
        "a step counts that was launched before other weights were loaded",
        ENGINE,
        "        self.captured_step.discard_early()  # for the parameters before\n",
        "",
        f"{COMES_BETWEEN}[a_state_of_another_run]",
    ),
    Mutant(
        "written-after-it-was-read",
        "what is written into a batch after it was read ahead does not count",
        REPLICA_BATCHES,
        "x is y and rest == others for",
        "x is y for",
        f"{COMES_BETWEEN}[a_write_into_the_batch]",
    ),
    Mutant(
        "replaced-after-it-was-read",
        "a tensor of a batch may take the place of another one after the batch was read ahead",
        REPLICA_BATCHES,
        "x is y and rest == others for",
        "rest == others for",
        f"{BATCHES}::test_a_tensor_that_takes_the_place_of_a_freed_one_is_another_one",
    ),
    Mutant(
        "numbered-for-another-step",
        "the samples of a batch that was read ahead keep their numbers in whichever step takes it",
        REPLICA_BATCHES,
        " or self.num_samples != num_samples:\n",
        ":\n",
        f"{BATCHES}::test_a_batch_that_is_read_ahead_is_checked_and_staged_once",
    ),
    Mutant(
        "read-ahead-kept",
        "a batch that was read ahead is kept after its step",
        ENGINE,
        "        self.batches.ahead = None  # it was that of this step\n",
        "",
        f"{BATCHES}::test_a_batch_that_was_read_ahead_is_freed_after_its_step",
    ),
    Mutant(
        "entered-before-it-begins",
        "a rank is in the next step as soon as that one is launched",
        ENGINE,
        "        if not marks:\n            self.stopwatch.mark",
        "        if True:\n            self.stopwatch.mark",
        f"{NOT_OF_A_STEP}[False]",
    ),
    Mutant(
        "timed-between-steps",
        "what comes between two steps is time of the second one, if that one is launched by then",
        "parallel/engine/captured_step.py",
        "        self.stopwatch.take([*before, *work.marks], ahead=bool(before))\n",
        "        self.stopwatch.take([*before, *work.marks[:-1]], ahead=bool(before))\n",
        f"{NOT_OF_A_STEP}[False]",
    ),
    Mutant(
        "timed-in-another-order",
        "the marks of a graph that was launched before its step come behind the first mark of that step",
        "parallel/engine/captured_step.py",
        "*work.marks], ahead=bool(before))\n",
        "*work.marks])\n",
        f"{NOT_OF_A_STEP}[False]",
    ),
)

MUTANTS = (
    *DROPPED_REDUCTIONS,
    *GRADIENT_RULE,
    *ZERO,
    *SHARDED_INIT,
    *MODULES,
    *PLACEMENT,
    *ROUNDING,
    *NORM_AND_CLIP,
    *MEANS,
    *PARAMETERS,
    *PLACES,
    *MODEL,
    *SEQUENCES,
    *ORDER,
    *COMPILING,
    *COUNTED,
    *RESUMING,
    *LOADERS,
    *SURGERY,
    *GRAPHS,
    *USER_WRITES,
    *PARTING,
    *FOLDERS,
    *ACCESS_AND_STATE,
    *TENSOR,
    *GROUPED_ATTENTION,
    *PIECES,
    *GPT2,
    *FAMILIES,
    *TABLES,
    *LLAMA,
    *READING,
    *EVALUATION,
    *COVERAGE,
    *LENGTHS_AND_BESTS,
    *INSTALLED,
    *DOCUMENTS,
    *DATA,
    *CONVERSATIONS,
    *GENERATION,
    *FUSED_ATTENTION,
    *READ_AGAIN,
    *TEXTS_ATTACKED,
    *ATTACKED_DATA,
    *SEEN_AND_GENERATED,
    *INTEGRITY,
    *NUMBERS,
    *SAVED_BEHIND,
    *NO_ROOM,
    *WATCHED,
    *HOSTILE_FILES,
    *KILLS,
    *ENDS,
    *SEQUENCE_PARALLEL,
    *WEIGHT_GRADIENTS,
    *OVERLAPPED,
    *ANY_PLAN,
    *STAGES_OF_A_RANK,
    *TIMELINES,
    *PLANS,
    *KERNELS_OF_THE_LOSS,
    *UPDATES_IN_ONE_PASS,
    *EIGHT_BITS,
    *NORMS_IN_ONE_PASS,
    *POINTWISE,
    *SCALES_OF_LINEARS,
    *HOST_WORK,
    *ATTACKED_KERNELS,
    *CAPTURED_STEPS,
    *MENDED,
    *TABLES_IN_PLACE,
    *SIZES_IN_8_BITS,
    *LAUNCHED_LATER,
    *HOST_SHARE,
    *HOST_PATH,
    *NEXT_BATCH,
)
