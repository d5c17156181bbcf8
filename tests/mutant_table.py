"""Bugs that distributed training is prone to, each with the test that must notice it, named beforehand."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `file`, where it stands exactly once, `before` becomes `after`; then `test` must fail."""

    name: str
    breaks: str
    file: str
    before: str
    after: str
    test: str


RULES = "tests/test_gradient_rules.py"
STAGES = "tests/test_zero.py"
LOADED = "tests/test_sharded_init.py::test_a_model_loaded_in_slices_is_the_one_that_from_pretrained_loads[2-3]"
ONE_SEED = (
    "tests/test_sharded_init.py::"
    "test_a_model_constructed_in_slices_has_one_seeds_values_in_every_stage_on_any_ranks[2-3]"
)
OVERLAP = "tests/test_chunk.py::test_a_chunk_is_summed_while_the_last_backward_goes_on_and_never_before"
ANY_MODULE = "tests/test_module_engine.py::test_every_stage_trains_a_module_as_plain_torch_does"
HOMES = "tests/test_placement.py"
ROUNDED, ON_DISK = "tests/test_rounding.py", "tests/test_disk.py"
KEPT = "tests/test_inputs.py"
PLACER, PLANS = "parallel/memory/placer.py", "tests/test_placer.py"
MODULE_STATE = "tests/test_module_state.py"
REFUSALS = "tests/test_module_refusals.py::test_what_one_rank_alone_does_to_a_module_every_rank_is_told_by_name"
HALF = "tests/test_fp16_and_recompute.py"
TOPOLOGY = "tests/test_topology.py::test_coordinates_are_where_the_rank_stands_in_a_row_major_box"
GROUPS = "tests/test_topology.py::test_groups_are_the_rows_once_their_axes_are_moved_innermost"
SCHEDULE = "tests/test_schedule.py::test_every_schedule_is_valid_and_in_order"
LINKS = "tests/test_schedule.py::test_1f1b_posts_both_directions_of_a_link_together"
REPLICAS = "tests/test_data.py::test_replicas_together_take_the_samples_of_the_step[2]"
LOSS = f"{RULES}::test_loss_and_gradient_of_large_logits_in_two_slices_equal_torch[apart]"
NEAR = LOSS.replace("apart", "near")
BF16 = "tests/test_training.py::test_one_seed_draws_one_model_in_every_layout[bf16]"
SEED = f"{RULES}::test_the_ranks_of_a_layout_draw_one_model_and_own_each_element_once[1d2]"


def trains(layout: str) -> str:
    """Two steps equal Hugging Face's in this layout, from the same weights."""
    return f"{RULES}::test_unequal_microbatches_train_as_one_batch_of_hugging_face[{layout}]"


def drops(part: str) -> str:
    return f"{RULES}::test_no_two_samples_and_no_two_places_in_one_share_a_dropout_mask[{part}]"


LINE, GRID, MATMUL = (f"parallel/tensor/{name}.py" for name in ("line", "grid", "matmul"))
MODE, LAYERS, CROSS_ENTROPY = (f"parallel/tensor/{name}.py" for name in ("mode", "layers", "loss"))
TORCH_OPTIM = "parallel/torch_optim.py"
ENGINE, OPTIM, LAYOUT = "parallel/engine.py", "parallel/optim.py", "parallel/layout.py"
ROUND = "parallel/rounding.py"
CHUNK, GRADIENTS = "parallel/chunk.py", "parallel/gradients.py"
RUNNER, CONJUGATE, NORM = "parallel/pipeline/runner.py", "parallel/conjugate.py", "parallel/grad_norm.py"
BASE, INPUTS = "parallel/engine_base.py", "parallel/memory/inputs.py"
MODULE, GATHERER = "parallel/module_engine.py", "parallel/zero/gatherer.py"
SLICED, DEFERRED, CONSTRUCTION = (f"parallel/zero/{name}.py" for name in ("sliced", "deferred", "construction"))
OPT, BUILD, HF = "models/opt.py", "models/build.py", "models/hf.py"

