"""Allocation of ranks: against numpy's SVD, against layers that are trained, and against all choices that there are."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lora_sr.adapters import LayerImportance, allocate_ranks, base_weight, layer_importance
from lora_sr.adapters.allocation import full_rank, largest_useful_rank, rank_cost
from lora_sr.adapters.layers import LORA_LAYERS
from lora_sr.errors import InputError

LAYERS = {
    '3x3': (lambda: nn.Conv2d(6, 5, 3), 3),
    '1x1': (lambda: nn.Conv2d(10, 8, 1), 1),
    'grouped': (lambda: nn.Conv2d(8, 12, 3, groups=2), 3),
    'depthwise': (lambda: nn.Conv2d(7, 7, 5, groups=7), 1),
    'channelwise': (lambda: nn.Conv2d(4, 8, (3, 2), groups=4), 1),
    'flat': (lambda: nn.Conv2d(6, 5, (1, 3)), 1),
    'tall': (lambda: nn.Conv2d(6, 9, (3, 1)), 3),
    'uneven': (lambda: nn.Conv2d(2, 9, (3, 2)), 3),
    'linear': (lambda: nn.Linear(9, 7), 1),
    '1-D': (lambda: nn.Conv1d(6, 5, 3, groups=1), 1),
    '3-D': (lambda: nn.Conv3d(2, 9, (3, 1, 2)), 1),
    'transposed': (lambda: nn.ConvTranspose2d(8, 6, (3, 2), groups=2), 3),
    'transposed 1-D': (lambda: nn.ConvTranspose1d(8, 6, 4), 1),
    'embedding': (lambda: nn.Embedding(9, 7), 1),
    'attention': (lambda: nn.MultiheadAttention(6, 2), 1),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    make, rows = LAYERS[request.param]
    layer = make().double()
    layer.rows = rows  # singular directions in a unit of rank
    return layer


def adapted(layer, rank):
    return LORA_LAYERS[type(layer)](layer, rank, rank)


def lora_size(layer, rank):
    lora = adapted(layer, rank)
    return lora.lora_A.numel() + lora.lora_B.numel()


def test_costs_and_limits_are_those_of_the_layers(layer):
    assert [rank * rank_cost(layer) for rank in (1, 2, 5)] == [lora_size(layer, rank) for rank in (1, 2, 5)]
    assert rank_cost(adapted(layer, 3)) == rank_cost(layer)
    useful = [rank for rank in range(1, 40) if lora_size(layer, rank) <= base_weight(layer).numel()]
    assert largest_useful_rank(layer) == max(useful, default=1)

    def rank_of_update(rank):
        lora = adapted(layer, rank)
        nn.init.normal_(lora.lora_B)
        return np.linalg.matrix_rank((lora.lora_B @ lora.lora_A).detach().numpy())

    needed = full_rank(layer)
    highest = rank_of_update(needed)
    assert highest == rank_of_update(needed + 1) == min(lora_shape(layer))
    assert needed == 1 or rank_of_update(needed - 1) < highest


def lora_shape(layer):
    lora = adapted(layer, 1)
    return lora.lora_B.shape[0], lora.lora_A.shape[1]


def test_gains_are_the_squared_singular_values_of_each_unit(layer):
    gradient = torch.randn_like(base_weight(layer))
    importance = layer_importance(layer, gradient)
    values = np.linalg.svd(gradient.numpy().reshape(lora_shape(layer)), compute_uv=False) ** 2
    expected = [values[unit * layer.rows : (unit + 1) * layer.rows].sum() for unit in range(largest_useful_rank(layer))]
    np.testing.assert_allclose(importance.gains, expected, rtol=1e-10)
    assert importance.cost == rank_cost(layer)
    assert layer_importance(adapted(layer, 2), gradient) == importance


@pytest.mark.parametrize('name', ['3x3', '1x1', 'grouped', 'linear'])
def test_a_trained_layer_gains_what_its_rank_promises(name):
    # L(W) = |W - W*|^2 / 2, whose gradient is W - W*: the best update of rank r lowers it by half the sum of the gains.
    torch.manual_seed(1)
    layer = LAYERS[name][0]().double()
    goal = torch.randn_like(layer.weight)
    gradient = (layer.weight - goal).detach()
    gains = layer_importance(layer, gradient).gains
    for rank in range(1, len(gains) + 1):
        lora = adapted(layer, rank)
        nn.init.normal_(lora.lora_B, std=0.1)
        fit(lora, goal)
        fall = (gradient.square().sum() - (lora.weight - goal).square().sum()) / 2
        assert fall.item() == pytest.approx(sum(gains[:rank]) / 2, rel=1e-5)


def fit(lora, goal):
    optimizer = torch.optim.LBFGS([lora.lora_A, lora.lora_B], max_iter=400, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = (lora.weight - goal).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def every_choice(importance, max_rank):
    limits = [min(max_rank, len(layer.gains)) for layer in importance.values()]
    return itertools.product(*(range(limit + 1) for limit in limits))


def cost_and_gain(importance, ranks):
    pairs = list(zip(importance.values(), ranks))
    return (
        sum(layer.cost * rank for layer, rank in pairs),
        sum(sum(layer.gains[:rank]) for layer, rank in pairs),
    )


def random_importance(seed, costs):
    rng = np.random.default_rng(seed)
    return {
        f'layer{index}': LayerImportance(tuple(sorted(rng.exponential(scale=1 + index, size=5))[::-1]), cost)
        for index, cost in enumerate(costs)
    }


@pytest.mark.parametrize('seed', range(5))
def test_with_equal_costs_the_choice_is_the_best_of_all(seed):
    importance = random_importance(seed, [6, 6, 6, 6])
    choices = [cost_and_gain(importance, choice) for choice in every_choice(importance, 4)]
    for budget in range(6, 110, 5):
        ranks = allocate_ranks(importance, budget, max_rank=4)
        best = max(gain for cost, gain in choices if cost <= budget)
        cost, gain = cost_and_gain(importance, ranks.values())
        assert cost <= budget and gain == pytest.approx(best, rel=1e-12)
        assert all(0 <= rank <= 4 for rank in ranks.values())


@pytest.mark.parametrize('seed', range(5))
def test_no_choice_is_better_at_its_price(seed):
    importance = random_importance(seed, [3, 5, 7, 11])
    choices = [cost_and_gain(importance, choice) for choice in every_choice(importance, 4)]
    largest = max(layer.gains[0] for layer in importance.values())
    for budget in range(3, 110):
        ranks = allocate_ranks(importance, budget, max_rank=4)
        cost, gain = cost_and_gain(importance, ranks.values())
        assert cost <= budget
        best = max(gain for cost, gain in choices if cost <= budget)
        # The known bound for the greedy choice: what fits only in part is what may be missed.
        assert gain >= best - largest
        # Nothing that gains is left that would fit.
        for (name, layer), rank in zip(importance.items(), ranks.values()):
            assert rank == 4 or layer.cost > budget - cost, name
    assert set(ranks.values()) == {4}  # a budget that is large enough for all


def test_the_first_unit_goes_where_it_gains_most_per_parameter():
    importance = {'dear': LayerImportance((10.0, 1.0), 10), 'cheap': LayerImportance((4.0, 3.0), 2)}
    assert allocate_ranks(importance, 10, 8) == {'dear': 0, 'cheap': 2}
    assert allocate_ranks(importance, 14, 8) == {'dear': 1, 'cheap': 2}
    assert allocate_ranks(importance, 13, 1) == {'dear': 1, 'cheap': 1}


def test_layers_without_gain_get_no_rank():
    importance = {'dead': LayerImportance((0.0, 0.0), 1), 'alive': LayerImportance((1.0, 0.0), 1)}
    assert allocate_ranks(importance, 100, 8) == {'dead': 0, 'alive': 1}


def test_what_cannot_be_allocated_is_told():
    importance = {'a': LayerImportance((1.0,), 12), 'b': LayerImportance((0.0,), 4)}
    with pytest.raises(InputError, match='budget is 11 parameters: .* at least 12'):
        allocate_ranks(importance, 11, 8)
    with pytest.raises(InputError, match='budget is 0'):
        allocate_ranks(importance, 0, 8)
    with pytest.raises(InputError, match='largest rank is 0'):
        allocate_ranks(importance, 20, 0)
    with pytest.raises(InputError, match='No layer has a gradient'):
        allocate_ranks({'b': importance['b']}, 20, 8)
    with pytest.raises(InputError, match='not finite'):
        layer_importance(nn.Linear(2, 2), torch.tensor([[1.0, float('nan')], [0.0, 1.0]]))
