"""Several references: set functions, weights that mean repetition, and P2's attention against the formula."""

import pytest
import torch

from conftest import CROSS, random_adapter, sd15_unet
from imprompt.core.aggregation import Aggregator, Average, Joint, Maximum, SelfAttention, SetAttention, TokenAttention
from imprompt.core.attention import attend

WIDTH, PATCHES, TOKENS = 24, 1, 4


def shaken(module, seed=0, by=0.3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))
    return module


ALL = {
    "concat": Aggregator,
    "average": Average,
    "average of tokens": lambda: Average(on_tokens=True),
    "max": Maximum,
    "max of tokens": lambda: Maximum(on_tokens=True),
    "self-attention": lambda: shaken(SelfAttention(WIDTH)),
    "attention": lambda: shaken(SetAttention(WIDTH)),
    "attention over tokens": lambda: shaken(TokenAttention(CROSS), by=0.1),  # so that what it says is as large as the tokens
}


def heard(adapter, features, weights=None, aggregator=None, seed=3):
    """What a query gets from the keys and values: the order of tokens is gone."""
    tokens = adapter.tokens(features, weights, aggregator)
    query = torch.randn(len(tokens), 5, tokens.shape[2], generator=torch.Generator().manual_seed(seed))
    bias = None
    if weights is not None and aggregator.beside:
        bias = weights.log().repeat_interleave(TOKENS, 1)[:, None, None]
    return attend(query, tokens, tokens, 2, bias=bias)


@pytest.fixture(params=list(ALL))
def aggregator(request):
    return ALL[request.param]().requires_grad_(False)


@pytest.fixture(scope="module")
def adapter():
    return random_adapter(sd15_unet(), "global")


def references(count, seed=1):
    return torch.randn(2, count, PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed))


def read(adapter, features, aggregator):
    """What is heard of references when the aggregator may choose among them, as it may in use."""
    return heard(adapter, features[:, aggregator.chosen(features.shape[1])], aggregator=aggregator)


@pytest.mark.parametrize("count", [2, 9, 64])
def test_the_order_does_not_matter(adapter, aggregator, count):
    x = references(count)
    shuffled = x[:, torch.randperm(count, generator=torch.Generator().manual_seed(2))]
    difference = heard(adapter, x, aggregator=aggregator) - heard(adapter, shuffled, aggregator=aggregator)
    assert difference.abs().max() <= 1e-5


def test_nor_does_it_where_the_aggregator_chooses(adapter, aggregator):
    """P2's self-attention is a set function of nine: of more it reads the first nine, of fewer some twice."""
    for count in (9,) if isinstance(aggregator, SelfAttention) else (2, 9, 64):
        x = references(count)
        shuffled = x[:, torch.randperm(count, generator=torch.Generator().manual_seed(2))]
        assert (read(adapter, x, aggregator) - read(adapter, shuffled, aggregator)).abs().max() <= 1e-5


def test_a_weight_of_two_is_the_reference_twice(adapter, aggregator):
    x = references(3)
    twice = torch.cat([x, x[:, :1]], dim=1)
    weighed = heard(adapter, x, torch.tensor([[2.0, 1.0, 1.0]]).expand(2, -1), aggregator)
    torch.testing.assert_close(weighed, heard(adapter, twice, torch.ones(2, 4), aggregator), rtol=1e-4, atol=1e-5)


def test_a_weight_of_zero_is_the_reference_left_out(adapter, aggregator):
    x = references(3)
    weighed = heard(adapter, x, torch.tensor([[1.0, 1.0, 0.0]]).expand(2, -1), aggregator)
    torch.testing.assert_close(weighed, heard(adapter, x[:, :2], torch.ones(2, 2), aggregator), rtol=1e-4, atol=1e-5)


def test_duplicates_are_one_reference(adapter, aggregator):
    x = references(1)
    torch.testing.assert_close(read(adapter, x.expand(-1, 5, -1, -1), aggregator), read(adapter, x, aggregator), rtol=1e-4, atol=1e-5)


