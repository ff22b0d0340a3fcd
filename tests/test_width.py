"""Hidden channels: a narrower stream is found, counted, cut, saved and opened, on every family whose row has it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import ALL_CLASSES, changed, distance, keep, outputs, snapshot, tiny_batch, tiny_model
from training import trainer

from hf_prune import DistillationConfig, PruningConfig, describe, prune, save_pretrained
from hf_prune.decide.costs import planned_sizes, report
from hf_prune.model.batches import draw, forward_inputs
from hf_prune.model.cut import index_of
from hf_prune.model.families import FAMILIES
from hf_prune.model.mask import masked
from hf_prune.model.sites import consumer, input_axis, tensor_of
from hf_prune.model.wide import HIDDEN
from hf_prune.plan import Kept, PruningPlan
from hf_prune.score.criteria import CRITERIA
from hf_prune.score.losses import example_losses
from hf_prune.score.width import gate_gradients, norms_of
from hf_prune.train.teacher import Teacher

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the macs .model. remains, where keep"),  # tiny streams go in large steps
    pytest.mark.filterwarnings("ignore:.*calibration tokens to refit"),
]
NARROW = [name for name, row in FAMILIES.items() if row.hidden]
CLASS_OF = {family: ALL_CLASSES[family][0] for family in NARROW}


@pytest.fixture(params=NARROW)
def model(request):
    return tiny_model(request.param, CLASS_OF[request.param])


def narrower(anatomy, kept):
    """A plan that keeps these channels, and as many heads as the stock class then has."""
    width, extent = len(kept), anatomy.extent(*HIDDEN)
    sites = []
    for site in anatomy.sites:
        whole = site.sizes[site.inner.name]
        units = whole if site.fits(site.sizes, width) else whole * width // extent.of
        sites.append(keep(site, range(units)))
    return PruningPlan(anatomy.model_type, (Kept(HIDDEN, "hidden", extent.of, tuple(kept)), *sites))


def halved(anatomy, seed=0):
    extent = anatomy.extent(*HIDDEN)
    count = 24 if 24 not in extent.never and 16 in extent.never else 16
    order = torch.randperm(extent.of, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist()), sorted(order[count:].tolist())


@torch.no_grad()
def doubled(model, kept, gone, read=False):
    """Make each channel that goes a copy of one that stays, which nothing reads unless asked: norms see the same
    statistics."""
    model = copy.deepcopy(model)
    copies = [kept[i % len(kept)] for i in range(len(gone))]
    for part in describe(model).extent(*HIDDEN).parts:
        values = tensor_of(model, part.tensor).movedim(part.dim, 0)
        if part.role == "reads":
            values[gone] *= read
        else:
            values[gone] = values[copies].clone()
    return model


def untied(family):
    return tiny_model(family, CLASS_OF[family], tie_word_embeddings=False)


@pytest.mark.parametrize("family", [f for f in NARROW if f != "electra"])  # half its width means something else
def test_channels_that_repeat_others_change_nothing(family):
    model = untied(family)
    anatomy, batch = describe(model), tiny_batch(model)
    kept, gone = halved(anatomy)
    plan, dense = narrower(anatomy, kept), doubled(model, kept, gone)
    heads = PruningPlan(plan.model_type, tuple(k for k in plan.kept if k.where != HIDDEN))
    with masked(dense, anatomy, heads):
        wanted = outputs(dense, batch)
    got = outputs(prune(dense, [batch], PruningConfig(repair="none"), plan=plan).model, batch)
    assert distance(got, wanted) <= 1e-4
    with masked(model, anatomy, heads):
        assert distance(outputs(model, batch), wanted) > 1e-2  # where nothing repeats, something is lost


def rows(model, count=16):
    return [tiny_batch(model, batch=32, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", [f for f in NARROW if f != "electra"])
def test_an_adapter_reads_the_dense_stream_in_the_narrow_one(family):
    """Of channels that repeat others all can be recovered, whatever is read of them."""
    model = untied(family)
    kept, gone = halved(describe(model))
    dense = doubled(model, kept, gone, read=True)
    anatomy, data = describe(dense), rows(dense)
    plan = narrower(anatomy, kept)
    for site in anatomy.sites:
        unread = [*range(len(plan[site.key].kept) * site.widths[site.inner.name], site.columns)]
        weight = consumer(dense, site).weight.data
        weight.index_fill_(input_axis(consumer(dense, site)), torch.tensor(unread, dtype=torch.long), 0)
    wanted = outputs(dense, data[0])
    plain = outputs(prune(copy.deepcopy(dense), data, PruningConfig(repair="none"), plan=plan).model, data[0])
    got = outputs(prune(dense, data, PruningConfig(), plan=plan).model, data[0])
    assert distance(got, wanted) <= 0.1 * distance(plain, wanted)


def test_costs_are_those_of_the_model_that_is_left(model):
    anatomy = describe(model)
    plan = narrower(anatomy, halved(anatomy)[0])
    told = report(anatomy, planned_sizes(anatomy, plan), 12)
    prune(model, [tiny_batch(model)], PruningConfig(repair="none"), plan=plan)
    left = describe(model)
    assert told == report(left, left.sizes, 12)


def test_a_narrower_model_reopens_in_its_stock_class(model, tmp_path):
    batch, anatomy = tiny_batch(model), describe(model)
    prune(model, [batch], PruningConfig(repair="none"), plan=narrower(anatomy, halved(anatomy)[0]))
    assert model.config.hf_prune["shapes"] == "stock"
    save_pretrained(model, tmp_path / "m", [batch])
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, batch), outputs(model, batch)) <= 1e-6
    assert describe(again).sizes == describe(model).sizes


def test_all_channels_kept_change_nothing(model):
    before, anatomy = snapshot(model), describe(model)
    prune(model, [tiny_batch(model)], PruningConfig(), plan=narrower(anatomy, range(anatomy.extent(*HIDDEN).of)))
    assert list(changed(before, model)) == []


def test_a_plan_of_channels_is_read_back_composed_and_told(model):
    anatomy = describe(model)
    plan = narrower(anatomy, halved(anatomy)[0])
    assert PruningPlan.from_json(plan.to_json()) == plan
    count, of = len(plan[HIDDEN].kept), plan[HIDDEN].of
    assert plan.summary().splitlines()[0] == f"hidden: {count} of {of}"
    then = PruningPlan(plan.model_type, (Kept(HIDDEN, "hidden", count, tuple(range(1, 9))),))
    assert plan.compose(then)[HIDDEN].kept == plan[HIDDEN].kept[1:9]
    assert next(iter(plan.diff(plan.compose(then))))[0] == HIDDEN


def test_a_cut_that_is_stopped_leaves_all_as_it_was(model, monkeypatch):
    anatomy, before = describe(model), snapshot(model)
    monkeypatch.setattr("hf_prune.oneshot.write_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(model, [tiny_batch(model)], PruningConfig(repair="none"), plan=narrower(anatomy, halved(anatomy)[0]))
    assert list(changed(before, model)) == []


def test_parts_cover_every_tensor_that_follows_the_width(model):
    """A part too few leaves a tensor at its dense size, which the stock class does not load."""
    extent = describe(model).extent(*HIDDEN)
    index = index_of(extent.parts[0], {"hidden": [0]}, {"hidden": extent.of}, {"hidden": 1})
    assert index.tolist() == [0]
    assert all(tensor_of(model, part.tensor).shape[part.dim] == extent.of for part in extent.parts)


@pytest.mark.parametrize(("family", "count"), [("bert", 20), ("llama", 18), ("electra", 16)])
def test_a_width_that_the_class_cannot_say_is_refused(family, count):
    model = tiny_model(family, CLASS_OF[family])
    before, anatomy = snapshot(model), describe(model)
    kept = (Kept(HIDDEN, "hidden", anatomy.extent(*HIDDEN).of, tuple(range(count))), *map(keep, anatomy.sites))
    with pytest.raises(ValueError, match="hidden channels"):
        prune(model, [tiny_batch(model)], PruningConfig(), plan=PruningPlan(anatomy.model_type, kept))
    assert list(changed(before, model)) == []


# --- decided by prune() ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [["hidden"], ["hidden", "neurons"]])
def test_prune_reaches_a_budget_by_width(model, units, tmp_path):
    data = rows(model, 2)
    config = PruningConfig(keep=0.6, units=units, align=2 if model.config.model_type == "electra" else None)
    result = prune(model, data, config)
    assert result.report["keep"] <= 0.6
    left = describe(model)
    assert result.report["after"] == report(left, left.sizes, 128)
    assert model.config.hf_prune["shapes"] == "stock"
    save_pretrained(model, tmp_path / "m", data)
    assert units != ["hidden"] or not result.plan[HIDDEN].is_identity
    assert result.scores[HIDDEN].shape == (result.plan[HIDDEN].of,)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("repair", ["least_squares", "rescale", "none"])
def test_channels_go_with_layers(family, repair, tmp_path):
    model = tiny_model(family, CLASS_OF[family], **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    data, anatomy = rows(model, 2), describe(model)
    whole, stack = narrower(anatomy, halved(anatomy)[0]), anatomy.extents[0]
    left = [kept for kept in whole.kept if len(kept.where) < 3 or kept.where[1] in (1, 3)]
    plan = PruningPlan(whole.model_type, (*left, Kept(stack.where, "layers", 4, (1, 3))))
    told = report(anatomy, planned_sizes(anatomy, plan), 12)
    prune(model, data, PruningConfig(repair=repair), plan=plan)
    after = describe(model)
    assert told == report(after, after.sizes, 12)
    save_pretrained(model, tmp_path / "m", data)


def test_layers_channels_and_neurons_share_a_budget():
    model = tiny_model("llama", CLASS_OF["llama"], num_hidden_layers=4)
    units = ["hidden", "layers", "neurons"]
    result = prune(model, rows(model, 2), PruningConfig(keep=0.5, units=units, metric="params", candidates=3))
    assert result.report["keep"] <= 0.5
    assert len(result.report["divisions"]) == 3


@pytest.mark.parametrize("criterion", sorted(name for name, row in CRITERIA.items() if not row.of))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_criterion_scores_channels(family, criterion):
    model = tiny_model(family, CLASS_OF[family])
    result = prune(model, rows(model, 1), PruningConfig(keep=0.7, units=["hidden"], criterion=criterion))
    assert len(result.plan[HIDDEN].kept) < 32


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_gradients_of_gates_are_finite_differences(family):
    model = tiny_model(family, CLASS_OF[family]).double()
    (batch,) = prepared(model)
    extent, channel, step = describe(model).extent(*HIDDEN), 5, 1e-2
    found = gate_gradients(model, extent, batch)[:, channel]

    def losses(factor):
        def scaled(module, args, output):
            return output * torch.ones(extent.of).index_fill(0, torch.tensor([channel]), factor).to(output)

        handles = [model.get_submodule(path).register_forward_hook(scaled) for path in norms_of(model, extent)]
        with torch.no_grad():
            loss = example_losses(model, model(**forward_inputs(model, batch)), batch)
        for handle in handles:
            handle.remove()
        return loss

    wanted = (losses(1 + step) - losses(1 - step)) / (2 * step)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)


def prepared(model):
    return draw(model, [tiny_batch(model)], 8, 0)


def test_heads_of_a_stock_bert_go_with_its_channels():
    model = tiny_model("bert", CLASS_OF["bert"])
    result = prune(model, rows(model, 2), PruningConfig(keep=0.6, units=["hidden"]))
    heads = {len(kept.kept) for kept in result.plan.sites if kept.where[2] == "attention"}
    assert heads == {len(result.plan[HIDDEN].kept) // 8} == {model.config.num_attention_heads}


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"shapes": "per_layer"}, {"shapes": "uniform"}, {"metric": "latency"}])
def test_a_stream_has_one_width_in_stock_shapes(changes):
    with pytest.raises(ValueError, match="a stream has one width"):
        PruningConfig(units=["hidden"], **changes)


def test_a_family_without_a_width_says_which_have_one():
    model = tiny_model("t5", ALL_CLASSES["t5"][0])
    with pytest.raises(ValueError, match=r"cannot become narrower.*bert.*llama.*neurons"):
        prune(model, rows(model, 1), PruningConfig(units=["hidden"]))


def test_a_budget_out_of_reach_says_the_least():
    model = tiny_model("llama", CLASS_OF["llama"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cannot be reached.*of 32 hidden"):
        prune(model, rows(model, 1), PruningConfig(keep=0.01, units=["hidden"]))
    assert list(changed(before, model)) == []


def test_a_narrow_student_learns_from_its_dense_teacher(tmp_path):
    """Hidden states are compared at the channels that it kept."""
    model = tiny_model("bert", CLASS_OF["bert"])
    dense = copy.deepcopy(model)
    prune(model, rows(model, 2), PruningConfig(keep=0.6, units=["hidden"]))
    teacher = Teacher(model, dense, DistillationConfig())
    (batch,) = prepared(model)
    with teacher.watched(model) as ours:
        loss, _ = teacher.loss(model, model(**forward_inputs(model, batch)), batch, ours)
    assert loss.isfinite()
    stranger = tiny_model("bert", CLASS_OF["bert"], hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="no plan says which channels"):
        Teacher(stranger, dense, DistillationConfig())


@pytest.mark.filterwarnings("ignore:.*of the macs .blocks. remains")
@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_two_rounds_of_a_narrower_stream_with_a_teacher(class_name, tmp_path):
    run = trainer(
        tmp_path, class_name, pruning={"units": ["hidden", "neurons"], "shapes": "stock", "keep": 0.5, "rounds": 2},
        distillation=DistillationConfig(),
    )  # fmt: skip
    run.train()
    plan = run.model._hf_prune.plan
    assert len(plan[HIDDEN].kept) == run.model.config.hidden_size < plan[HIDDEN].of == 32
    run.save_model(tmp_path / "m")
    again = type(run.model).from_pretrained(tmp_path / "m").eval()
    batch = tiny_batch(run.model)
    assert distance(outputs(again, batch), outputs(run.model.eval(), batch)) <= 1e-5
