"""The closed forms, each against a direct computation in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import singles, tiny, tiny_batch
from torch.nn import functional

from hf_prune import describe
from hf_prune.decide.prices import next_to_try, prices
from hf_prune.model.batches import draw, even_positions
from hf_prune.model.sites import consumer, tensor_of
from hf_prune.repair.solve import (
    ChannelSums,
    Moments,
    fold,
    refit,
    refit_channels,
    rescale,
    shift_bias,
    solve,
    token_weights,
)
from hf_prune.repair.walk import matrix_of, set_matrix_
from hf_prune.score.criteria import (
    CRITERIA,
    REPRESENTATION,
    SiteStatistics,
    activation,
    falling,
    fisher_joint,
    fisher_obs,
    fisher_obs_root,
    fluctuation,
    hessian,
    kprune,
    magnitude,
    random,
)
from hf_prune.score.losses import _draw
from hf_prune.score.statistics import Sums, gradients, rows_of, statistics

N, K, S, D = 200, 12, 7, 5  # tokens, dense columns, kept columns, outputs


class Layer:
    """A consumer, its inputs, and a residual: all of what a refit sees."""

    def __init__(self, seed=0, has_bias=True, tokens=N):
        g = torch.Generator().manual_seed(seed)
        mix = torch.randn(K, K, generator=g)
        self.x = torch.randn(tokens, K, generator=g) @ mix + 0.5
        self.weight = torch.randn(D, K, generator=g)
        self.bias = torch.randn(D, generator=g) if has_bias else None
        self.residual = 0.1 * torch.randn(tokens, D, generator=g)
        self.kept = [0, 2, 3, 6, 7, 9, 11]
        self.has_bias = has_bias

    @property
    def own(self):
        return functional.linear(self.x, self.weight, self.bias)

    @property
    def start(self):
        """The plain cut [D, S (+1)]."""
        cut = self.weight[:, self.kept]
        return torch.cat([cut, self.bias[:, None]], 1) if self.has_bias else cut

    @property
    def inputs(self):
        """A [n, S (+1)] in float64."""
        x = self.x[:, self.kept].double()
        return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) if self.has_bias else x

    @property
    def moments(self):
        m = Moments(D, S, self.has_bias, torch.device("cpu"))
        for rows in torch.arange(len(self.x)).chunk(3):
            m.add(self.x[rows][:, self.kept], self.own[rows], self.residual[rows])
        return m


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ridge", [0.001, 0.1, 10.0])
def test_refit_is_the_ridge_solution(has_bias, blend, ridge):
    """The same problem as one dense least-squares system with rows for the penalty; the bias has none."""
    layer = Layer(has_bias=has_bias)
    a, start = layer.inputs, layer.start.double()
    strength = (ridge * (a[:, :S] ** 2).sum(0).mean()).sqrt()
    penalty = torch.cat(
        [strength * torch.eye(S, dtype=torch.float64), torch.zeros(S, has_bias, dtype=torch.float64)], 1
    )
    target = (layer.own + blend * layer.residual).double()
    system, right = torch.cat([a, penalty]), torch.cat([target, strength * start[:, :S].T])
    expected = torch.linalg.lstsq(system, right).solution.T
    found = solve(layer.start, layer.moments, ridge, [blend])[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_refit_without_ridge_equals_the_hessian_form():
    """Own target, no ridge, no bias: W G_:S G_SS^-1."""
    layer = Layer(has_bias=False)
    gram = layer.x.double().T @ layer.x.double()
    kept = layer.kept
    expected = layer.weight.double() @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
    found = solve(layer.start, layer.moments, 1e-9, [0.0])[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_weights_of_tokens_are_those_of_weighted_least_squares():
    layer, weights = Layer(tokens=2000), torch.rand(2000, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    moments = Moments(D, S, True, torch.device("cpu"))
    moments.add(layer.x[:, layer.kept], layer.own, layer.residual, weights)
    root, target = weights.double().sqrt(), (layer.own + layer.residual).double()
    expected = torch.linalg.lstsq(layer.inputs * root, target * root).solution.T
    torch.testing.assert_close(solve(layer.start, moments, 1e-9, [1.0])[0].double(), expected, rtol=1e-3, atol=1e-3)
    error = ((layer.inputs @ expected.T - target).square() * weights).sum(1).mean()
    assert moments.error(expected) == pytest.approx(error.item(), rel=1e-3)


def test_token_weights_are_half_alike_and_half_by_gradient():
    squares = [torch.tensor([0.0, 2.0, 99.0]), torch.tensor([4.0, 2.0])]
    found = token_weights(squares, [torch.tensor([True, True, False]), None])
    assert torch.cat([found[0][:2], found[1]]).flatten().tolist() == [0.5, 1.0, 1.5, 1.0]
    assert token_weights([torch.zeros(3)], [None])[0].flatten().tolist() == [1.0, 1.0, 1.0]


def test_a_bert_classifier_reads_only_the_first_token_of_its_last_layer():
    model = tiny("BertForSequenceClassification")
    sites, drawn = describe(model).sites, draw(model, [tiny_batch(model)], 8, 0)
    units = {site.key: site.sizes[site.inner.name] for site in sites}
    found = gradients(model, sites, units, drawn[0]).tokens
    last = found[sites[-1].key].view(drawn[0].size, -1)
    assert (last[:, 0] > 0).all()
    assert not last[:, 1:].any()
    assert all((found[site.key].view(drawn[0].size, -1)[:, 1:] > 0).any() for site in sites[:2])


def test_products_of_output_gradients_are_summed_over_batches():
    model = tiny("BertForSequenceClassification")
    batch, sites = tiny_batch(model), describe(model).sites
    units = {site.key: site.sizes[site.inner.name] for site in sites}
    found = {site.key: torch.zeros(model.config.hidden_size, model.config.hidden_size) for site in sites}
    for part in draw(model, singles(batch), 8, 0):
        gradients(model, sites, units, part, outputs=found)
    for site in sites:
        seen = []
        handle = consumer(model, site).register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        loss = model(**batch).loss * len(batch["labels"])  # the sum over examples
        handle.remove()
        rows = torch.autograd.grad(loss, seen[0])[0].flatten(0, 1)
        torch.testing.assert_close(found[site.key], rows.T @ rows, rtol=1e-3, atol=1e-9)


def test_a_large_ridge_returns_the_original_weights_but_not_the_bias():
    layer = Layer()
    found = solve(layer.start, layer.moments, 1e4, [0.0])[0].double()
    torch.testing.assert_close(found[:, :S], layer.start[:, :S].double(), rtol=1e-3, atol=1e-3)
    mean_gap = (layer.own.double() - layer.inputs @ found.T).mean(0)
    torch.testing.assert_close(mean_gap, torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-2)


@pytest.mark.parametrize("has_bias", [True, False])
def test_moments_error_is_the_mean_square(has_bias):
    layer = Layer(has_bias=has_bias)
    weight = layer.start + 0.1
    direct = (layer.inputs @ weight.double().T - (layer.own + layer.residual).double()).square().sum(1).mean()
    assert layer.moments.error(weight) == pytest.approx(direct.item(), rel=1e-4)


def test_refit_picks_the_best_candidate_on_held_out_rows():
    layer = Layer(tokens=2000)
    held_out = Layer(tokens=2000).moments  # the same rows: the best of the grid is known
    result = refit(layer.start, layer.moments, [held_out])
    grid = [
        held_out.error(candidate)
        for ridge in (0.001, 0.01, 0.1, 1.0)
        for candidate in solve(layer.start, layer.moments, ridge, (0.0, 0.5, 1.0))
    ]
    assert result.accepted
    assert result.error_after == pytest.approx(min(grid))
    assert result.error_after < result.error_before == pytest.approx(held_out.error(layer.start))


def test_the_chosen_refit_is_fitted_to_the_held_out_rows_too():
    layer, other = Layer(tokens=2000), Layer(tokens=2000)
    other.x = other.x.flip(0) * 1.1
    result = refit(layer.start, layer.moments, [other.moments])
    both = Layer(tokens=4000)
    both.weight, both.bias = layer.weight, layer.bias
    both.x, both.residual = torch.cat([layer.x, other.x]), torch.cat([layer.residual, other.residual])
    expected = solve(layer.start, both.moments, result.ridge, [result.blend])[0]
    torch.testing.assert_close(result.weight, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("has_offset", "has_bias"), [(True, True), (False, True), (False, False)])
def test_a_folded_matrix_reads_what_the_adapter_gives(has_offset, has_bias):
    generator = torch.Generator().manual_seed(0)
    weight, bias, adapter, offset, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 4), (5, 1), (4, 3), (4, 1), (7, 3))
    )
    adapted = x @ adapter.T + (offset.T if has_offset else 0)
    expected = adapted @ weight.T + (bias.T if has_bias else 0)
    matrix = torch.cat([weight, bias], 1) if has_bias else weight
    found = fold(matrix, torch.cat([adapter, offset], 1) if has_offset else adapter, has_offset)
    assert found.shape == (5, 3 + has_bias)
    torch.testing.assert_close(x @ found[:, :3].T + (found[:, 3] if has_bias else 0), expected)


def test_refit_refuses_what_does_not_help():
    """Held-out rows where the plain cut is already exact: nothing can be better."""
    layer, other = Layer(), Layer(seed=1)
    cut = [c for c in range(K) if c not in layer.kept]
    other.weight, other.bias = layer.weight, layer.bias
    other.x[:, cut], other.residual = 0.0, torch.zeros(N, D)
    result = refit(layer.start, layer.moments, [other.moments])
    assert not result.accepted
    assert torch.equal(result.weight, layer.start)
    assert result.ridge is None


def test_a_refit_must_help_on_every_held_out_set():
    """A second source where the plain cut is exact refuses what the first would accept."""
    layer, other = Layer(tokens=2000), Layer(seed=1)
    cut = [c for c in range(K) if c not in layer.kept]
    other.weight, other.bias = layer.weight, layer.bias
    other.x[:, cut], other.residual = 0.0, torch.zeros(N, D)
    assert refit(layer.start, layer.moments, [layer.moments]).accepted
    assert not refit(layer.start, layer.moments, [layer.moments, other.moments]).accepted


def test_few_tokens_raise_the_ridge():
    layer = Layer(tokens=20)
    result = refit(layer.start, layer.moments, [layer.moments], blends=(0.0,), ridges=(0.01,))
    assert result.ridge == pytest.approx(0.01 * 10 * (S + 1) / 20)


def test_no_tokens_leave_the_plain_cut():
    """A sublayer that never runs (cross-attention of a lone decoder) is cut and nothing else."""
    layer, empty = Layer(), Moments(D, S, True, torch.device("cpu"))
    assert torch.equal(refit(layer.start, empty, [empty]).weight, layer.start)


def test_shift_bias_adds_the_mean_of_what_was_cut():
    layer = Layer(tokens=2000)
    layer.residual = torch.zeros_like(layer.residual)
    cut = [c for c in range(K) if c not in layer.kept]
    expected = layer.bias + layer.weight[:, cut] @ layer.x[:, cut].mean(0)
    result = shift_bias(layer.start, layer.moments, [layer.moments])
    torch.testing.assert_close(result.weight[:, -1].float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(result.weight[:, :-1].float(), layer.start[:, :-1])
    assert result.accepted


@pytest.mark.parametrize("has_bias", [True, False])
def test_rescale_is_least_squares_over_one_scale_a_unit(has_bias):
    """Seven units of one column; the fixed part of the output (the bias) is no unit."""
    layer = Layer(tokens=2000, has_bias=has_bias)
    weight, x = layer.start[:, :S].double(), layer.x[:, layer.kept].double()
    parts = torch.stack([x[:, [u]] * weight[:, u] for u in range(S)], -1)  # [n, D, S]: what each unit gives
    target = (layer.own + layer.residual).double() - (layer.bias.double() if has_bias else 0)
    expected = torch.linalg.lstsq(parts.flatten(0, 1), target.flatten()[:, None]).solution[:, 0]
    result = rescale(layer.start, layer.moments, [layer.moments], columns_a_unit=1)
    assert result.accepted
    torch.testing.assert_close(result.weight[:, :S], weight * expected, rtol=0.05, atol=0.05)
    assert torch.equal(result.weight[:, S:].float(), layer.start[:, S:])


@pytest.mark.parametrize(("factor", "accepted"), [(8.0, True), (12.0, False)])
def test_rescale_refuses_scales_beyond_ten(factor, accepted):
    """The target is the plain cut's own output times a factor, which is then every unit's scale."""
    layer = Layer(tokens=2000, has_bias=False)
    layer.residual = factor * layer.x[:, layer.kept] @ layer.start.T - layer.own
    result = rescale(layer.start, layer.moments, [layer.moments], columns_a_unit=1)
    assert result.accepted == accepted
    torch.testing.assert_close(result.weight.float(), layer.start * (factor if accepted else 1.0), rtol=0.05, atol=0.05)


def test_rescale_gives_all_columns_of_a_unit_one_scale():
    layer = Layer(tokens=2000, has_bias=False)
    layer.kept = [0, 1, 2, 6, 7, 8, 9]
    moments = Moments(D, 6, False, torch.device("cpu"))
    moments.add(layer.x[:, layer.kept[:6]], layer.own, layer.residual)
    start = layer.weight[:, layer.kept[:6]]
    result = rescale(start, moments, [moments], columns_a_unit=3)
    ratio = (result.weight / start).float()
    torch.testing.assert_close(ratio, ratio[:1, ::3].repeat_interleave(3, 1).expand(D, -1), rtol=1e-4, atol=1e-4)
    assert result.accepted


@pytest.mark.parametrize("with_shift", [True, False])
def test_refit_channels_is_one_regression_a_channel(with_shift):
    rng = np.random.default_rng(0)
    z = rng.normal(0.3, 1.0, (400, D))
    y = z * rng.normal(1, 0.5, D) + with_shift * rng.normal(0, 1, D) + rng.normal(0, 0.1, (400, D))
    sums = ChannelSums(D, torch.device("cpu"))
    for rows in np.array_split(np.arange(400), 3):
        sums.add(torch.tensor(z[rows]), torch.tensor(y[rows]))
    scale, shift = refit_channels(sums, [sums], with_shift)
    for channel in range(D):
        if with_shift:
            expected = np.polyfit(z[:, channel], y[:, channel], 1)
        else:
            expected = (np.linalg.lstsq(z[:, channel : channel + 1], y[:, channel], rcond=None)[0][0], 0.0)
        assert (scale[channel].item(), shift[channel].item()) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)
    direct = ((scale.numpy() * z + shift.numpy() - y) ** 2).sum(1).mean()
    assert sums.error(scale, shift) == pytest.approx(direct)


def test_refit_channels_refuses_what_does_not_help():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(400, D, generator=g)
    noisy, exact = ChannelSums(D, torch.device("cpu")), ChannelSums(D, torch.device("cpu"))
    noisy.add(z, 2 * z)
    exact.add(z, z)
    assert refit_channels(noisy, [exact], with_shift=True) is None


# --- criteria --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [12, 4])
def test_hessian_is_the_error_of_removing_a_unit_and_refitting(units):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(400, K, generator=g) @ torch.randn(K, K, generator=g)).double()
    weight = torch.randn(D, K, generator=g)
    gram = x.T @ x / len(x)
    found = hessian(SiteStatistics(units, weight, torch.ones(units), gram=gram.float()), damping=0.0)
    width = K // units
    for unit in range(units):
        others = [c for c in range(K) if c // width != unit]
        target = x @ weight.double().T
        solution = torch.linalg.lstsq(x[:, others], target).solution
        error = (x[:, others] @ solution - target).square().sum(1).mean()
        assert found[unit].item() == pytest.approx(error.item(), rel=1e-2)


def test_hessian_survives_a_singular_gram():
    gram = torch.zeros(4, 4)
    gram[0, 0] = 1.0
    assert hessian(SiteStatistics(4, torch.ones(2, 4), torch.ones(4), gram=gram)).isfinite().all()


def test_activation_fluctuation_and_magnitude_by_hand():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 6, generator=g) + 1, torch.randn(4, 6, generator=g)
    s = SiteStatistics(3, weight, torch.tensor([1.0, 4.0, 9.0]), mean=x.mean(0), square=x.square().mean(0))
    wanda = (weight.abs() * x.square().mean(0).sqrt()).sum(0).view(3, 2).sum(1)
    torch.testing.assert_close(activation(s), wanda)
    flap = (x.var(0, unbiased=False) * weight.square().sum(0)).view(3, 2).sum(1)
    torch.testing.assert_close(fluctuation(s), flap, rtol=1e-4, atol=1e-5)
    assert magnitude(s).tolist() == [1.0, 2.0, 3.0]


def test_combined_criteria_by_hand():
    g = torch.Generator().manual_seed(0)
    x, weight, gate = torch.randn(300, 6, generator=g), torch.randn(4, 6, generator=g), torch.rand(3, generator=g)
    s = SiteStatistics(3, weight, torch.ones(3), gate_square=gate, square=x.square().mean(0), gram=x.T @ x / 300)
    outputs = (x.square()[:, None] * weight.square()).mean((0, 1)).view(3, 2).sum(1)  # mean over tokens and outputs
    torch.testing.assert_close(kprune(s), gate / 2 + REPRESENTATION * outputs)
    product = gate * hessian(s)
    torch.testing.assert_close(fisher_obs(s), product / product.sum() * gate.sum())
    alone = ((x[:, None] * weight) ** 2).mean(0).sum(0).view(3, 2).sum(1)  # of each column, not taken over by others
    left = (gate * hessian(s) / alone).sum()
    torch.testing.assert_close(fisher_obs_root(s), product.sqrt() / product.sqrt().sum() * left)


def test_fisher_joint_is_the_loss_of_all_that_go_together():
    """For every count, the dense solve: half the trace of the output's Fisher times the residual covariance."""
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=g)
    x = torch.randn(500, 12, generator=g) @ mixing
    weight, directions = torch.randn(4, 12, generator=g), torch.randn(50, 4, generator=g)
    gram, output = x.T @ x / 500, directions.T @ directions / 50
    s = SiteStatistics(6, weight, torch.ones(6), gate_square=torch.rand(6, generator=g), gram=gram, output=output)
    score = fisher_joint(s, damping=0.0)
    order = fisher_obs(s).argsort(descending=True)
    assert score.argsort(descending=True).tolist() == order.tolist()
    losses = []
    for count in range(7):
        columns = [2 * int(u) + i for u in order[:count] for i in range(2)]
        kept, target = x[:, columns], x @ weight.T
        left = target - (kept @ torch.linalg.lstsq(kept, target).solution if count else 0)
        losses.append(0.5 * (left @ output * left).sum(1).mean())
    falls = -torch.stack(losses).diff()
    torch.testing.assert_close(score[order], falling(falls), rtol=1e-3, atol=1e-3)
    assert score.sum().item() == pytest.approx(losses[0].item(), rel=1e-3)


