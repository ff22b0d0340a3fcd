"""Each oracle once, on every family."""

from __future__ import annotations

import copy
import traceback

import pytest
import torch
import transformers
from tiny import (
    CLASSES,
    EVERY_CLASS,
    FAMILY_OF,
    changed,
    cut,
    cut_everywhere,
    cut_tiny,
    distance,
    keep,
    outputs,
    rows,
    singles,
    snapshot,
    tiny,
    tiny_batch,
    within_reach,
)
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hf_prune import PruningConfig, describe, prune, save_pretrained
from hf_prune.decide.costs import cost_model, planned_sizes
from hf_prune.model.batches import draw, prepare
from hf_prune.model.mask import masked
from hf_prune.model.sites import attribute_of, consumer, find_sites, input_axis
from hf_prune.oneshot import analyze, history_of
from hf_prune.plan import PruningPlan
from hf_prune.repair.walk import improvement
from hf_prune.score.criteria import CRITERIA
from hf_prune.score.judge import Judge
from hf_prune.score.losses import example_losses
from hf_prune.score.statistics import gradients

SHAPES = ("stock", "uniform", "per_layer")
ONE_OF_EACH_KIND = (
    "BertForSequenceClassification", "LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration",
    "ViTForImageClassification",
)  # fmt: skip
DECODERS = [
    name for names in CLASSES.values() for name in names if name.endswith(("CausalLM", "LMHeadModel", "Generation"))
]
TEXT = [name for names in CLASSES.values() for name in names if not name.endswith("ImageClassification")]
FIRST = [names[0] for names in CLASSES.values()]


# --- masked == sliced ------------------------------------------------------------------------------------------------


def masked_and_sliced(model, shapes):
    """Outputs of the dense, the masked and the sliced model."""
    batch = tiny_batch(model)
    anatomy = describe(model)
    plan = cut_everywhere(anatomy, uniform=shapes == "uniform")
    assert not any(site.is_identity for site in plan.sites)
    dense = outputs(model, batch)
    with masked(model, anatomy, plan):
        expected = outputs(model, batch)
    return dense, expected, outputs(cut(model, plan), batch)


def test_masked_equals_sliced(class_name, cut_shapes):
    dense, expected, got = masked_and_sliced(tiny(class_name), cut_shapes)
    assert distance(got, expected) <= 1e-4
    assert distance(got, dense) > 1e-3


@pytest.mark.parametrize("class_name", FIRST)
def test_masked_equals_sliced_in_bfloat16(class_name, cut_shapes):
    """bf16 has 8 significant bits; sums over fewer terms round differently: 5% of the largest output is allowed."""
    dense, expected, got = masked_and_sliced(tiny(class_name).to(torch.bfloat16), cut_shapes)
    scale = max(x.abs().max().item() for x in expected)
    assert distance(got, expected) <= 0.05 * scale
    assert distance(got, dense) > distance(got, expected)


@pytest.mark.parametrize(
    ("axis", "kept"), [("heads", (0, 3, 4, 7)), ("heads", (0, 1, 4, 5)), ("heads", (5, 6)), ("kv_groups", (1,))]
)
def test_grouped_query_units(axis, kept):
    """Heads evenly in every group that stays, and whole groups, with 8 heads in 2 groups."""
    model = tiny("LlamaForCausalLM", num_attention_heads=8, hidden_size=64)
    anatomy, batch = describe(model), tiny_batch(model)
    plan = PruningPlan("llama", tuple(keep(s, kept, axis) if s.inner.mixes else keep(s) for s in anatomy.sites))
    with masked(model, anatomy, plan):
        expected = outputs(model, batch)
    assert distance(outputs(cut(model, plan), batch), expected) <= 1e-4