def test_self_attention_is_the_papers_algorithm():
    module = SelfAttention(WIDTH).double()
    x = references(9).double()
    q, k, v = (x[0, :, 0] @ w.weight.T for w in (module.to_q, module.to_k, module.to_v))
    expected = torch.softmax(q @ k.T / WIDTH**0.5, dim=-1) @ v
    torch.testing.assert_close(module.embeddings(x, torch.ones(2, 9))[0, :, 0], expected, rtol=1e-10, atol=1e-12)
    assert sum(p.numel() for p in module.parameters()) == 3 * WIDTH**2


@pytest.mark.parametrize(("count", "first"), [(9, list(range(9))), (12, list(range(9))), (4, [0, 1, 2, 3]), (1, [0])])
def test_nine_references_are_read_whatever_is_given(count, first):
    found = SelfAttention(WIDTH).chosen(count)
    assert len(found) == 9 and found[: len(first)] == first and set(found) <= set(range(count))


def test_ours_starts_as_the_average(adapter):
    x, ours = references(5), SetAttention(WIDTH)
    torch.testing.assert_close(heard(adapter, x, aggregator=ours), heard(adapter, x, aggregator=Average()), rtol=1e-4, atol=1e-5)
    start = heard(adapter, x, aggregator=Average(on_tokens=True))
    torch.testing.assert_close(heard(adapter, x, aggregator=TokenAttention(CROSS)), start, rtol=1e-4, atol=1e-5)


def test_tokens_stay_as_many_as_for_one(adapter):
    for aggregator in (Average(), Maximum(), Average(True), Maximum(True)):
        assert adapter.tokens(references(64), aggregator=aggregator).shape[1] == TOKENS
    assert adapter.tokens(references(64), aggregator=SetAttention(WIDTH)).shape[1] == 4 * TOKENS
    assert adapter.tokens(references(64), aggregator=TokenAttention(CROSS)).shape[1] == TOKENS
    assert adapter.tokens(references(9), aggregator=SelfAttention(WIDTH)).shape[1] == 9 * TOKENS
    plus = random_adapter(sd15_unet(), "resampler")
    assert plus.tokens(torch.randn(2, 64, 17, 40), aggregator=Joint()).shape[1] == plus.tokens(torch.randn(2, 1, 17, 40)).shape[1]


def test_the_joint_reading_of_patches_is_a_set_function():
    plus = random_adapter(sd15_unet(), "resampler")
    x = torch.randn(1, 6, 17, 40)
    assert (plus.tokens(x, aggregator=Joint()) - plus.tokens(x.flip(1), aggregator=Joint())).abs().max() <= 1e-5


def test_the_joint_reading_weighs_references():
    plus = random_adapter(sd15_unet(), "resampler")
    x = torch.randn(1, 3, 17, 40)

    def read(which, weights):
        return plus.tokens(x[:, which], torch.tensor([weights]), Joint())

    one = plus.tokens(x[:, :1])
    for same in (read([0], [2.0]), read([0, 0, 0], [1.0] * 3), read([0, 1], [1.0, 0.0])):
        torch.testing.assert_close(same, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read([0, 1, 2], [2.0, 1.0, 1.0]), read([0, 0, 1, 2], [1.0] * 4), rtol=1e-4, atol=1e-5)
    assert (read([0, 1], [1.0, 1.0]) - read([0, 1], [3.0, 1.0])).abs().max() > 1e-3


def test_every_trained_weight_gets_a_gradient():
    for module in (SelfAttention(WIDTH), shaken(SetAttention(WIDTH))):
        module.embeddings(references(9), torch.ones(2, 9)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    module = shaken(TokenAttention(CROSS))
    module.tokens(torch.randn(2, 9, TOKENS, CROSS), torch.ones(2, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