def test_falling_keeps_sums_and_order():
    assert falling(torch.tensor([3.0, 2.0, 1.0])).tolist() == pytest.approx([3, 2, 1], rel=1e-5)
    found = falling(torch.tensor([1.0, 3.0, 0.0, 0.5, 0.5, 0.2]))
    assert found.tolist() == pytest.approx([2, 2, 1 / 3, 1 / 3, 1 / 3, 0.2], rel=1e-5)
    assert (found.diff() < 0).all()
    assert (falling(torch.ones(1536, dtype=torch.float64)).float().diff() < 0).all()
    assert falling(torch.zeros(3)).tolist() == [0, 0, 0]


def test_units_that_stand_out_do_not_make_the_others_free():
    """One neuron with a thousand times the gradients and the inputs of 99 others: removing those costs what they have
    of the site's Fisher by its root, and next to nothing by the product."""
    scale = torch.ones(100)
    scale[0] = 1000
    gram = torch.diag(scale) + 1e-6
    s = SiteStatistics(100, torch.ones(4, 100), torch.ones(100), gate_square=scale, gram=gram)
    shares = [score(s)[1:].sum() / scale.sum() for score in (fisher_obs, fisher_obs_root)]
    assert shares[0] < 1e-3
    assert 0.05 < shares[1] < 0.2


