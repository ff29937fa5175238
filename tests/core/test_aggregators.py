"""Aggregators of reference images are set functions whose weights act as repetition; self-attention follows its paper's algorithm."""

import pytest
import torch

from conftest import CROSS, random_adapter, sd15_unet
from imprompt.core.aggregation import (
    Aggregator,
    AttentionPooling,
    JointResampling,
    MaxPooling,
    MeanPooling,
    SelfAttention,
    TokenAttentionPooling,
)
from imprompt.core.attention import multi_head_attention

WIDTH, PATCHES, TOKENS = 24, 1, 4


def perturbed(module, seed=0, by=0.3):
    """The module with random numbers added to its parameters, as if it were trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn_like(p))
    return module


ALL = {
    "concat": Aggregator,
    "average": MeanPooling,
    "average of tokens": lambda: MeanPooling(on_tokens=True),
    "max": MaxPooling,
    "max of tokens": lambda: MaxPooling(on_tokens=True),
    "self-attention": lambda: perturbed(SelfAttention(WIDTH)),
    "attention": lambda: perturbed(AttentionPooling(WIDTH)),
    "attention over tokens": lambda: perturbed(TokenAttentionPooling(CROSS), by=0.1),  # an output as large as the tokens
}


def attention_output(adapter, features, weights=None, aggregator=None, seed=3):
    """Attention of a fixed query to the image tokens, which does not depend on their order."""
    tokens = adapter.image_tokens(features, weights, aggregator)
    query = torch.randn(len(tokens), 5, tokens.shape[2], generator=torch.Generator().manual_seed(seed))
    bias = None
    if weights is not None and aggregator.concatenates:
        bias = weights.log().repeat_interleave(TOKENS, 1)[:, None, None]
    return multi_head_attention(query, tokens, tokens, 2, bias=bias)


@pytest.fixture(params=list(ALL))
def aggregator(request):
    return ALL[request.param]().requires_grad_(False)


@pytest.fixture(scope="module")
def adapter():
    return random_adapter(sd15_unet(), "base")


def random_references(count, seed=1):
    return torch.randn(2, count, PATCHES, WIDTH, generator=torch.Generator().manual_seed(seed))


def selected_output(adapter, features, aggregator):
    """The attention output when the aggregator selects among the reference images, as it does in use."""
    return attention_output(adapter, features[:, aggregator.select_references(features.shape[1])], aggregator=aggregator)


@pytest.mark.parametrize("count", [2, 9, 64])
def test_the_order_does_not_matter(adapter, aggregator, count):
    x = random_references(count)
    shuffled = x[:, torch.randperm(count, generator=torch.Generator().manual_seed(2))]
    difference = attention_output(adapter, x, aggregator=aggregator) - attention_output(adapter, shuffled, aggregator=aggregator)
    assert difference.abs().max() <= 1e-5


def test_nor_does_it_where_the_aggregator_chooses(adapter, aggregator):
    """Self-attention is a set function of nine reference images: it takes the first nine of more, and repeats some of fewer."""
    for count in (9,) if isinstance(aggregator, SelfAttention) else (2, 9, 64):
        x = random_references(count)
        shuffled = x[:, torch.randperm(count, generator=torch.Generator().manual_seed(2))]
        assert (selected_output(adapter, x, aggregator) - selected_output(adapter, shuffled, aggregator)).abs().max() <= 1e-5


def test_a_weight_of_two_is_the_reference_twice(adapter, aggregator):
    x = random_references(3)
    twice = torch.cat([x, x[:, :1]], dim=1)
    weighted = attention_output(adapter, x, torch.tensor([[2.0, 1.0, 1.0]]).expand(2, -1), aggregator)
    torch.testing.assert_close(weighted, attention_output(adapter, twice, torch.ones(2, 4), aggregator), rtol=1e-4, atol=1e-5)


def test_a_weight_of_zero_is_the_reference_left_out(adapter, aggregator):
    x = random_references(3)
    weighted = attention_output(adapter, x, torch.tensor([[1.0, 1.0, 0.0]]).expand(2, -1), aggregator)
    torch.testing.assert_close(weighted, attention_output(adapter, x[:, :2], torch.ones(2, 2), aggregator), rtol=1e-4, atol=1e-5)


def test_duplicates_are_one_reference(adapter, aggregator):
    x = random_references(1)
    torch.testing.assert_close(
        selected_output(adapter, x.expand(-1, 5, -1, -1), aggregator), selected_output(adapter, x, aggregator), rtol=1e-4, atol=1e-5
    )


def test_self_attention_is_the_papers_algorithm():
    module = SelfAttention(WIDTH).double()
    x = random_references(9).double()
    q, k, v = (x[0, :, 0] @ w.weight.T for w in (module.to_q, module.to_k, module.to_v))
    expected = torch.softmax(q @ k.T / WIDTH**0.5, dim=-1) @ v
    torch.testing.assert_close(module.aggregate_features(x, torch.ones(2, 9))[0, :, 0], expected, rtol=1e-10, atol=1e-12)
    assert sum(p.numel() for p in module.parameters()) == 3 * WIDTH**2


@pytest.mark.parametrize(("count", "first"), [(9, list(range(9))), (12, list(range(9))), (4, [0, 1, 2, 3]), (1, [0])])
def test_nine_references_are_read_whatever_is_given(count, first):
    selected = SelfAttention(WIDTH).select_references(count)
    assert len(selected) == 9 and selected[: len(first)] == first and set(selected) <= set(range(count))


def test_ours_starts_as_the_average(adapter):
    x, untrained = random_references(5), AttentionPooling(WIDTH)
    torch.testing.assert_close(
        attention_output(adapter, x, aggregator=untrained), attention_output(adapter, x, aggregator=MeanPooling()), rtol=1e-4, atol=1e-5
    )
    start = attention_output(adapter, x, aggregator=MeanPooling(on_tokens=True))
    torch.testing.assert_close(attention_output(adapter, x, aggregator=TokenAttentionPooling(CROSS)), start, rtol=1e-4, atol=1e-5)


def test_tokens_stay_as_many_as_for_one(adapter):
    for aggregator in (MeanPooling(), MaxPooling(), MeanPooling(on_tokens=True), MaxPooling(on_tokens=True)):
        assert adapter.image_tokens(random_references(64), aggregator=aggregator).shape[1] == TOKENS
    assert adapter.image_tokens(random_references(64), aggregator=AttentionPooling(WIDTH)).shape[1] == 4 * TOKENS
    assert adapter.image_tokens(random_references(64), aggregator=TokenAttentionPooling(CROSS)).shape[1] == TOKENS
    assert adapter.image_tokens(random_references(9), aggregator=SelfAttention(WIDTH)).shape[1] == 9 * TOKENS
    plus = random_adapter(sd15_unet(), "plus")
    assert (
        plus.image_tokens(torch.randn(2, 64, 17, 40), aggregator=JointResampling()).shape[1]
        == plus.image_tokens(torch.randn(2, 1, 17, 40)).shape[1]
    )


def test_the_joint_reading_of_patches_is_a_set_function():
    plus = random_adapter(sd15_unet(), "plus")
    x = torch.randn(1, 6, 17, 40)
    assert (
        plus.image_tokens(x, aggregator=JointResampling()) - plus.image_tokens(x.flip(1), aggregator=JointResampling())
    ).abs().max() <= 1e-5


def test_the_joint_reading_weighs_references():
    plus = random_adapter(sd15_unet(), "plus")
    x = torch.randn(1, 3, 17, 40)

    def image_tokens(indices, weights):
        return plus.image_tokens(x[:, indices], torch.tensor([weights]), JointResampling())

    single = plus.image_tokens(x[:, :1])
    for tokens in (image_tokens([0], [2.0]), image_tokens([0, 0, 0], [1.0] * 3), image_tokens([0, 1], [1.0, 0.0])):
        torch.testing.assert_close(tokens, single, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image_tokens([0, 1, 2], [2.0, 1.0, 1.0]), image_tokens([0, 0, 1, 2], [1.0] * 4), rtol=1e-4, atol=1e-5)
    assert (image_tokens([0, 1], [1.0, 1.0]) - image_tokens([0, 1], [3.0, 1.0])).abs().max() > 1e-3


def test_every_trained_weight_gets_a_gradient():
    for module in (SelfAttention(WIDTH), perturbed(AttentionPooling(WIDTH))):
        module.aggregate_features(random_references(9), torch.ones(2, 9)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    module = perturbed(TokenAttentionPooling(CROSS))
    module.aggregate_tokens(torch.randn(2, 9, TOKENS, CROSS), torch.ones(2, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