# fmt: off
DROPPED_REDUCTIONS = (
    Mutant("1d-output-not-reduced", "linear_out leaves each rank its partial sum",
           LINE, "Surround(copy_x=t), Surround(reduce_y=t)", "Surround(copy_x=t), Surround()", trains("1d2")),
    Mutant("1d-input-gradient-not-reduced", "linear_in's dx stays a partial sum",
           LINE, "Surround(copy_x=t), Surround(reduce_y=t)", "Surround(), Surround(reduce_y=t)", trains("1d2")),
    Mutant("1d-lookup-not-reduced", "a token has an embedding only where its row lies",
           LINE, "self.reduce_rows = t", "pass", trains("1d2")),
    Mutant("grid-lookup-not-summed", "each column keeps its slice of its own rows alone",
           MODE,
           "return reduce(scatter(rows, *self.scatter_rows), self.reduce_rows)",
           "dim, axis = self.scatter_rows; return reduce(rows.chunk(axis.size, dim)[axis.rank], self.reduce_rows)",
           trains("2d1x2")),
    Mutant("cube-product-not-summed", "the matmul's partial sums over o are sliced, not added",
           MATMUL,
           "return all_reduce(reduce_scatter(y, *self.scatter_y), self.reduce_y)",
           "dim, axis = self.scatter_y; return all_reduce(y.chunk(axis.size, dim)[axis.rank], self.reduce_y)",
           trains("3d2x2x2")),
    Mutant("input-gradient-not-summed", "each rank keeps its slice of its own dx alone",
           MATMUL,
           "travelling = start_reduce_scatter(dx, *self.gather_x)",
           "travelling = Pending(dx.chunk(self.gather_x[1].size, self.gather_x[0])[self.gather_x[1].rank])",
           trains("2d1x2")),
    Mutant("weight-gradient-not-summed", "each rank keeps its slice of its own dW alone",
           MATMUL,
           "return reduce_scatter(dw, -1, self.gather_w)",
           "return dw.chunk(self.gather_w.size, -1)[self.gather_w.rank]",
           trains("2d2x1")),
    Mutant("cube-lookup-not-summed", "each rank keeps the rows found in its own slice of the vocabulary",
           MODE,
           "return reduce(scatter(rows, *self.scatter_rows), self.reduce_rows)",
           "dim, axis = self.scatter_rows; return reduce(rows.chunk(axis.size, dim)[axis.rank], self.reduce_rows)",
           trains("3d2x2x2")),
    Mutant("layer-norm-mean-not-reduced", "mean and variance are of this rank's part of the hidden dim",
           LAYERS, "statistics = all_gather(statistics, 0, axis)", "pass", trains("2d1x2")),
    Mutant("layer-norm-mean-gradient-not-reduced", "dx misses what mean and variance did on other ranks",
           LAYERS, "sums = all_reduce(sums, axis)", "pass", trains("2d1x2")),
    Mutant("layer-norm-variance-of-parts", "the spread of the ranks' means is left out of the variance",
           LAYERS, "(variances + (means - mean).square()).mean(0)", "variances.mean(0)", trains("2d1x2")),
    Mutant("loss-denominator-not-reduced", "softmax over this rank's part of the vocabulary",
           CROSS_ENTROPY,
           "sums = all_reduce(sums, axis)",
           "sums = torch.stack([sums[0], all_reduce(sums[1], axis)])",
           trains("1d2")),
    Mutant("loss-target-not-reduced", "the label's logit counts only where it lies",
           CROSS_ENTROPY,
           "sums = all_reduce(sums, axis)",
           "sums = torch.stack([all_reduce(sums[0], axis), sums[1]])",
           trains("1d2")),
    Mutant("reduce-twice", "reduce's backward sums a gradient that is whole already",
           CONJUGATE,
           "_reduce = _conjugate(all_reduce, _identity)",
           "_reduce = _conjugate(all_reduce, all_reduce)",
           trains("1d2")),
    Mutant("gather-backward-not-summed", "a gathered tensor's gradient is sliced, not added",
           CONJUGATE,
           "_gather = _conjugate(all_gather, reduce_scatter)",
           "_gather = _conjugate(all_gather, lambda grad, dim, axis: grad.chunk(axis.size, dim)[axis.rank])",
           trains("2d2x1")),
)