def test_labels_are_drawn_as_the_model_predicts():
    logits = torch.tensor([[0.0, 1.0, -1.0], [3.0, 0.0, 0.0]])
    drawn = _draw(logits[:, None].expand(2, 20_000, 3), torch.Generator().manual_seed(0))
    frequency = torch.nn.functional.one_hot(drawn, 3).float().mean(1)
    torch.testing.assert_close(frequency, logits.softmax(-1), rtol=0, atol=0.015)


def test_random_is_the_same_for_the_same_seed():
    draws = [
        random(SiteStatistics(9, torch.ones(1, 9), torch.ones(9), generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_criterion_without_its_statistics_says_so():
    with pytest.raises(ValueError, match="not collected"):
        hessian(SiteStatistics(2, torch.ones(1, 2), torch.ones(2)))


# --- statistics ------------------------------------------------------------------------------------------------------


def test_sums_are_means_over_rows():
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    sums = Sums(6, torch.device("cpu"), full=True)
    for part in x.chunk(4):
        sums.add(part)
    found = sums.means()
    torch.testing.assert_close(found["mean"], x.mean(0))
    torch.testing.assert_close(found["square"], x.square().mean(0))
    torch.testing.assert_close(found["gram"], x.T @ x / 90)


def consumer_inputs(model, site, batch):
    """What really enters a consumer in one stock forward pass [B, T, K]."""
    seen = []
    handle = consumer(model, site).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


def real_tokens(model, site, batch):
    """Which tokens count for a site [B, T]."""
    if model.main_input_name == "pixel_values":
        return None
    if site.stack == "decoder" and "ConditionalGeneration" in type(model).__name__:
        return batch["labels"] != -100
    return batch["attention_mask"] == 1


def test_statistics_match_a_plain_forward(class_name):
    """Gram, mean and square of every consumer's input, layer by layer, are those of the whole model's forward."""
    model = tiny(class_name)
    batches = [tiny_batch(model, seed=seed) for seed in (0, 1)]
    sites = describe(model).sites
    axes = {site.key: site.inner.name for site in sites}
    drawn = draw(model, batches, 16, 0)
    collected = 0
    for site, (found,) in statistics(model, sites, axes, drawn, CRITERIA["hessian"], 0):
        if not site.active:
            assert not found.gram.any()
            continue
        rows = []
        for batch in batches:
            x = consumer_inputs(model, site, batch)
            mask = real_tokens(model, site, batch)
            rows.append(x.reshape(-1, x.shape[-1]) if mask is None else x.reshape(*mask.shape, -1)[mask])
        x = torch.cat(rows)
        torch.testing.assert_close(found.gram, x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.square, x.square().mean(0), rtol=1e-3, atol=1e-4)
        collected += 1
    assert collected == sum(site.active for site in sites)


def test_weight_squares_count_all_weights_of_a_unit(class_name):
    """A unit's squares summed over units are all the squares of the site's matrices."""
    model = tiny(class_name)
    sites = describe(model).sites
    for granularity in ("inner", "outer"):
        axes = {site.key: getattr(site, granularity).name for site in sites}
        for site, (found,) in statistics(model, sites, axes, [], CRITERIA["magnitude"], 0):
            alone = granularity == "inner" and site.share > 1  # then keys and values belong to no head
            layer, total = model.get_submodule(site.path), 0.0
            for part in (part for part in site.parts if part.role != "carries"):
                weight = tensor_of(layer, part.tensor)
                if alone and len(part.axes) > 1:
                    weight = weight.narrow(part.dim, 0, site.columns)  # queries lie first where one matrix holds all
                if not alone or part.axes[0] == site.inner.name:
                    total += weight.square().sum().item()
            assert found.weight_square.shape == (site.sizes[axes[site.key]],)
            assert found.weight_square.sum().item() == pytest.approx(total, rel=1e-4), site.name


def test_rows_of_flattens_masks_and_chooses():
    x = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    assert rows_of(x, mask).tolist() == x.view(6, 4)[mask].tolist()
    assert rows_of(x, mask, torch.tensor([False, True])).tolist() == x[1, :1].tolist()
    assert rows_of(x.view(6, 4), None, torch.tensor([False, True])).tolist() == x[1].tolist()


@pytest.mark.parametrize(("total", "samples"), [(100, 10), (10, 10), (7, 100), (1000, 333)])
def test_even_positions(total, samples):
    positions = even_positions(total, samples, seed=0)
    assert positions == sorted(set(positions))
    assert len(positions) == min(total, samples)
    if samples < total:
        stratum = total / samples
        assert all(int(i * stratum) <= p <= (i + 1) * stratum for i, p in enumerate(positions))
        assert positions != even_positions(total, samples, seed=1)


def test_the_draw_takes_from_all_batches_and_holds_out_a_fifth():
    model = tiny("BertForSequenceClassification")
    data = [tiny_batch(model, seed=seed) for seed in range(10)]
    drawn = draw(model, data, samples=40, seed=0)
    ids = torch.cat([batch.inputs["input_ids"] for batch in drawn])
    assert len(ids) == 40
    for batch in data:
        found = [(row == ids).all(1).any() for row in batch["input_ids"]]
        assert 3 <= sum(map(int, found)) <= 5
    assert sum(int(batch.held_out.sum()) for batch in drawn) == 8


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_matrix_of_and_back(name):
    """Linear and Conv1D, with and without bias."""
    model = tiny(name)
    out = consumer(model, describe(model).sites[0])
    before = {key: value.clone() for key, value in out.state_dict().items()}
    matrix = matrix_of(out)
    x = torch.randn(3, describe(model).sites[0].columns)
    ones = torch.cat([x, torch.ones(3, 1)], 1) if out.bias is not None else x
    torch.testing.assert_close(ones @ matrix.T, out(x).detach(), rtol=1e-4, atol=1e-5)
    set_matrix_(out, matrix * 2)
    assert all(torch.equal(out.state_dict()[key], 2 * value) for key, value in before.items())


# --- unlike losses at one measure ------------------------------------------------------------------------------------


def test_prices_are_the_non_negative_least_squares():
    random = np.random.default_rng(0)
    kinds, worth = random.random((9, 3)), np.array([0.5, 0.0, 2.0])
    np.testing.assert_allclose(prices(kinds, kinds @ worth), worth, atol=1e-9)
    losses = random.normal(size=9)
    found = prices(kinds, losses)
    residual = losses - kinds @ found
    assert (found >= 0).all()
    assert (kinds.T @ residual <= 1e-9).all()  # no price could rise (Karush-Kuhn-Tucker)
    np.testing.assert_allclose(found * (kinds.T @ residual), 0, atol=1e-9)
    np.testing.assert_array_equal(prices(kinds, -kinds.sum(1)), np.zeros(3))


def test_the_best_division_is_among_four_tries():
    """Convex losses of layers and of neurons, predicted in measures that are thousands of times apart."""
    for scale, worth in ((1e-3, 0.2), (1e-3, 3.0), (1e3, 1.0)):
        layers = np.linspace(0, 1, 11)
        kinds = np.stack([scale * (1 - layers) ** 2, layers**2, np.zeros(11)], axis=1)
        losses = kinds @ np.array([worth / scale, 1.0, 5.0])
        measured: dict[int, float] = {}
        for _ in range(4):
            index = next_to_try(kinds, measured)
            measured[index] = losses[index]
        assert {0, 10} < measured.keys()
        assert min(measured, key=measured.__getitem__) == losses.argmin()


def test_losses_below_zero_and_without_end_are_prices_too():
    """A layer that is better gone, and a cut that overflows."""
    kinds = np.array([[1.0, 0.0], [0.5, -0.1], [0.2, -0.2], [0.0, -0.3]])
    assert [next_to_try(kinds, {}), next_to_try(kinds, {0: 0.4}), next_to_try(kinds, {0: 0.4, 3: -0.1})] == [0, 3, 2]
    assert next_to_try(kinds, {0: 0.4, 3: np.inf}) == 2
    assert next_to_try(kinds, {0: np.inf, 3: np.inf}) in (1, 2)
