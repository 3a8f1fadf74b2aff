"""Drawing the next token: the filters against those of `transformers`, the draws against their probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from deepalign.records import Sampling
from deepalign.sampling import draw

ALMOST_ONE = math.nextafter(1.0, 0.0)


def oracle_probs(logits_V: torch.Tensor, setting: Sampling) -> torch.Tensor:
    """Probabilities after the library's warpers in the order of its `generate`, float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(setting.temperature)])
    if setting.top_k > 0:
        warpers.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p < 1:
        warpers.append(TopPLogitsWarper(setting.top_p))
    scores: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits_V.double().unsqueeze(0))
    return scores.softmax(dim=-1)[0]


def draw_many(logits_V: torch.Tensor, setting: Sampling, uniforms: np.ndarray) -> torch.Tensor:
    rows = len(uniforms)
    return draw(logits_V.expand(rows, -1), [setting] * rows, torch.tensor(uniforms, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.5, 0.9, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 50, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.9, 0.999, 1.0])
def test_survivors_are_exactly_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    setting = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(int(temperature * 10) + 100 * top_k + int(1e5 * top_p))
    for num_tokens in (2, 11, 120):
        for _ in range(5):
            logits_V = torch.randn(num_tokens, generator=generator) * 2
            probs_V = oracle_probs(logits_V, setting)
            order = probs_V.argsort(descending=True)[: int((probs_V > 0).sum())]
            # One uniform number in the middle of each survivor's share, plus the two ends of [0, 1).
            middles = probs_V[order].cumsum(dim=0) - probs_V[order] / 2
            uniforms = np.array([0.0, *middles.tolist(), ALMOST_ONE])
            drawn = draw_many(logits_V, setting, uniforms).tolist()
            assert drawn == [int(order[0]), *order.tolist(), int(order[-1])]


def test_counts_follow_the_probabilities() -> None:
    """On an even grid of uniform numbers each token's count is its share to within one."""
    logits_V = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 0.2])
    setting = Sampling(temperature=1.3, top_k=6, top_p=0.95)
    size = 50_000
    counts = torch.bincount(draw_many(logits_V, setting, (np.arange(size) + 0.5) / size), minlength=8)
    assert torch.all((counts - size * oracle_probs(logits_V, setting)).abs() <= 1)
    assert int((counts > 0).sum()) > 3


def test_random_draws_pass_a_chi_square_test() -> None:
    logits_V = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 0.2])
    setting = Sampling(temperature=1.5, top_k=0, top_p=1.0)
    size = 40_000
    uniforms = np.random.Generator(np.random.Philox(key=7)).random(size)
    counts = torch.bincount(draw_many(logits_V, setting, uniforms), minlength=8).double()
    expected = size * oracle_probs(logits_V, setting)
    # 99.9 % quantile of chi-square with 7 degrees of freedom; a temperature off by 0.1 must show.
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.32
    other = size * oracle_probs(logits_V, Sampling(temperature=1.4, top_k=0, top_p=1.0))
    assert float(((counts - other) ** 2 / other).sum()) > 24.32


def test_each_row_has_its_own_setting_and_number() -> None:
    logits_V = torch.tensor([1.0, 4.0, 3.0, 2.0])
    settings = [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, top_k=0, top_p=1.0),
        Sampling(temperature=1.0, top_k=2, top_p=1.0),
        Sampling(temperature=1.0, top_k=0, top_p=0.5),
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, top_k=0, top_p=1.0),
    ]
    uniforms = torch.tensor([ALMOST_ONE, ALMOST_ONE, ALMOST_ONE, ALMOST_ONE, 0.5, 0.0], dtype=torch.float64)
    assert draw(logits_V.expand(6, -1), settings, uniforms).tolist() == [1, 0, 2, 1, 1, 1]


def test_greedy_takes_the_highest_whatever_the_number() -> None:
    logits_BV = torch.tensor([[0.1, 0.3, 0.2], [5.0, -torch.inf, 4.0], [-3.0, -2.0, -1.0]])
    greedy = Sampling(temperature=0.0, top_k=1, top_p=0.01)
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert draw(logits_BV, [greedy] * 3, torch.full((3,), uniform, dtype=torch.float64)).tolist() == [1, 0, 2]


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("top_k", [0, 50])
def test_a_tiny_temperature_is_greedy(temperature: float, top_k: int) -> None:
    logits_V = torch.tensor([1.0, 5.0, 3.0, 4.9])
    setting = Sampling(temperature=temperature, top_k=top_k, top_p=0.95)
    assert draw_many(logits_V, setting, np.array([0.0, 0.5, ALMOST_ONE])).tolist() == [1, 1, 1]


def test_a_huge_temperature_is_even_over_the_survivors() -> None:
    logits_V = torch.tensor([1.0, 5.0, 3.0, 4.9, -2.0])
    setting = Sampling(temperature=1e9, top_k=4, top_p=1.0)
    drawn = draw_many(logits_V, setting, np.array([0.1, 0.3, 0.6, 0.9]))
    assert drawn.tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("top_k", [0, 2, 3, 50])
def test_a_ruled_out_token_is_never_drawn(top_k: int) -> None:
    logits_V = torch.tensor([-torch.inf, 5.0, 3.0, -torch.inf])
    setting = Sampling(temperature=1.0, top_k=top_k, top_p=1.0)
    drawn = draw_many(logits_V, setting, np.array([*np.linspace(0, 1, 200, endpoint=False), ALMOST_ONE]))
    assert set(drawn.tolist()) == {1, 2}


def test_of_tied_tokens_at_the_edge_exactly_k_survive() -> None:
    """Here `transformers` would keep every token tied with the k-th; ties need equal bits and do not matter."""
    setting = Sampling(temperature=1.0, top_k=2, top_p=1.0)
    drawn = draw_many(torch.zeros(6), setting, np.linspace(0, 1, 50, endpoint=False))
    assert len(set(drawn.tolist())) == 2


def test_logits_are_not_changed() -> None:
    logits_BV = torch.tensor([[1.0, 2.0, 0.5]])
    before = logits_BV.clone()
    draw(logits_BV, [Sampling(temperature=0.7, top_k=2, top_p=0.5)], torch.tensor([0.3], dtype=torch.float64))
    assert torch.equal(logits_BV, before)