GRADIENT_RULE = (
    Mutant("data-not-summed", "each replica keeps its own gradient",
           MODE,
           'for name in ("data", "context", *self.token_axes) if name not in own))]',
           'for name in ("context", *self.token_axes) if name not in own))]',
           trains("dp2")),
    Mutant("depth-not-summed", "each depth of 2.5d keeps its own gradient",
           GRID,
           'token_axes = ("depth", "row")\n    merged = (("depth",), ("depth", "row"))',
           'token_axes = ("row",)\n    merged = (("row",),)',
           trains("2.5d-depth2")),
    Mutant("row-not-summed", "LayerNorms, biases and positions see one row's tokens",
           GRID, 'token_axes = ("depth", "row")', 'token_axes = ("depth",)', trains("2d2x1")),
    Mutant("layer-norm-gradient-not-summed", "LayerNorm's own gradient stays local",
           MODE,
           "layout = self.layout((hidden,), self.hidden) if affine else None",
           "layout = Layout((hidden,), (self.hidden,), (), self.layout((hidden,), self.hidden).sync)",
           trains("2.5d-depth2")),
    Mutant("tied-gradient-not-summed", "the embedding's two ends drift apart",
           MODE, "sync.append(self.mesh.ends)", "pass", trains("pp2")),
    Mutant("gradient-left-in-place", "a microbatch's gradient is added again with the next one's",
           GRADIENTS, "gradient, parameter.grad = parameter.grad, None", "gradient = parameter.grad", trains("single")),
    Mutant("gradient-of-the-last-microbatch-alone", "microbatches replace each other's gradients",
           GRADIENTS, "self.views[i].add_(gradient)", "self.views[i].copy_(gradient)", trains("single")),
    Mutant("sum-before-the-last-microbatch", "ranks add up a gradient that is not whole yet",
           GRADIENTS,
           "self.waits_for = arrivals * len(", "self.waits_for = len(",
           OVERLAP),
    Mutant("sum-after-the-backward", "nothing travels until the last gradient is there",
           GRADIENTS, "        if not self.missing:\n            self.completed(self)\n", "", OVERLAP),
    Mutant("padding-of-a-gradient-left-as-it-was", "garbage in it counts in the norm",
           CHUNK,
           "self.gradient[start + info.parameter.numel() : stop].zero_()",
           "pass",
           "tests/test_chunk.py::test_the_padding_of_a_new_gradient_is_zero"),
    Mutant("gradient-of-the-last-step-kept", "sums go on from step to step",
           GRADIENTS,
           "        self.arrivals = [0] * len(self.chunk.infos)\n",
           "        self.arrivals = getattr(self, 'arrivals', [0] * len(self.chunk.infos))\n",
           trains("single")),
)

ZERO = (
    Mutant("last-round-alone", "of microbatches that are scattered one by one the last replaces the others",
           GRADIENTS,
           "arrived if self.total is None else self._on_device(self.total).add_(arrived)", "arrived",
           f"{STAGES}::test_accumulation_keeps_stage_1_bit_for_bit_and_the_others_within_rounding[dp2]"),
    Mutant("updated-slices-stay-at-home", "each rank goes on with its own slice new and the others' old",
           CHUNK,
           "        return start_all_gather(self.own, 0, self.shard, out=self.parameters)\n\n    def gather",
           "        return Pending(self.own)\n\n    def gather",
           f"{STAGES}::test_with_one_microbatch_every_stage_equals_stage_0_bit_for_bit_in_fp32[dp2]"),
    Mutant("narrow-parameters-not-refreshed", "a bf16 model goes on with the parameters of the step before",
           CHUNK, "                self.own.copy_(self.master)\n", "                pass\n",
           "tests/test_chunk.py::test_parameters_become_views_of_one_buffer_and_keep_their_values"),
    Mutant("gathered-and-kept", "a layer's parameters stay whole after its forward",
           "parallel/zero/gatherer.py", "            self.units[i].leave()\n", "            pass\n",
           f"{STAGES}::test_no_more_than_two_layers_are_whole_at_once"),
    Mutant("range-without-its-last-row", "the end of a slice of a parameter is in no checkpoint",
           LAYOUT, "    yield from _in_row(shape, last, last * row, stop)\n", "",
           f"{STAGES}::test_rectangles_are_the_elements_of_a_range_in_order"),
)

NORM_AND_CLIP = (
    Mutant("norm-counts-replicas", "what several ranks hold counts several times",
           CHUNK, "(*self.axes[1:], *layout.copies)", "self.axes[1:]", trains("1d2")),
    Mutant("norm-counts-a-slice-of-every-replica-whole", "replicas count the same elements",
           NORM, "chunk.own_slice(chunk.gradient)", "chunk.gradient", trains("dp2")),
    Mutant("norm-counts-the-tied-embedding-twice", "both ends of the pipe own it",
           CHUNK, "(*self.axes[1:], *layout.copies)", "layout.copies", trains("pp2")),
    Mutant("norm-of-this-rank", "each rank clips by the norm of what it holds",
           NORM, "return all_reduce(total, world).sqrt()", "return total.sqrt()", trains("1d2")),
    Mutant("overflow-of-a-replica-missed", "an infinity on a rank that owns nothing of it is not noticed",
           NORM,
           "total += squares * chunk.speaks",
           "total += squares if chunk.speaks else 0",
           f"{HALF}::test_an_overflow_on_any_rank_makes_every_rank_skip_and_halve[1d2-1]"),
    Mutant("skipped-step-moves-the-schedule", "the learning rate goes on although nothing was updated",
           BASE, "learning_rate(schedule, rate, self.num_updates,", "learning_rate(schedule, rate, self.num_steps,",
           f"{HALF}::test_an_overflow_on_any_rank_makes_every_rank_skip_and_halve[single-0]"),
    Mutant("clip-without-epsilon", "torch's coefficient has 1e-6 in its denominator",
           NORM, "(clip / (norm + 1e-6))", "(clip / norm)", trains("single")),
    Mutant("clip-scales-up", "a small gradient is stretched to the limit",
           NORM, ".clamp(max=1.0) if clip", " if clip", f"{RULES}::test_clipping_equals_torch[50.0]"),
)