def test_gated_t5_masked_equals_sliced():
    """T5 v1.1: two up projections and an untied head."""
    model = tiny("T5ForConditionalGeneration", feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    _, expected, got = masked_and_sliced(model, "per_layer")
    assert distance(got, expected) <= 1e-4


# --- a window shorter than the text ----------------------------------------------------------------------------------

WINDOW = {
    "num_hidden_layers": 6,
    "sliding_window": 4,  # of texts of 12 tokens
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}


def windowed(**changes):
    return tiny("Gemma3ForCausalLM", **{**WINDOW, **changes})


def test_the_window_hides_what_is_further_away():
    batch = tiny_batch(windowed())
    assert distance(outputs(windowed(), batch), outputs(windowed(sliding_window=64), batch)) > 1e-2


def test_masked_equals_sliced_within_a_window(cut_shapes):
    dense, expected, got = masked_and_sliced(windowed(), cut_shapes)
    assert distance(got, expected) <= 1e-4
    assert distance(got, dense) > 1e-3


@pytest.mark.parametrize("shapes", SHAPES)
def test_a_model_with_a_window_reopens_and_generates(tmp_path, shapes):
    model = windowed()
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    config = within_reach(model, PruningConfig(metric="params", shapes=shapes))
    report = prune(model, data, config).report
    assert improvement(report["repairs"]) < 1
    save_pretrained(model, tmp_path / "m", data)
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, data[0]), outputs(model, data[0])) <= 1e-5
    assert again.config.layer_types == WINDOW["layer_types"]
    again.generation_config.eos_token_id = None
    inputs = {k: v for k, v in tiny_batch(model, batch=2, padded=False).items() if k != "labels"}
    got = again.generate(**inputs, do_sample=False, max_new_tokens=10)
    assert got.tolist() == greedy(model, inputs, 10).tolist()


# --- keep = 1 and errors leave all as it was -------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", SHAPES)
def test_keep_one_changes_nothing(class_name, shapes):
    model = tiny(class_name).train()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    result = prune(model, [tiny_batch(model)], PruningConfig(keep=1.0, shapes=shapes))
    assert result.plan.is_identity
    assert list(changed(before, model)) == []


@pytest.mark.parametrize("shapes", SHAPES)
def test_keep_one_keeps_units_without_a_score(shapes):
    """A dead neuron scores exactly 0; keep=1 still may not touch it."""
    model = tiny("OPTForCausalLM")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.bias[:4] = -100.0
    before = snapshot(model)
    prune(model, [tiny_batch(model)], PruningConfig(keep=1.0, shapes=shapes))
    assert list(changed(before, model)) == []


class Boom(Exception):
    pass


def explode_within(model, function, calls=0):
    """The last consumer of a model fails after some calls while a function of this name runs."""
    seen = []

    def hook(*_):
        if function in {frame.name for frame in traceback.extract_stack()}:
            seen.append(1)
        if len(seen) > calls:
            raise Boom

    site = find_sites(model, describe(model).family)[-1]
    consumer(model, site).register_forward_hook(hook)


@pytest.mark.parametrize("criterion", ["fisher", "activation", "hessian"])
def test_an_error_while_scoring_changes_nothing(family, criterion):
    model = tiny(CLASSES[family][0]).train()
    explode_within(model, "statistics")
    before = snapshot(model)
    with pytest.raises(Boom):
        prune(model, [tiny_batch(model)], PruningConfig(keep=0.8, metric="params", criterion=criterion))
    assert list(changed(before, model)) == []


def test_an_error_while_cutting_changes_nothing(family):
    """In the last layer, after the layers below it were cut and repaired."""
    model = tiny(CLASSES[family][0]).train()
    next(model.parameters()).requires_grad_(False)
    explode_within(model, "execute_", calls=1)
    before = snapshot(model)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    with pytest.raises(Boom):
        prune(model, data, PruningConfig(keep=0.8, metric="params", criterion="magnitude"))
    assert list(changed(before, model)) == []


# --- config, attributes and ties -------------------------------------------------------------------------------------


