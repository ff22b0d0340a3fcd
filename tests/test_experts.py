"""Mixtures of experts: what a token's experts give, taken apart; scores, refits, counts, and bad input."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from tiny import distance, keep, outputs, tiny_batch, tiny_model
from transformers import TrainingArguments, default_data_collator

from hf_prune import PruningConfig, PruningPlan, PruningTrainer, describe, prune, save_pretrained
from hf_prune.decide.allocate import allocate
from hf_prune.model.batches import draw
from hf_prune.model.experts import Call, contributions, down_matrices, gated, set_down_matrices_, slots
from hf_prune.oneshot import analyze
from hf_prune.repair.experts import Routed, refit_experts
from hf_prune.repair.walk import improvement
from hf_prune.score.criteria import CRITERIA
from hf_prune.score.losses import example_losses
from hf_prune.score.statistics import gated as gated_sites
from hf_prune.score.statistics import gradients, statistics

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "ernie4_5_moe")
EIGHT = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}


def experts_in(model):
    return [site for site in describe(model).sites if site.routed]


def data_for(model, batches=4, rows=32):
    return [tiny_batch(model, batch=rows, seed=seed) for seed in range(batches)]


def eager(model):
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return model


def called(model, site, batch):
    """The module, what it is called with, and what it gives."""
    module, seen = model.get_submodule(f"{site.path}.{site.consumer}"), []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return module, Call.of(seen[0][0]), seen[0][1]


# --- taken apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_the_parts_make_the_whole(family):
    model = eager(tiny_model(family)).double()
    site = experts_in(model)[0]
    module, call, whole = called(model, site, tiny_batch(model))
    assert distance([contributions(module, call).sum(1)], [whole]) <= 1e-10
    inputs, index = slots(module, call)
    matrices = down_matrices(module)
    again = torch.einsum("nks,nkds->nd", inputs, matrices[index])
    assert distance([again], [whole.float()]) <= 1e-4


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_down_projections_go_back_as_they_came(family):
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for site in experts_in(model):
        module = model.get_submodule(f"{site.path}.{site.consumer}")
        set_down_matrices_(module, down_matrices(module))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gates_at_one_change_nothing_and_leave_nothing():
    model = tiny_model("mixtral")
    site, batch = experts_in(model)[0], tiny_batch(model)
    module, dense = model.get_submodule(f"{site.path}.{site.consumer}"), outputs(model, batch)
    for units in (4, site.sizes["neurons"]):
        with gated(module, torch.ones(8, units)):
            assert distance(outputs(model, batch), dense) <= 1e-5
        assert "forward" not in vars(module)


@pytest.mark.parametrize("axis", ["experts", "neurons"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_of_gates_are_finite_differences(family, axis):
    model = eager(tiny_model(family)).double()
    sites, batch = experts_in(model), draw(model, data_for(model), 32, 0, None, None)[0]
    units = {site.key: site.sizes[axis] for site in sites}
    found, site = gradients(model, sites, units, batch).gates, sites[-1]
    unit = int(found[site.key].square().sum(0).argmax())

    def losses(step):
        gate = torch.ones(batch.size, units[site.key])
        gate[:, unit] += step
        with gated_sites(model, {site.key: gate}, [site]), torch.no_grad():
            return example_losses(model, model(**batch.inputs), batch)

    slope = (losses(1e-2) - losses(-1e-2)) / 2e-2
    assert float((slope - found[site.key][:, unit]).abs().max()) <= 2e-3 * float(slope.abs().max())


# --- scores -----------------------------------------------------------------------------------------------------------


def test_statistics_of_whole_experts_are_those_of_their_outputs():
    model = eager(tiny_model("mixtral"))
    site, batch = experts_in(model)[0], {**tiny_batch(model, batch=16, padded=False)}
    batches = draw(model, [batch], 16, 0, None, None)
    passes = statistics(model, [site], {site.key: "experts"}, batches, CRITERIA["hessian"], 0)
    ((_, (found,)),) = passes
    module, call, _ = called(model, site, batches[0].inputs)
    made, flat = contributions(module, call), call.index.flatten()
    each = torch.zeros(len(made), 4, made.shape[-1])
    each.scatter_add_(1, call.index[..., None].expand(-1, -1, made.shape[-1]), made)
    assert torch.allclose(found.gram, torch.einsum("ned,nfd->ef", each, each) / len(made), atol=1e-5)
    assert torch.equal(found.seen, torch.bincount(flat, minlength=4).float())
    norms = [each[:, e].norm(dim=1).sum() / found.seen[e] for e in range(4)]
    assert torch.allclose(found.saliency, torch.stack(norms), atol=1e-5)


def test_statistics_of_an_experts_neurons_are_those_of_its_tokens():
    model = eager(tiny_model("mixtral"))
    site = experts_in(model)[0]
    batches = draw(model, [tiny_batch(model, batch=16, padded=False)], 16, 0, None, None)
    ((_, found),) = statistics(model, [site], {site.key: "neurons"}, batches, CRITERIA["hessian"], 0)
    module, call, _ = called(model, site, batches[0].inputs)
    inputs, index = slots(module, call)
    for expert, each in enumerate(found):
        rows = inputs[index == expert]
        assert torch.allclose(each.gram, rows.T @ rows / len(inputs), atol=1e-5)
        assert each.units == site.share


def trained_on_few(model):
    """A router that almost never chooses the last expert."""
    with torch.no_grad():
        for site in experts_in(model):
            router = model.get_submodule(f"{site.path}.mlp.gate")
            router.weight[-1] = 0
            router.weight[:-1] *= 20
    return model


@pytest.mark.parametrize("criterion", ["reap", "fisher", "hessian", "frequency", "fisher_joint", "activation"])
def test_experts_that_see_too_few_tokens_are_said_and_go_first(criterion):
    model = trained_on_few(tiny_model("mixtral", **EIGHT))
    config = PruningConfig(keep=0.9, metric="params", units=["experts"], criterion=criterion)
    with pytest.warns(UserWarning, match=r"experts in .* see fewer than 32 calibration tokens"):
        found = analyze(model, data_for(model, 1, 16), config)
    for scores in found.scores.values():
        if len(scores) == 8:
            assert int(scores.argmin()) in scores.argsort()[:3].tolist()
            assert bool(scores.isfinite().all())


def test_only_experts_are_scored_by_what_is_made_for_them():
    model = tiny_model("mixtral")
    for units in (["experts", "heads"], ["neurons"], None):
        config = PruningConfig(keep=0.9, units=units, criterion="reap")
        with pytest.raises(ValueError, match=r"criterion='reap' scores experts alone, and .* may go too"):
            prune(model, data_for(model), config)
    assert analyze(model, data_for(model), PruningConfig(keep=0.9, metric="params", units=["experts"])).config.criterion


# --- counts -----------------------------------------------------------------------------------------------------------


def reachable_least(model, **options):
    config = PruningConfig(keep=0.01, metric="params", units=["experts"], criterion="random", **options)
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        prune(model, data_for(model), config)
    return str(caught.value)


def test_no_fewer_experts_than_a_token_goes_through():
    model = tiny_model("mixtral", **EIGHT)
    anatomy = describe(model)
    flat = {
        site.key: torch.ones(site.sizes[site.inner.name if not site.routed else "experts"]) for site in anatomy.sites
    }
    least = float(reachable_least(model).split("the least is ")[1][:5]) + 0.001
    plan = allocate(anatomy, flat, PruningConfig(keep=least, metric="params", units=["experts"], scope="blocks"), 1)
    assert {len(plan[site.key].kept) for site in anatomy.sites if site.routed} == {2}


def test_experts_in_groups_stay_as_many_in_each(tmp_path):
    """DeepSeek-V3 chooses groups of experts first: as many must stay in each of them."""
    model = tiny_model("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2)
    data = data_for(model)
    least = float(reachable_least(model, scope="model").split("the least is ")[1][:5]) + 0.001
    result = prune(model, data, PruningConfig(keep=least, metric="params", scope="model", units=["experts"]))
    for site in (site for site in result.plan.sites if site.where[2] == "experts"):
        assert [sum(unit // 4 == group for unit in site.kept) for group in (0, 1)] == [2, 2]
    save_pretrained(model, tmp_path / "m", data)
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert again.config.n_routed_experts == 4
    assert distance(outputs(again, data[0]), outputs(model, data[0])) <= 1e-5


def test_shared_experts_get_narrower_with_the_others(tmp_path):
    """Two shared experts are one FFN, twice as wide as the key says."""
    model = tiny_model("deepseek_v3", n_shared_experts=2, moe_intermediate_size=32)
    data = data_for(model)
    config = PruningConfig(keep=0.9, metric="params", units=["neurons"], align=8)
    kept = {k.where[2]: len(k.kept) for k in prune(model, data, config).plan.sites}
    width = model.config.moe_intermediate_size
    assert width < 32
    assert (kept["experts"], kept["shared_ffn"]) == (4 * width, 2 * width)
    save_pretrained(model, tmp_path / "m", data)
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, data[0]), outputs(model, data[0])) <= 1e-5


def test_whole_experts_cost_parameters_narrower_ones_multiply_adds():
    model = tiny_model("mixtral", **EIGHT)
    units = {
        metric: analyze(model, data_for(model), PruningConfig(keep=0.9, metric=metric)).plan()
        for metric in ("macs", "params")
    }
    named = {metric: {k.axis for k in plan.sites if k.where[2] == "experts"} for metric, plan in units.items()}
    assert named == {"macs": {"neurons"}, "params": {"experts"}}


def test_neurons_in_unequal_numbers_are_refused():
    model = tiny_model("mixtral")
    kept = tuple(keep(site, [0, 1, *range(48, 192)]) if site.routed else keep(site) for site in describe(model).sites)
    with pytest.raises(ValueError, match="all remaining experts must keep the same number of neurons"):
        prune(model, data_for(model), plan=PruningPlan("mixtral", kept))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_experts_to_remove(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=r"no experts of this \w+ can go: its row has none. Here are .*layers, tokens"):
        prune(model, data_for(model), PruningConfig(keep=0.9, units=["experts"]))


# --- cut, repaired, saved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("units", ["experts", "neurons"])
def test_half_of_the_experts_are_repaired_and_reopen(tmp_path, family, units):
    model = tiny_model(family)
    data = data_for(model)
    config = PruningConfig(keep=0.01, metric="params", units=[units], align=8)
    with pytest.raises(ValueError) as caught:
        prune(copy.deepcopy(model), data, config)
    least = float(str(caught.value).split("the least is ")[1][:5])
    config = PruningConfig(**{**config.to_dict(), "keep": (least + 1) / 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # far below, few tokens a column
        report = prune(model, data, config).report
    assert any(repair.get("experts") for repair in report["repairs"])
    assert improvement(report["repairs"]) < 1
    save_pretrained(model, tmp_path / "m", data)
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, data[0]), outputs(model, data[0])) <= 1e-5
    assert getattr(model, "num_experts", None) in (None, experts_in(model)[0].sizes["experts"])


def test_narrower_and_then_fewer_is_one_plan():
    model = tiny_model("mixtral")
    data = data_for(model)
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for units in (["neurons"], ["experts"]):
            prune(model, data, PruningConfig(keep=0.8, metric="params", units=units, align=8, repair="none"))
        prune(dense, data, PruningConfig(keep=0.8, repair="none"), plan=model._hf_prune.plan)
    assert distance(outputs(model, data[0]), outputs(dense, data[0])) <= 1e-5


def routed(matrices, neurons, experts=4, tokens=600, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(tokens)])
    inputs = torch.randn(tokens, 2, neurons, generator=generator)
    wanted = torch.einsum("nks,nkds->nd", inputs, matrices[index])
    sets = torch.arange(tokens) % 5 // 4
    return Routed(inputs, index, wanted, torch.zeros_like(wanted), sets)


def test_the_refit_finds_what_made_the_outputs():
    true = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    found = refit_experts(true + 0.5, routed(true, 5))
    assert found.accepted == 4
    assert found.error_after < 1e-3 * found.error_before
    assert float((found.matrices - true).abs().max()) <= 0.05


def test_the_refit_of_all_experts_is_the_dense_least_squares():
    """Two sweeps come close to one solve for all experts at once, whose columns are each token's two blocks."""
    true = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
    whole = routed(true, 8)
    fewer = Routed(whole.inputs[..., :5], whole.index, whole.own, whole.residual, whole.sets)
    found = refit_experts(true[..., :5].clone(), fewer)
    design = torch.zeros(len(fewer.inputs), 4, 5)
    design.scatter_add_(1, fewer.index[..., None].expand(-1, -1, 5), fewer.inputs)
    design, rows = design.flatten(1).double(), fewer.sets == 0
    solved = torch.linalg.lstsq(design[rows], fewer.own[rows].double()).solution
    best = float((design @ solved - fewer.own)[fewer.sets == 1].square().sum(1).mean())
    assert found.error_after <= 1.05 * best


def test_a_refit_that_helps_no_held_out_row_is_refused():
    true = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    whole = routed(true, 5)
    found = refit_experts(true.clone(), whole)
    assert found.accepted == 0
    assert torch.equal(found.matrices, true)


def test_a_mixture_is_trained_back_with_its_loss_over_experts(tmp_path):
    """Two rounds, each of which takes experts away; the loss that balances them knows how many are left."""
    model = tiny_model("mixtral", num_local_experts=8, output_router_logits=True)
    batch = tiny_batch(model, batch=64, padded=False)
    data = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    pruning = PruningConfig(keep=0.55, metric="params", units=["experts"], rounds=2)
    trainer = PruningTrainer(
        model=model, args=args, train_dataset=data, data_collator=default_data_collator, pruning=pruning
    )
    trainer.train()
    left = {site.sizes["experts"] for site in experts_in(trainer.model)}
    assert left == {trainer.model.config.num_local_experts} == {trainer.model.num_experts}
    assert max(left) < 8
    trainer.save_model(str(tmp_path / "small"))
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert distance(outputs(again, batch), outputs(trainer.model.eval(), batch)) <= 1e-5