MEANS = (
    Mutant("no-mean", "the gradient is that of the sum",
           ENGINE, "scale=self.loss_scale.scale / max(1, tokens)", "scale=1.0", trains("single")),
    Mutant("count-of-this-replica", "the mean is over one replica's labels",
           ENGINE,
           "tokens, refused = all_reduce(sums, self.data).tolist()",
           "tokens, refused = sums.tolist()",
           trains("dp2")),
    Mutant("mean-of-replica-means", "each replica divides by its own count, then they average",
           ENGINE,
           "tokens, refused = all_reduce(sums, self.data).tolist()",
           "tokens, refused = (sums * self.data.size).tolist()",
           trains("dp2")),
    Mutant("mean-of-microbatch-means", "each microbatch weighs the same, whatever its labels",
           RUNNER,
           "self.outputs.pop(action.microbatch).backward(gradient)",
           "m, counts = action.microbatch, [(each.labels != -100).sum() for each in self.microbatches]\n"
           "        (self.outputs.pop(m) * sum(counts) / counts[m] / len(counts)).backward(gradient)",
           trains("single")),
    Mutant("padding-has-labels", "a label of -100 is counted in the mean",
           ENGINE, "[(labels != IGNORED).sum(), ", "[labels.numel(), ", trains("single")),
    Mutant("labels-not-shifted", "a token predicts itself",
           ENGINE,
           'shift(batch.get("labels", batch["input_ids"]))',
           'batch.get("labels", batch["input_ids"])',
           trains("single")),
    Mutant("every-rank-speaks", "a loss that several ranks compute is added several times",
           MODE,
           "return all(self.mesh.axis(name).rank == 0 for name in self.axes if",
           "return True or all(self.mesh.axis(name).rank == 0 for name in self.axes if",
           trains("1d2")),
)

PARAMETERS = (
    Mutant("bias-on-every-rank", "a bias joins the partial sums, and is added once a rank",
           MATMUL, "None if is_partial else bias)", "bias)", trains("1d2")),
    Mutant("bias-left-out", "where partial sums are added up, the bias is forgotten",
           MATMUL, "return y.add_(bias) if is_partial and bias is not None else y", "return y", trains("1d2")),
    Mutant("decay-on-fused-biases", "three biases in one tensor of two dims pass for a matrix",
           LAYOUT, "return len(self.public_shape) >= 2", "return len(self.layout.shape) >= 2", trains("single")),
    Mutant("padding-token-learns", "the padding row gets a gradient through the lookup",
           LAYERS, "padding_idx = self.padding_idx - first", "padding_idx = None", trains("single")),
    Mutant("padding-token-of-every-slice", "row 1 of every slice of the vocabulary passes for the padding token's",
           LAYERS,
           "and 0 <= self.padding_idx - first < table.shape[0]:\n            padding_idx = self.padding_idx - first",
           ":\n            padding_idx = self.padding_idx",
           trains("1d2")),
    Mutant("first-row-off-by-one", "a later slice of the vocabulary begins a row too soon",
           LAYOUT,
           "return index_along(self.dims[0]) * self.local_shape[0]",
           "return index_along(self.dims[0]) * (self.local_shape[0] - 1)",
           trains("1d2")),
    Mutant("padding-rows-in-the-softmax", "the vocabulary's padding takes part in the loss",
           CROSS_ENTROPY, "logits[..., stop - start :] =", "logits[..., stop - start + 1 :] =", trains("1d2")),
    Mutant("last-row-left-out", "a label on the last row of a slice is nobody's",
           CROSS_ENTROPY,
           "mine = (index >= 0) & (index < stop - start)",
           "mine = (index >= 0) & (index < stop - start - 1)",
           LOSS),
    Mutant("no-maximum-in-the-loss", "the exponential of a large logit overflows",
           CROSS_ENTROPY, "return probabilities, top.squeeze", "return probabilities, (0 * top).squeeze", LOSS),
    Mutant("maximum-added-again", "two large logits are added before they are subtracted",
           CROSS_ENTROPY, "(total.log() - target)", "((total.log() + top) - (target + top))", NEAR),
    Mutant("maximum-of-this-rank", "each rank adds up exponentials to another base",
           CROSS_ENTROPY, "top = all_reduce(top, axis, MAX)", "pass", LOSS),
    Mutant("drawn-by-rank", "a rank draws its slice as if it were the whole",
           BUILD,
           "draw_normal(piece.shape, piece.box, shape.init_std",
           "draw_normal(tuple(piece.data.shape), tuple((0, n) for n in piece.data.shape), shape.init_std",
           SEED),
    Mutant("masters-rounded", "the masters of a bf16 model start as its rounded weights",
           BUILD, "master_dtype(context.dtype), compiles", "context.dtype, compiles", BF16),
    Mutant("padding-row-drawn", "the padding token starts with an embedding",
           BUILD, "drawn[shape.pad_token_id - start] = 0", "pass", SEED),
    Mutant("every-replica-owns", "a checkpoint and an export get an element twice",
           LAYOUT, "return all(axis.rank == 0 for axis in (*self.sync, *self.copies))", "return True", SEED),
)