def said(config, site):
    """What a saved config says of a site's sizes."""
    entry = config["hf_prune"]
    if entry.get("layers"):
        return entry["layers"][f"{site.stack}.{site.layer}.{site.kind}"]
    per_layer = {int(key): value for key, value in (config.get("per_layer_config") or {}).items()}
    return {**config, **per_layer.get(site.layer, {})}


@pytest.mark.parametrize("shapes", SHAPES)
def test_config_says_what_the_weights_are(class_name, shapes):
    model = cut_tiny(class_name, shapes)
    config = model.config.to_dict()
    for site in describe(model).sites:
        for axis in site.row.axes:
            assert said(config, site)[axis.config] == site.sizes[axis.name], (site.name, axis.name)


SIZES_OF = {  # attributes of modules that repeat the shape of their weight
    "Linear": ("out_features", "in_features"),
    "Conv1D": ("nx", "nf"),
    "Embedding": ("num_embeddings", "embedding_dim"),
}


@pytest.mark.parametrize("shapes", SHAPES)
def test_attributes_say_what_the_weights_are(class_name, shapes):
    model = cut_tiny(class_name, shapes)
    for site in describe(model).sites:
        layer = model.get_submodule(site.path)
        for module in layer.modules():
            said_of = [getattr(module, name) for name in SIZES_OF.get(type(module).__name__, ())]
            assert said_of == (list(module.weight.shape) if said_of else []), (site.name, module)
        assert site.columns == site.sizes[site.inner.name] * site.widths[site.inner.name]
        for count in site.row.counts:
            units = site.sizes[count.axis]
            meant = {"units": units, "columns": site.columns, "each": units // site.sizes[site.outer.name]}[count.of]
            assert attribute_of(layer, count.attribute) == meant, (site.name, count.attribute)


@pytest.mark.filterwarnings("ignore:.*remains, where keep=")  # a group of heads is a large part of a tiny model
@pytest.mark.parametrize("shapes", SHAPES)
def test_costs_are_those_of_the_model(class_name, shapes):
    """Planned cost, the anatomy of the cut model, and its real parameters agree, in both scopes."""
    model = tiny(class_name)
    data = [tiny_batch(model)]
    for metric in ("params", "macs"):
        before = describe(model)
        config = PruningConfig(metric=metric, shapes=shapes, criterion="magnitude", repair="none")
        config = within_reach(model, config)
        report = prune(model, data, config).report
        after = describe(model)
        assert report["keep"] <= config.keep
        assert report["after"][f"{metric}_{config.scope}"] <= config.keep * report["before"][f"{metric}_{config.scope}"]
        real = sum(p.numel() for p in model.parameters())
        assert report["after"]["params_model"] == after.total_params == real
        layers = {site.path for site in after.sites}
        block = sum(p.numel() for path in layers for p in model.get_submodule(path).parameters())
        assert report["after"]["params_blocks"] == block
        for metric_, scope in (("macs", "model"), ("macs", "blocks"), ("params", "blocks")):
            again = cost_model(after, metric_, 128, scope).total(after.sizes)
            assert report["after"][f"{metric_}_{scope}"] == pytest.approx(again)
        assert before.total_params == report["before"]["params_model"]


def counted_macs(model, length):
    batch = tiny_batch(model, batch=1, length=length, padded=False)
    if model.config.is_encoder_decoder and "input_ids" in batch:
        batch["decoder_input_ids"] = batch["input_ids"]
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}
    if "Encoder" in type(model).__name__:
        inputs.pop("decoder_input_ids", None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("length", [16, 48])
def test_macs_match_the_flop_counter(class_name, length):
    model = tiny(class_name, attn_implementation="eager")
    anatomy = describe(model)
    costs = cost_model(anatomy, "macs", length, "model")
    assert costs.total(anatomy.sizes) == pytest.approx(counted_macs(model, length), rel=0.01)
    plan = cut_everywhere(anatomy)
    cut(model, plan)
    assert costs.total(planned_sizes(anatomy, plan)) == pytest.approx(counted_macs(model, length), rel=0.01)


def test_the_anatomy_needs_no_weights_and_no_forward_pass(class_name):
    model = tiny(class_name)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    model.forward = empty.forward = None
    assert describe(empty) == describe(model)


@pytest.mark.parametrize("class_name", FIRST)
def test_a_model_without_weights_is_not_pruned(class_name):
    with torch.device("meta"):
        empty = type(tiny(class_name))(tiny(class_name).config)
    plan = cut_everywhere(describe(empty))
    for more in ({}, {"plan": plan}):
        with pytest.raises(ValueError, match="is on the meta device"):
            prune(empty, [tiny_batch(empty)], PruningConfig(keep=0.9, metric="params", repair="none"), **more)
    assert describe(empty).sizes == describe(tiny(class_name)).sizes


def test_t5_heads_are_coupled():
    """Block 0's position bias is handed to every later block: all blocks keep the same heads."""
    model = tiny("T5ForConditionalGeneration")
    for shapes in SHAPES:
        config = PruningConfig(keep=0.6, metric="params", shapes=shapes)
        plan = analyze(model, [tiny_batch(model)], config).plan()
        kept = {}
        for site in plan.sites:
            if site.axis == "heads":
                stack, _, kind = site.where
                kept.setdefault((stack, kind), set()).add(site.kept)
        assert kept
        assert all(len(choices) == 1 for choices in kept.values()), kept


@pytest.mark.parametrize("class_name", DECODERS)
def test_tied_embeddings_stay_tied(class_name):
    model = cut_tiny(class_name, "per_layer", tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- pruning twice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", SHAPES)
def test_pruning_twice_composes(class_name, shapes):
    config = PruningConfig(metric="params", shapes=shapes, repair="none", criterion="magnitude")
    twice, once = tiny(class_name), tiny(class_name)
    data = [tiny_batch(twice)]
    first = prune(twice, data, within_reach(twice, config))
    again = within_reach(twice, config)
    second = prune(twice, data, again)
    assert not second.plan.is_identity
    assert second.report["before"] == first.report["after"]  # keep is relative to the model handed in
    assert second.report["keep"] <= again.keep
    both = first.plan.compose(second.plan)
    assert history_of(twice).plan.hash == both.hash
    cut(once, both)
    old, new = once.state_dict(), twice.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old)
    a, b = once.config.to_dict(), twice.config.to_dict()
    assert {k: a[k] for k in a if k != "hf_prune"} == {k: b[k] for k in b if k != "hf_prune"}
    assert a["hf_prune"]["dense"] == b["hf_prune"]["dense"]


# --- scores ----------------------------------------------------------------------------------------------------------


def scores(model, data, criterion):
    return analyze(model, data, PruningConfig(keep=1.0, criterion=criterion, units=["neurons"])).scores


def assert_same_scores(a, b):
    for key in a:
        scale = a[key].abs().max().clamp_min(1e-12)
        assert ((a[key] - b[key]).abs().max() / scale).item() <= 1e-3, key


CRITERIA_ON_DATA = [
    "fisher",
    "fisher_block",
    "fisher_obs",
    "fisher_joint",
    "fisher_obs_root",
    "taylor",
    "activation",
    "fluctuation",
    "hessian",
]


def usable(class_name):
    """Criteria that this class can be scored with: T5EncoderModel has no head."""
    return [c for c in CRITERIA_ON_DATA if class_name != "T5EncoderModel" or not CRITERIA[c].needs_loss]


def test_scores_do_not_depend_on_batch_size_or_order(class_name):
    model = tiny(class_name)
    batch = tiny_batch(model)
    backwards = rows(batch, torch.arange(8).flip(0))
    for criterion in usable(class_name):
        whole = scores(model, [batch], criterion)
        assert_same_scores(whole, scores(model, singles(batch), criterion))
        assert_same_scores(whole, scores(model, [backwards], criterion))


def pad(batch, columns=5):
    """Extra right padding on everything that has tokens."""
    fill = {"attention_mask": 0, "labels": -100, "input_ids": 0}
    return {
        key: functional.pad(value, (0, columns), value=fill[key]) if value.dim() == 2 else value
        for key, value in batch.items()
    }


@pytest.mark.parametrize("class_name", TEXT)
def test_scores_do_not_depend_on_padding(class_name):
    model = tiny(class_name)
    batch = tiny_batch(model)
    for criterion in usable(class_name):
        assert_same_scores(scores(model, [batch], criterion), scores(model, [pad(batch)], criterion))


def double_loss(output, batch, class_name):
    """The task loss of each example [B] in double precision, written out once more."""
    if "QuestionAnswering" in class_name:
        return (
            sum(
                functional.cross_entropy(logits, batch[f"{side}_positions"], reduction="none")
                for side, logits in (("start", output.start_logits), ("end", output.end_logits))
            )
            / 2
        )
    logits, labels = output.logits, batch["labels"]
    if class_name.endswith(("CausalLM", "LMHeadModel")):
        logits, labels = logits[:, :-1], labels[:, 1:]
    if labels.dim() == 1:
        return functional.cross_entropy(logits, labels, reduction="none")
    losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


GELU = {"activation_function": "gelu"}  # ReLU has no derivative at 0
SMOOTH = {"t5": {"feed_forward_proj": "gelu"}, "opt": GELU, "m2m_100": GELU, "pegasus": GELU}
IN_FP32 = ("RMSNorm", "T5LayerNorm", "CohereLayerNorm", "Cohere2LayerNorm", "OlmoLayerNorm")


@pytest.mark.parametrize("class_name", [name for _, name in EVERY_CLASS if name != "T5EncoderModel"])
def test_gate_gradients_match_finite_differences(class_name):
    """Differences of fourth order in float64: a unit's gate is a factor on its columns of the consumer's weight.

    The step is wide where the norm computes in fp32 whatever the model's dtype (RMSNorm, as transformers writes it).
    """
    model = tiny(class_name, **SMOOTH.get(FAMILY_OF[class_name], {}))
    batch = tiny_batch(model, batch=4, padded="QuestionAnswering" not in class_name)
    sites = describe(model).sites
    units = {site.key: site.sizes[site.inner.name] for site in sites}
    found = gradients(model, sites, units, draw(model, [batch, batch], 8, 0)[0]).gates
    double = copy.deepcopy(model).double()
    in_fp32 = any(type(m).__name__.endswith(IN_FP32) for m in model.modules())
    step = 0.02 if in_fp32 else 0.001
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    largest = max(value.abs().max().item() for value in found.values())
    for site in sites:
        width = site.columns // units[site.key]
        weight = consumer(double, site).weight
        for unit in (0, units[site.key] - 1):
            columns = weight.data.narrow(input_axis(consumer(double, site)), unit * width, width)
            dense, losses = columns.clone(), []
            for steps in (2, 1, -1, -2):
                columns.copy_(dense * (1 + steps * step))
                with torch.no_grad():
                    losses.append(double_loss(double(**inputs), batch, class_name))
            columns.copy_(dense)
            expected = (8 * (losses[1] - losses[2]) - (losses[0] - losses[3])) / (12 * step)
            gap = (found[site.key][:, unit] - expected).abs().max().item()
            assert gap <= 1e-4 * largest, (site.name, unit, gap / largest)


@pytest.mark.parametrize(
    "class_name", [name for _, name in EVERY_CLASS if name not in ("T5EncoderModel", "BartForCausalLM")]
)
def test_example_losses_are_the_models_own(class_name):
    """transformers' own loss of each example alone.

    Not BartForCausalLM, whose loss in transformers does not shift the labels; answers are looked for in unpadded text.
    """
    model = tiny(class_name)
    batch = tiny_batch(model, padded="QuestionAnswering" not in class_name)
    drawn = draw(model, [batch], 8, 0)[0]
    with torch.no_grad():
        found = example_losses(model, model(**drawn.inputs), drawn)
        expected = torch.stack([model(**single).loss for single in singles(batch)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems_have_a_loss(problem):
    model = tiny("BertForSequenceClassification", num_labels=3, problem_type=problem)
    batch = {**tiny_batch(model), "labels": torch.rand(8, 3).round()}
    drawn = draw(model, [batch], 8, 0)[0]
    with torch.no_grad():
        found = example_losses(model, model(**drawn.inputs), drawn)
        assert found.mean().item() == pytest.approx(model(**batch).loss.item(), rel=1e-4)


# --- after the cut ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, batch, steps):
    """Greedy decoding that runs the whole sequence at every step."""
    if model.config.is_encoder_decoder:
        ids = torch.full((len(batch["input_ids"]), 1), model.config.decoder_start_token_id)
    else:
        ids = batch["input_ids"]
    for _ in range(steps):
        inputs = {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
        ids = torch.cat([ids, model(**inputs, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("class_name", DECODERS)
def test_generate_equals_decoding_without_cache(class_name, cut_shapes, cache):
    model = cut_tiny(class_name, cut_shapes)
    model.generation_config.eos_token_id = None
    inputs = {k: v for k, v in tiny_batch(model, batch=2, padded=False).items() if k != "labels"}
    expected = greedy(model, inputs, 10)
    got = model.generate(**inputs, do_sample=False, max_new_tokens=10, cache_implementation=cache, disable_compile=True)
    assert got.tolist() == expected.tolist()


def test_training_after_the_cut(class_name, cut_shapes):
    """Gradients reach every remaining matrix, and one step against them lowers the loss."""
    model = cut_tiny(class_name, cut_shapes)
    batch = tiny_batch(model)

    def loss():
        output = model(**batch)
        return output.loss if getattr(output, "loss", None) is not None else output[0].square().mean()

    before = loss()
    before.backward()
    for site in describe(model).sites:
        if site.active:
            gradient = consumer(model, site).weight.grad
            assert gradient.shape == consumer(model, site).weight.shape
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0, site.name
    parameters = [p for p in model.parameters() if p.grad is not None]
    size = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
    torch.optim.SGD(parameters, lr=0.01 / size.item()).step()
    assert loss() < before


# --- prune() end to end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", ["uniform", "per_layer"])
def test_prune_and_repair(class_name, shapes):
    model = tiny(class_name)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    result = prune(model, data, PruningConfig(keep=0.6, metric="params", shapes=shapes))
    assert result.report["keep"] <= 0.6
    repairs = result.report["repairs"]
    active = {site.name for site in describe(model).sites if site.active}
    assert {r["site"] for r in repairs if r["accepted"]} <= active
    assert all(r["error_after"] <= r["error_before"] for r in repairs)
    assert improvement([r for r in repairs if r["site"] in active]) < 1
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    assert all(x.isfinite().all() for x in outputs(model, data[0]))


@pytest.mark.parametrize("repair", ["least_squares", "none"])
def test_flags_and_hooks_survive_the_cut(family, repair):
    """Training mode, a frozen parameter, trainable ones (also those that were cut) and hooks are as before."""
    model = tiny(CLASSES[family][0]).train()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    prune(model, data, PruningConfig(keep=0.7, metric="params", shapes="uniform", repair=repair))
    assert not {"training", "requires_grad", "hooks"} & set(changed(before, model))


@pytest.mark.parametrize("class_name", FIRST)
def test_prune_and_repair_in_bfloat16(class_name):
    model = tiny(class_name).to(torch.bfloat16)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    result = prune(model, data, PruningConfig(keep=0.6, metric="params", shapes="per_layer"))
    assert improvement(result.report["repairs"]) < 1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(x.isfinite().all() for x in outputs(model, data[0]))


@pytest.mark.parametrize("class_name", FIRST)
def test_repair_brings_the_output_closer(class_name):
    """On fresh rows of the same kind, the repaired model is nearer to the dense one than the plain cut."""
    dense = tiny(class_name)
    data = [tiny_batch(dense, batch=32, seed=seed) for seed in range(6)]
    fresh = tiny_batch(dense, batch=32, seed=99, padded=False)
    wanted = outputs(dense, fresh)
    gaps = {}
    for repair in ("none", "least_squares"):
        model = copy.deepcopy(dense)
        prune(
            model,
            data,
            PruningConfig(keep=0.7, metric="params", shapes="uniform", criterion="magnitude", repair=repair),
        )
        gaps[repair] = sum((a - b).square().sum().item() for a, b in zip(outputs(model, fresh), wanted, strict=True))
    assert gaps["least_squares"] < gaps["none"]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("criterion", sorted(name for name, row in CRITERIA.items() if not row.of))
@pytest.mark.parametrize("class_name", ONE_OF_EACH_KIND)
def test_every_criterion_in_every_shape(class_name, criterion, shapes):
    model = tiny(class_name)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    result = prune(model, data, PruningConfig(keep=0.75, metric="params", shapes=shapes, criterion=criterion))
    assert result.report["keep"] <= 0.75
    assert result.report["criterion"] == criterion
    assert not result.plan.is_identity
    assert all(x.isfinite().all() for x in outputs(model, data[0]))


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_bias_repair_touches_only_biases(class_name):
    model = tiny(class_name)
    plain = copy.deepcopy(model)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    shared = {"keep": 0.7, "metric": "params", "shapes": "uniform", "criterion": "magnitude"}
    prune(plain, data, PruningConfig(**shared, repair="none"))
    repairs = prune(model, data, PruningConfig(**shared, repair="bias")).report["repairs"]
    assert improvement(repairs) < 1
    old, new = plain.state_dict(), model.state_dict()
    differ = {key for key in old if not torch.equal(old[key], new[key])}
    assert differ
    assert all(key.endswith("bias") for key in differ)


def test_data_is_not_modified(family):
    model = tiny(CLASSES[family][0])
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    copies = copy.deepcopy(data)
    prune(model, data, PruningConfig(keep=0.7, metric="params", shapes="uniform"))
    for batch, original in zip(data, copies, strict=True):
        assert batch.keys() == original.keys()
        assert all(torch.equal(batch[key], original[key]) for key in original)


@pytest.mark.parametrize(
    ("class_name", "criterion"),
    [
        ("BertForSequenceClassification", "fisher_obs"),
        ("BertForQuestionAnswering", "fisher_obs"),
        ("ViTForImageClassification", "fisher_obs"),
        ("BertForTokenClassification", "fisher_obs_root"),
        ("BertForMaskedLM", "fisher_obs_root"),
        ("LlamaForCausalLM", "fisher_obs_root"),
    ],
)
def test_the_loss_picks_the_criterion(class_name, criterion):
    model = tiny(class_name)
    assert analyze(model, [tiny_batch(model)], PruningConfig(keep=1.0)).config.criterion == criterion


def test_no_head_picks_hessian():
    model = transformers.BertModel(tiny("BertForMaskedLM").config).eval()
    batch = {k: v for k, v in tiny_batch(model, batch=32).items() if k != "labels"}
    data = [batch, *(tiny_batch(model, batch=32, seed=s) for s in (1, 2, 3))]
    result = prune(model, data, PruningConfig(keep=0.7, metric="params"))
    assert result.report["criterion"] == "hessian"


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_nothing_is_scored_on_a_guard(class_name):
    model = tiny(class_name)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(4)]
    other = [tiny_batch(model, batch=32, seed=9)]
    config = PruningConfig(keep=0.75, metric="params", shapes="uniform")
    alone, guarded = analyze(model, data, config), analyze(model, data, config, guard=other)
    assert [batch.held_out.unique().tolist() for batch in guarded.batches][-1] == [2]
    assert all(torch.equal(score, guarded.scores[key]) for key, score in alone.scores.items())


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_cuts_are_compared_on_the_guard(class_name):
    """And on the rows held out of the calibration data where there is none."""
    model = tiny(class_name)
    other = tiny_batch(model, 8, seed=9)
    drawn = draw(model, [tiny_batch(model, batch=32, seed=s) for s in range(4)], 128, 0, guard=[other])
    home = Judge.of(model, [batch for batch in drawn if (batch.held_out < 2).all()])
    away = Judge.of(model, [prepare(model, other, torch.full((8,), 2))])
    judge = Judge.of(model, drawn)
    assert judge.dense == judge(model) == pytest.approx(away.dense)
    assert judge.dense != pytest.approx(home.dense)


HOME, AWAY = range(5, 50), range(50, 99)  # two vocabularies
SILENT_AWAY = {  # class -> (embedding, what opens a neuron, consumer), by path from the one layer's model
    "BertForSequenceClassification": ("bert.embeddings.word_embeddings", "bert.encoder.layer.0.intermediate.dense",
                                      "bert.encoder.layer.0.output.dense"),
    "LlamaForCausalLM": ("model.embed_tokens", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"),
}  # fmt: skip


@pytest.mark.parametrize("class_name", list(SILENT_AWAY))
def test_a_guard_refuses_a_repair_that_only_helps_at_home(class_name):
    """The cut neurons are silent on the guard's words: there the plain cut is exact, and a refit can only harm."""
    model = tiny(class_name, num_hidden_layers=1)
    (embedding, opens), path = map(model.get_submodule, SILENT_AWAY[class_name][:2]), SILENT_AWAY[class_name][-1]
    gone = range(24, 48)
    with torch.no_grad():  # the first channel tells the vocabularies apart, and opens the neurons
        embedding.weight[:, 0] = torch.where(torch.arange(99) < AWAY.start, 3.0, -3.0)
        opens.weight[gone, 0] = 40.0
    plan = PruningPlan(
        model.config.model_type,
        tuple(
            keep(site) if site.inner.mixes else keep(site, [i for i in range(48) if i not in gone])
            for site in describe(model).sites
        ),
    )

    def texts(seed, words):
        batch = tiny_batch(model, batch=32, seed=seed, padded=False)
        drawn = torch.randint(words.start, words.stop, (32, 12), generator=torch.Generator().manual_seed(seed))
        return {**batch, "input_ids": drawn, **({"labels": drawn} if batch["labels"].dim() == 2 else {})}

    home, away = [texts(seed, HOME) for seed in range(4)], texts(9, AWAY)
    plain, free, bound = (copy.deepcopy(model) for _ in range(3))
    prune(plain, home, PruningConfig(repair="none"), plan=plan)
    (alone,) = prune(free, home, PruningConfig(), plan=plan).report["repairs"]
    (guarded,) = prune(bound, home, PruningConfig(), plan=plan, guard=[away]).report["repairs"]
    assert (alone["accepted"], guarded["accepted"]) == (True, False)
    assert torch.equal(bound.get_submodule(path).weight, plain.get_submodule(path).weight)
    dense = outputs(model, away)
    assert distance(outputs(bound, away), dense) <= 1e-4 < 1e-2 < distance(outputs(free, away), dense)


def test_repairs_of_language_models_weigh_all_tokens_alike():
    """Each token predicts the next: none is more real than another. A classifier's tokens differ."""
    for class_name, weighed in (
        ("LlamaForCausalLM", False),
        ("BertForMaskedLM", False),
        ("BertForSequenceClassification", True),
    ):
        model = tiny(class_name)
        found = analyze(model, [tiny_batch(model, batch=32)], PruningConfig(keep=0.75, metric="params"))
        assert bool(found.tokens) == weighed, class_name


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_a_replayed_plan_gives_the_same_model(class_name):
    model = tiny(class_name)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(2)]
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    plan = prune(first, data, PruningConfig(keep=0.75, metric="params", shapes="uniform")).plan
    prune(second, data, plan=plan)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
