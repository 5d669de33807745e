import math

import pytest
import torch
from torch.nn.functional import dropout, scaled_dot_product_attention

from disranker.dropout import bernoulli_, quicken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_of_a_million_a_share_of_p_is_1_and_the_others_0(dtype, p):
    torch.manual_seed(1)
    drawn = bernoulli_(torch.empty(1_000_003, dtype=dtype), p).double()
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert abs(drawn.mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / 1e6)


def test_neighbours_are_independent_within_the_bits_of_one_draw_and_across():
    torch.manual_seed(1)
    drawn = bernoulli_(torch.empty(1_000_000), 0.3) - 0.3
    for apart in range(1, 9):
        assert abs((drawn[:-apart] * drawn[apart:]).mean().item()) < 4 * 0.3 * 0.7 / 1e3


def test_a_generator_of_one_seed_fills_any_shape_in_the_same_way():
    whole = bernoulli_(torch.empty(30), 0.5, torch.Generator().manual_seed(3))
    across = bernoulli_(torch.empty(6, 5).t(), 0.5, torch.Generator().manual_seed(3))
    assert torch.equal(across.reshape(-1), whole)
    assert bernoulli_(torch.empty(0), 0.5).shape == (0,)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_an_error(p):
    with pytest.raises(ValueError, match="from 0 to 1"):
        bernoulli_(torch.empty(3), p)


def test_dropout_and_attention_draw_so_once_it_is_asked_for():
    assert quicken() is quicken()
    torch.manual_seed(5)
    kept = dropout(torch.ones(4, 6), 0.25)
    torch.manual_seed(5)
    assert torch.equal(kept, bernoulli_(torch.empty(4, 6), 0.75) / 0.75)
    query, key, value = torch.randn(3, 1, 2, 8, 4)
    torch.manual_seed(7)
    attended = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(7)
    weights = (query @ key.transpose(-1, -2) / 2).softmax(-1) * bernoulli_(torch.empty(1, 2, 8, 8), 0.5) / 0.5
    assert torch.allclose(attended, weights @ value, atol=1e-5)
