"""The dialogue models: they are causal, can be rebuilt from their config, and have exact second derivatives."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import metakern as mk
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.models import GPT, MODELS, RNNLM, build_model, rotations
from metakern.dialogue.readers import read
from metakern.dialogue.split import split_tasks
from metakern.dialogue.tokenizer import Tokenizer

TOPICS = Path(__file__).parent / "data" / "topics.jsonl"
SIZES = {"gpt": {"width": 16, "heads": 2, "layers": 2, "max_length": 12}}
V = 30


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = SIZES.get(name, {"embedding": 8, "hidden": 12, "layers": 2})
    return build_model(name, **({"vocab_size": V} | sizes | options)).double()


@pytest.fixture
def ids():
    return torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
def test_logits_depend_on_all_past_tokens_and_on_no_other(name, ids):
    model = make(name)
    logits = model(ids, torch.ones_like(ids))
    assert logits.shape == (3, 7, V)
    for i in range(7):
        changed = ids.clone()
        changed[1, i] = (changed[1, i] + 1) % V
        moved = (model(changed) - logits).abs().amax(-1) > 1e-12
        assert not moved[[0, 2]].any()
        assert moved[1].tolist() == [j >= i for j in range(7)]
    padded = torch.cat([ids, ids.new_zeros(3, 4)], 1)
    assert torch.allclose(model(padded)[:, :7], logits, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_rebuilds_the_model(name, ids):
    model = make(name, dropout=0.1).eval()
    other = build_model(**json.loads(json.dumps(model.config))).double().eval()
    other.load_state_dict(model.state_dict())
    assert other.config == model.config
    assert torch.equal(other(ids), model(ids))


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_tied_and_the_first_loss_is_near_that_of_a_uniform_guess(name, ids):
    model = make(name)
    assert model.head.weight is model.embedding.weight
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(torch.tensor(V).log().item(), abs=1.0)


def test_heads_are_projected_where_sizes_differ_and_untied_if_asked():
    names = lambda model: {name for name, _ in model.named_parameters()}  # noqa: E731
    assert "projection.weight" in names(make("gru"))
    assert "projection.weight" not in names(make("gru", embedding=12))
    untied = make("gru", tie=False)
    assert untied.head.weight.shape == (V, 12)
    assert untied.head.weight is not untied.embedding.weight


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_in_training_only(name, ids):
    model = make(name, dropout=0.5)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("name", MODELS)
def test_hessian_vector_products_equal_finite_differences(name, ids):
    model = make(name)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]

    def gradients(create_graph: bool = False):
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return torch.autograd.grad(loss, parameters, create_graph=create_graph)

    def moved(eps: float):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += eps * d
        return gradients()

    inner = sum((g * d).sum() for g, d in zip(gradients(True), directions, strict=True))
    hvp = torch.autograd.grad(inner, parameters)
    eps = 1e-5
    plus, minus = moved(eps), moved(-2 * eps)
    for h, a, b in zip(hvp, plus, minus, strict=True):
        torch.testing.assert_close(h, (a - b) / (2 * eps), rtol=1e-4, atol=1e-6)
    assert any(h.abs().max() > 1e-3 for h in hvp)


@pytest.mark.parametrize("name", MODELS)
def test_the_meta_gradient_on_dialogues_is_plain_autograds(name):
    """Two inner steps on padded episodes, folded, against plain autograd task by task."""
    split = split_tasks(read(str(TOPICS)), min_dialogues=4)
    tokenizer = Tokenizer.train([d for task in split.train for d in task.dialogues], 300)
    sizes = {"support_size": 2, "query_size": 3, "max_length": 12, "seed": 1}
    support, query = Episodes(split.train, tokenizer, **sizes).sample(0, 3)
    model = make(name, vocab_size=tokenizer.vocab_size)
    parameters = dict(model.named_parameters())
    maml = mk.MAML(model, mk.losses.causal_lm, inner=mk.optim.SGD(lr=0.3), steps=2)
    maml(support, query).backward()
    folded = {key: p.grad.clone() for key, p in parameters.items()}
    assert maml.plan.batching == "fold", maml.plan

    def loss(phi, batch):
        logits = torch.func.functional_call(model, phi, (batch["input_ids"],), tie_weights=True)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    values = []
    for t in range(3):
        phi, own = parameters, [{key: value[t] for key, value in batch.items()} for batch in (support, query)]
        for _ in range(2):
            grads = torch.autograd.grad(loss(phi, own[0]), list(phi.values()), create_graph=True)
            phi = {key: p - 0.3 * g for (key, p), g in zip(phi.items(), grads, strict=True)}
        values.append(loss(phi, own[1]))
    expected = torch.autograd.grad(torch.stack(values).mean(), list(parameters.values()))
    for key, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(
            folded[key], value, rtol=1e-8, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_attention_scores_of_a_gpt_depend_on_relative_positions():
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=generator).unbind(0)
    cos, sin = rotations(6, 8, q)
    scores = mk.ops.rope(q.expand(1, 1, 6, 8), cos, sin) @ mk.ops.rope(k.expand(1, 1, 6, 8), cos, sin).mT
    for offset in range(-5, 6):
        diagonal = scores[0, 0].diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert scores[0, 0, 0].std() > 1e-3


def test_bad_arguments(ids):
    for call, message in [
        (lambda: build_model("elman", V), "name must be one of rnn, gru, lstm, gpt, got 'elman'"),
        (lambda: RNNLM("gpt", V), "cell must be one of rnn, gru, lstm, got 'gpt'"),
        (lambda: build_model("gru", 0), "vocab_size must be at least 1, got 0"),
        (lambda: GPT(V, width=12, heads=4), r"width must be a multiple of 2 \* heads, got 12 and 4 heads"),
        (lambda: make("gpt")(ids.repeat(1, 2)), "input_ids must be at most 12 long, got 14"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="width"):
        build_model("gru", V, width=3)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_with_a_cache_equal_those_of_the_whole_text(name, ids):
    model = make(name).eval()
    lengths = torch.tensor([4, 1, 3])
    cache, known = model.empty_cache(3), torch.zeros(3, dtype=torch.long)
    for counts, new in (
        (lengths, ids[:, :4]),
        (torch.ones(3, dtype=torch.long), None),
        (torch.tensor([1, 2, 1]), None),
    ):
        if new is None:
            new = torch.stack([row.roll(-int(n))[:2] for row, n in zip(ids, known, strict=True)])[:, : counts.max()]
        logits = model.next_logits(new, counts, cache, known)
        known = known + counts
        for i, length in enumerate(known.tolist()):
            torch.testing.assert_close(logits[i], model(ids[i : i + 1, :length])[0, -1], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_cache_that_is_full_is_refused(ids):
    model = make("gpt").eval()
    cache = model.empty_cache(3)
    with pytest.raises(ValueError, match="GPT: a sequence must be at most 12 long, got 13"):
        model.next_logits(ids[:, :1], torch.ones(3, dtype=torch.long), cache, torch.tensor([3, 12, 0]))