PLACES = (
    Mutant("rows-and-columns-swapped", "the grid's weights are split along K over the columns",
           GRID, "self.k_in = self.k_out = (row,)", "self.k_in = self.k_out = (col,)", trains("2d2x2")),
    Mutant("inner-axis-first", "a dim split over two axes is numbered the wrong way round",
           LAYOUT,
           "    for axis in axes:\n        index = index",
           "    for axis in reversed(axes):\n        index = index",
           trains("3d2x2x2")),
    Mutant("ranks-column-major", "the outermost axis varies fastest",
           "parallel/topology.py", "math.prod(sizes[place + 1 :])", "math.prod(sizes[:place])", TOPOLOGY),
    Mutant("merged-axes-in-the-wrong-order", "the ranks of a merged axis are numbered the wrong way round",
           "parallel/topology.py",
           "for axis in self.shape if axis in axes]",
           "for axis in reversed(list(self.shape)) if axis in axes]",
           GROUPS),
    Mutant("replicas-take-the-same-samples", "every replica reads the first one's rows",
           "models/data.py", "slice(replica * rows, (replica + 1) * rows)", "slice(0, rows)", REPLICAS),
    Mutant("queries-are-keys", "Hugging Face's q and k are read into each other's place",
           HF, '("q_proj", "k_proj", "v_proj"))', '("k_proj", "q_proj", "v_proj"))', trains("single")),
)

MODEL = (
    Mutant("positions-from-zero", "OPT's positions start at 2",
           OPT, "* mask - 1 + POSITION_OFFSET", "* mask", trains("single")),
    Mutant("a-token-sees-the-future", "attention without the causal mask",
           OPT,
           "return _causal(tokens.shape[-1], tokens.device) & tokens[:, None, None, :]",
           "return tokens[:, None, None, :].expand(-1, -1, tokens.shape[-1], -1)",
           trains("single")),
    Mutant("padding-is-attended-to", "the attention mask is ignored",
           OPT,
           "return _causal(tokens.shape[-1], tokens.device) & tokens[:, None, None, :]",
           "return _causal(tokens.shape[-1], tokens.device)",
           trains("single")),
    Mutant("dropout-the-same-for-every-sample", "a mask that knows the position alone",
           OPT,
           "rows = samples.unsqueeze(1) * sequence + torch.arange",
           "rows = samples.unsqueeze(1) * 0 + torch.arange",
           drops("Block")),
    Mutant("attention-dropout-the-same-for-every-sample", "a mask that knows head and position alone",
           OPT, "rows = (samples.unsqueeze(1) * count + heads)", "rows = (samples.unsqueeze(1) * 0 + heads)",
           drops("Attention")),
    Mutant("dropout-the-same-on-every-replica", "replicas number their samples alike",
           ENGINE,
           "first = (self.num_steps * self.data.size + self.data.rank) * len(ids)",
           "first = self.num_steps * self.data.size * len(ids)",
           f"{RULES}::test_replicas_drop_what_one_rank_would_drop"),
    Mutant("dropout-the-same-in-every-step", "samples are numbered anew in each step",
           ENGINE,
           "first = (self.num_steps * self.data.size + self.data.rank) * len(ids)",
           "first = self.data.rank * len(ids)",
           f"{RULES}::test_a_batch_repeated_in_the_next_step_meets_other_dropout_masks"),
)

ORDER = (
    Mutant("rate-of-the-next-step", "the schedule is a step ahead",
           BASE,
           "learning_rate(schedule, rate, self.num_updates,",
           "learning_rate(schedule, rate, self.num_updates + 1,",
           trains("single")),
    Mutant("gpipe-backwards-first", "a backward before its forward",
           "parallel/pipeline/schedule.py",
           "[forwards + backwards] * num_stages",
           "[backwards + forwards] * num_stages",
           SCHEDULE),
    Mutant("received-after-use", "a stage computes before its input has come",
           "parallel/pipeline/schedule.py",
           "actions.append(Action(receive, compute.stage, compute.microbatch, source))\n"
           "            actions.append(compute)",
           "actions += [compute, Action(receive, compute.stage, compute.microbatch, source)]\n"
           "            else:\n                actions.append(compute)",
           LINKS),
    Mutant("oldest-activation-sent-again", "the next stage gets another microbatch's activations",
           RUNNER,
           "return self.outputs[action.microbatch].detach()",
           "return self.outputs[min(self.outputs)].detach()",
           trains("pp2-gpipe")),
    Mutant("gradient-to-another-microbatch", "backward of one microbatch from the gradient of another",
           RUNNER,
           "self.inputs.pop(action.microbatch).grad",
           "next(iter(self.inputs.values())).grad",
           trains("pp2-gpipe")),
)

