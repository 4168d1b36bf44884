"""Sampling: what is drawn has the probabilities that transformers' own warpers give, and every bad value is named."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from aligngpt.sampling import Kind, Sampler, Sampling, draw

VOCAB = 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", 1e39),
        pytest.param("temperature", 10**400, id="temperature-huge"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e39),
        ("stop", "abc"),
        ("stop", ["a", ""]),
        ("stop", [3]),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 0.5),
    ],
)
def test_a_bad_value_is_named_with_what_it_needs(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*; it needs to be "):
        Sampling(**{field: value})


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.15, 0.6, 1.0])
def test_draws_have_the_probabilities_of_the_warpers(temperature, top_p):
    """Uniform numbers on a grid: each token's share of them is its probability, to the width of the grid."""
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, VOCAB)
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)) if top_p < 1 else None
    warped = TemperatureLogitsWarper(temperature)(None, logits) if warped is None else warped
    points = 40_000
    uniform = (torch.arange(points) + 0.5) / points
    tokens = draw(logits.expand(points, -1), torch.full((points,), temperature), torch.full((points,), top_p), uniform)
    share = torch.bincount(tokens, minlength=VOCAB) / points
    torch.testing.assert_close(share, warped.softmax(-1)[0], atol=1.5 / points, rtol=0)


def test_the_ends_of_the_uniform_numbers_stay_among_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, -4.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    last = torch.full((2,), 1 - 2**-24)  # the largest that torch.rand gives
    heat = torch.tensor([1.0, 1e-30])
    assert draw(logits, heat, torch.tensor([0.5, 1.0]), last).tolist() == [1, 3]
    assert draw(logits, heat, torch.tensor([1e-9, 1e-9]), last).tolist() == [1, 0]
    assert draw(logits, torch.zeros(2), torch.ones(2), last).tolist() == [1, 0]


def test_the_likeliest_is_that_of_the_logits_where_probabilities_are_equal_or_none():
    logits = torch.tensor([[0.0, 1e-9], [0.0, torch.nan]])
    assert logits[0].softmax(-1).unique().numel() == 1
    assert draw(logits, torch.zeros(2), torch.ones(2), torch.zeros(2)).tolist() == logits.argmax(-1).tolist() == [1, 1]


def sampler(*samplings: Sampling, suppressed=()) -> Sampler:
    made = Sampler(len(samplings), VOCAB, 50, suppressed, torch.device("cpu"))
    for row, sampling in enumerate(samplings):
        made.begin(row, sampling, torch.tensor([row, 4]), 50)
    return made


def test_rows_of_every_kind_share_a_step():
    """The likeliest, a penalised, a drawn token: each row gets what it gets alone, step after step."""
    torch.manual_seed(2)
    samplings = [
        Sampling(),
        Sampling(repetition_penalty=3.0),
        Sampling(temperature=1.5, top_p=0.8, seed=5),
        Sampling(temperature=1.5, repetition_penalty=0.5, seed=6),
    ]
    together = sampler(*samplings)
    steps = [2 * torch.randn(4, VOCAB) for _ in range(20)]
    chosen = [together.choose(logits, torch.arange(4), Kind.of(samplings)) for logits in steps]
    for row, sampling in enumerate(samplings):
        alone = Sampler(1, VOCAB, 50, (), torch.device("cpu"))
        alone.begin(0, sampling, torch.tensor([row, 4]), 50)
        for logits, tokens in zip(steps, chosen, strict=True):
            token = alone.choose(logits[row : row + 1], torch.tensor([0]), Kind.of([sampling]))
            assert token.item() == tokens[row]
    assert [tokens[0] for tokens in chosen] == [logits[0].argmax() for logits in steps]


def test_the_penalty_is_transformers_and_forgets_the_row_before():
    torch.manual_seed(3)
    penalty = Sampling(repetition_penalty=1.7)
    one = sampler(penalty)
    for prompt in (torch.tensor([1, 2, 2]), torch.tensor([7])):
        one.begin(0, penalty, prompt, 50)
        ids = prompt[None]
        for _ in range(8):
            logits = torch.randn(1, VOCAB)
            token = one.choose(logits, torch.tensor([0]), Kind.of([penalty]))
            assert token.item() == RepetitionPenaltyLogitsProcessor(1.7)(ids, logits).argmax().item()
            ids = torch.cat((ids, token[None]), 1)


def test_draws_do_not_depend_on_the_default_type():
    sampling = Sampling(temperature=2.0, seed=1)
    usual = sampler(sampling).uniform
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(sampler(sampling).uniform, usual)
    finally:
        torch.set_default_dtype(torch.float32)


def test_suppressed_tokens_are_never_chosen():
    samplings = [Sampling(), Sampling(temperature=9.0, seed=1)]
    some = sampler(*samplings, suppressed=[0, 3, 11])
    for _ in range(50):
        tokens = some.choose(torch.zeros(2, VOCAB), torch.arange(2), Kind.of(samplings))
        assert not {0, 3, 11} & set(tokens.tolist())