SHARDED_INIT = (
    Mutant("every-rank-keeps-the-first-slice", "a gathered parameter repeats its first part",
           SLICED, "[axis.rank * size : (axis.rank + 1) * size]", "[:size]", LOADED),
    Mutant("tied-stand-ins-compared", "a weight stored under both its names is read as two",
           DEFERRED, "func is torch.ops.aten.equal.default", "False", LOADED),
    Mutant("arrivals-stay-whole", "weights are read one by one, and all kept",
           CONSTRUCTION,
           "divide(parameter, self.axis)\n\n    def",
           "pass\n\n    def",
           "tests/test_sharded_init.py::test_a_rank_holds_its_slices_and_one_parameter_at_most"),
    Mutant("overwritten-values-kept", "what an initialization overwrites is held until the model is complete",
           DEFERRED,
           "target = dataclasses.replace(place, content=None)",
           "target = place",
           "tests/test_sharded_init.py::test_a_rank_holds_its_slices_and_one_parameter_at_most"),
    Mutant("each-rank-draws-its-own-model", "slices of as many models as there are seeds",
           CONSTRUCTION, "gather_objects(torch.get_rng_state(), replicas)[0]", "torch.get_rng_state()", ONE_SEED),
    Mutant("a-draw-for-each-reading", "what is computed from a drawn weight is computed from another draw",
           DEFERRED,
           "torch.default_generator.manual_seed(self.seed)",
           "torch.default_generator.seed()",
           "tests/test_sharded_init.py::test_initialization_of_a_users_own_is_kept"),
    Mutant("missing-weight-drawn", "a damaged directory trains from noise",
           CONSTRUCTION,
           'if hasattr(root, "from_pretrained") and not',
           "if False and not",
           "tests/test_sharded_init.py::test_a_missing_tensor_is_named_on_every_rank_and_nothing_stays_patched"),
)

MODULES = (
    Mutant("sum-over-replicas", "a module's gradients are added where a mean was promised",
           MODULE, "self.loss_scale.scale * self.data.size", "self.loss_scale.scale", ANY_MODULE),
    Mutant("unused-parameter-updated", "what got no gradient decays, and its moments with it",
           TORCH_OPTIM, "leaf.grad = None if segment.info.parameter in self.unused else", "leaf.grad =",
           ANY_MODULE),
    Mutant("replicas-start-apart", "each replica keeps what it drew",
           "parallel/zero/modules.py", "            broadcast(info.parameter.data, axis)\n", "            pass\n",
           ANY_MODULE),
    Mutant("problem-of-one-rank-kept", "the others wait for a rank that has raised",
           "parallel/zero/agreement.py", 'f"!{problem}" if problem else doing', "doing", f"{REFUSALS}[cast]"),
    Mutant("recomputed-layer-let-go", "a layer is gathered once more after its recomputation",
           GATHERER, "if _backward() < 0:", "if True:",
           "tests/test_module_cost.py::test_a_step_sends_what_the_table_of_stages_says"),
    Mutant("layers-kept-through-backward", "all layers are whole at the end of a backward",
           GATHERER, "        ctx.leave()\n", "",
           "tests/test_module_cost.py::test_no_more_than_two_layers_are_whole_at_once_and_none_is_left"),
    Mutant("microbatches-weigh-the-same", "a mean of means, whatever they are means of",
           MODULE, "loss * (count * self.data.size / tokens)", "loss * (1 / len(microbatches))",
           f"{MODULE_STATE}::test_train_step_takes_the_mean_over_all_labels_however_they_are_spread"),
    Mutant("checkpoint-without-steps", "every parameter's Adam resumes at the same step",
           TORCH_OPTIM, "(steps or {}).get(segment.info.name, updates)", "updates",
           f"{MODULE_STATE}::test_a_checkpoint_of_one_stage_goes_on_in_another_as_if_nothing_had_happened"),
    Mutant("each-replica-shuffles", "replicas take parts of different batches",
           "parallel/loaders.py", "manual_seed(states[0])", "manual_seed(states[axis.rank])",
           f"{MODULE_STATE}::test_a_dataloader_gives_every_replica_its_part_of_the_same_batches"),
)

PLACEMENT = (
    Mutant("host-parameters-not-refreshed", "parameters at home on the host go on as they were",
           CHUNK, "                self.written = self.copies.down(self.master.to(self.own.dtype), self.own)\n",
           "                pass\n", f"{HOMES}::test_chunks_may_change_their_homes_between_any_two_steps"),
    Mutant("narrow-parameters-left-on-the-host", "what streamed through the device is not rounded",
           "parallel/streaming.py", "                self._copies.down(narrow.copy_(here.states[0]), home.own)\n",
           "                pass\n", f"{HOMES}::test_narrow_parameters_too"),
    Mutant("rounds-on-the-host-replaced", "the host keeps the last microbatch's gradient alone",
           GRADIENTS, "        chunk.copies.up(total, found, after=chunk.gradient_written).wait()\n",
           "        found.zero_()\n", f"{HOMES}::test_narrow_parameters_too"),
    Mutant("moved-masters-unseen", "a user's optimizer updates where the masters were",
           TORCH_OPTIM, "            leaf.data = renewed[segment.info].data\n", "            pass\n",
           f"{HOMES}::test_a_module_of_ones_own_too"),
    Mutant("plan-beyond-its-budget", "parameters stay although there is no room",
           "parallel/memory/policy.py", "num_states, k) <= allowed)", "num_states, k) <= 2 * allowed)",
           f"{HOMES}::test_a_plan_fits_and_everything_stays_where_everything_fits"),
    Mutant("host-beyond-its-budget", "states stay on the host although there is no room",
           "parallel/memory/policy.py", "k) <= host.budget)", "k) <= 2 * host.budget)",
           f"{HOMES}::test_a_plan_fits_and_everything_stays_where_everything_fits"),
    Mutant("slots-uncounted", "what states on a disk go through is not part of the host's budget",
           "parallel/memory/policy.py", "max((chunk.buffers for", "max((0 for",
           f"{ON_DISK}::test_states_on_a_disk_change_nothing_and_the_host_keeps_to_its_budget"),
    Mutant("slot-read-before-it-is-written", "reading ahead takes the place of what was updated",
           "parallel/disk.py", "        for job in written:\n            job.result()\n", "",
           f"{ON_DISK}::test_files_are_the_same_in_parts_and_as_memory"),
    Mutant("updates-left-in-their-slots", "nothing comes back to the disk",
           "parallel/disk.py", "        file.write(start, room[: stop - start])\n", "",
           f"{ON_DISK}::test_files_are_the_same_in_parts_and_as_memory"),
    Mutant("looked-at-too-early", "a checkpoint has states that are still being written",
           "parallel/disk.py",
           "        for slot in self._slots:\n            slot.wait()\n        self._asked",
           "        self._asked",
           f"{ON_DISK}::test_files_are_the_same_in_parts_and_as_memory"),
    Mutant("input-kept-on-the-device", "a copy goes to the host, and what it is of stays",
           INPUTS, "        del self._x\n", "        self.__dict__.setdefault('left', []).append(self._x)\n",
           f"{KEPT}::test_what_waits_on_the_device_for_a_backward_does_not_grow_with_the_number_of_blocks"),
    Mutant("module-input-kept-on-the-device", "transformers' own checkpoint stays",
           "parallel/zero/modules.py",
           "                _replace_checkpoint(module, inputs)\n",
           "                pass\n",
           f"{KEPT}::test_what_waits_on_the_device_does_not_grow_with_a_modules_layers[opt]"),
    Mutant("input-sent-for-when-it-is-needed", "each backward waits for its input",
           INPUTS, "            before.fetch()\n", "            pass\n",
           f"{KEPT}::test_an_input_goes_down_and_comes_up_while_a_layer_computes"),
    Mutant("newest-input-travels", "what the next backward begins with goes down and comes up again",
           INPUTS, "        kept = Kept(x, self.pool, self._newest)\n",
           "        kept = Kept(x, self.pool, self._newest)\n        kept.leave()\n",
           f"{KEPT}::test_buffers_are_as_many_as_inputs_wait_at_once_and_an_evaluation_keeps_none"),
    Mutant("buffer-not-taken-back", "the host's memory grows with every step",
           INPUTS, "            self._pool.take_back(self._home)\n", "            pass\n",
           f"{KEPT}::test_buffers_are_as_many_as_inputs_wait_at_once_and_an_evaluation_keeps_none"),
    Mutant("buffer-lent-twice", "an input lies where another's was",
           INPUTS, "return self._free.pop(id(fitting))", "return self._free[id(fitting)]",
           f"{KEPT}::test_inputs_on_the_host_with_dropout_equal_no_recompute_bit_for_bit[single]"),
    Mutant("input-of-the-first-backward-alone", "a second backward through the same layers finds another's input",
           INPUTS, "        x = self._x\n        self._go_away()\n",
           "        x = self._x\n        self._go_away()\n        self._pool.take_back(self._home)\n",
           f"{KEPT}::test_a_module_of_ones_own_trains_bit_for_bit_too[twice-1-cuda]"),
    Mutant("changed-input-computed-with", "what was changed in place goes to the host, or into a recomputation",
           INPUTS, "if self._x._version != self._version:", "if False:",
           f"{KEPT}::test_an_input_changed_in_place_is_refused_not_computed_with"),
    Mutant("longer-steps-unnoticed", "a plan for short sequences is kept for long ones",
           PLACER, "is_new = not any(", "is_new = not self._seen and not any(",
           f"{PLANS}::test_larger_steps_are_planned_for_again_and_smaller_ones_keep_the_plan"),
    Mutant("skipped-layer-unnoticed", "a layer that was not watched is not planned for",
           PLACER, "self._surprised or not self._used <= self._known", "self._surprised",
           f"{PLANS}::test_a_layer_that_had_been_skipped_and_longer_inputs_are_planned_for"),
    Mutant("plan-of-another-budget", "a resumed run goes on by a plan that was made for more memory",
           PLACER, 'fits = state.get("key") == self._key()', "fits = bool(state)",
           f"{PLANS}::test_a_resumed_run_goes_on_by_the_plan_it_had"),
    Mutant("parts-are-kept", "what an update streamed stays on the host until the next one, wherever its chunk has moved",
           "parallel/shared_update.py", "Side(counts[0],", "Side(_elements(streamed),",
           f"{HOMES}::test_what_has_moved_is_gone_from_where_it_was"),
    Mutant("engines-stay", "autograd holds the chunks of an engine that nobody has any more",
           GRADIENTS, "partial(_arrive, weakref.ref(self), i)", "partial(self.take, i)",
           "tests/test_long_run.py::test_an_engine_that_is_given_up_frees_its_memory[ours]"),
    Mutant("tied-weight-updated-on-two-sides", "one stage leaves it to the host, the other does not",
           "parallel/shared_update.py", " and len(part.chunk.axes) == 1", "",
           f"{PLANS}::test_what_two_stages_hold_is_updated_on_the_same_side"),
)

ROUNDING = (
    Mutant("moments-rounded-to-the-nearest", "every element has half a unit for its noise",
           ROUND, "            bits += self._draw(part, k, update)\n", "            bits += 2**15\n",
           f"{ROUNDED}::test_the_mean_over_updates_is_what_was_rounded[dtype0]"),
    Mutant("moments-cut-off", "what does not fit is dropped: moments lose by every update",
           ROUND, "            bits += self._draw(part, k, update)\n", "            pass\n",
           f"{ROUNDED}::test_the_mean_over_updates_is_what_was_rounded[dtype0]"),
    Mutant("one-noise-for-all-updates", "an element is always rounded the same way",
           ROUND, "seed_of(piece.name, moment, update, dim)", "seed_of(piece.name, moment, dim)",
           f"{ROUNDED}::test_the_mean_over_updates_is_what_was_rounded[dtype0]"),
    Mutant("both-moments-have-one-noise", "where the first is rounded up, so is the second",
           ROUND, "seed_of(piece.name, moment, update, dim)", "seed_of(piece.name, update, dim)",
           f"{ROUNDED}::test_moments_updates_tensors_and_places_have_noise_of_their_own"),
    Mutant("noise-of-a-part", "an element's noise follows from its place in a part",
           ROUND, "part.chunk.pieces(noise, first=part.first)", "part.chunk.pieces(noise, first=0)",
           f"{ROUNDED}::test_an_elements_noise_knows_neither_ranks_nor_parts[2]"),
    Mutant("rows-read-one-place", "all rows of a matrix have one noise",
           ROUND, "starts = (rows.flatten() + places[-1]", "starts = (0 * rows.flatten() + places[-1]",
           f"{ROUNDED}::test_moments_updates_tensors_and_places_have_noise_of_their_own"),
    Mutant("noise-of-a-rank", "an element's noise follows from where it lies on its rank",
           ROUND, "dim) + start for dim,", "dim) for dim,",
           f"{ROUNDED}::test_one_seed_gives_one_model_in_every_layout[1d2]"),
    Mutant("zero-gets-noise", "a moment of zero is rounded up from it",
           ROUND, "            bits &= -(2**16)\n", "            bits += 2**15\n            bits &= -(2**16)\n",
           f"{ROUNDED}::test_zero_stays_zero_and_what_bf16_holds_stays_what_it_is"),
    Mutant("updates-of-the-others", "a parameter's bias correction counts updates that it had no part in",
           OPTIM, "updates = self.updates - self._missed.get(info, 0)", "updates = self.updates",
           ANY_MODULE),
    Mutant("unused-elements-updated", "what got no gradient decays by our own AdamW, and its moments with it",
           OPTIM, "            if info.parameter in self.unused:\n                continue\n", "",
           ANY_MODULE),
)

# fmt: on

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
    *ORDER,
)
