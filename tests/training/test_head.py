"""The one-pass output layer against plain autograd through full logits, and where it is not to be used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepalign.losses import TokenStrength, constrained_token_loss, turn_positions
from deepalign.training import head
from deepalign.training.head import add_one_pass_head, has_one_pass_head
from deepalign.training.objective import IGNORED, HeadOutput, Objective

VOCAB, WIDTH, BATCH, LENGTH = 53, 12, 3, 31
FORMS: dict[str, dict[str, float]] = {
    "plain": {},
    "cap": {"final_logit_softcapping": 2.0},
    "multiplier": {"logit_scale": 0.3},
    "divisor": {"logits_scaling": 4.0},
    "both": {"final_logit_softcapping": 2.0, "logit_scale": 1.7},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3, "tie_word_embeddings": True},
    "phi": {},
    "gpt2": {},
}


class Lonely(torch.nn.Module):
    """A "model" whose body gives the same hidden states for any ids: what is left is the output layer."""

    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = False, **config: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.nn.Parameter(torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype))
        self.layer = torch.nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
        for weight in self.layer.parameters():
            torch.nn.init.normal_(weight, generator=generator)
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**config))
        self.settings = config

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.layer

    def base_model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def forward(self, **_: Any) -> Tensor:
        logits: Tensor = self.layer(self.hidden)
        logits = logits * self.settings.get("logit_scale", 1.0) / self.settings.get("logits_scaling", 1.0)
        cap = self.settings.get("final_logit_softcapping")
        return logits if cap is None else torch.tanh(logits / cap) * cap


def some_labels(seed: int = 1, vocab: int = VOCAB) -> Tensor:
    """Two answers in the first row, one in the second, all but none in the third."""
    labels = torch.randint(0, vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels[0, :4] = labels[0, 14:18] = labels[1, :9] = labels[1, 28:] = labels[2, :-1] = IGNORED
    return labels


def objectives(labels: Tensor, logps: Tensor) -> dict[str, Objective]:
    """Plain, constrained, with a floor that matters, and with a further factor of each token."""
    mask = labels[:, 1:] != IGNORED
    generator = torch.Generator().manual_seed(2)
    reference = (logps.detach() + torch.randn(mask.shape, generator=generator)).to(logps.dtype)
    constraint = {
        "strength": TokenStrength(),
        "reference_BT": torch.where(mask, reference, float("nan")),
        "positions_BT": turn_positions(mask),
    }
    return {
        "plain": Objective(),
        "constrained": Objective(**constraint),
        "floor": Objective(**constraint, weight_floor=0.9),
        "scaled": Objective(**constraint, scale_BT=torch.rand(mask.shape, generator=generator) + 0.5),
    }


def chosen_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    shifted = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    return logits[:, :-1].log_softmax(dim=-1).gather(-1, shifted).squeeze(-1)


def plain_loss(logps: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Whose autograd is to be met: cross-entropy, or Eq. 3 by `losses`, one token at a time where they are scaled."""
    mask = labels[:, 1:] != IGNORED
    if objective.strength is None:
        return -logps[mask].sum()
    assert objective.reference_BT is not None
    assert objective.positions_BT is not None
    parts = []
    for place in mask.nonzero().tolist():
        row, column = place
        here = tuple(slice(one, one + 1) for one in place)
        found = constrained_token_loss(
            logps[here],
            objective.reference_BT[here],
            mask[here],
            objective.strength,
            positions=objective.positions_BT[here],
            weight_floor=objective.weight_floor,
        )
        factor = 1.0 if objective.scale_BT is None else objective.scale_BT[row, column]
        parts.append(found.total * factor)
    return torch.stack(parts).sum()


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    wanted = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def compare(model: Any, labels: Tensor, name: str, rtol: float, atol: float) -> None:
    """Figures and gradients of one pass against autograd, where the loss is divided by 7."""
    logits = model(input_ids=labels.clamp(min=0))
    logits = getattr(logits, "logits", logits)
    logps = chosen_log_probs(logits, labels)
    objective = objectives(labels, logps)[name]
    expected = gradients(model, plain_loss(logps, labels, objective) / 7)
    add_one_pass_head(model)
    found = model(input_ids=labels.clamp(min=0), labels=labels, objective=objective)
    mask = labels[:, 1:] != IGNORED
    torch.testing.assert_close(found.logps, torch.where(mask, logps, 0.0).detach(), rtol=rtol, atol=atol)
    shares = logits[:, :-1].softmax(dim=-1)
    entropy = torch.distributions.Categorical(probs=shares).entropy()
    torch.testing.assert_close(found.entropy, torch.where(mask, entropy, 0.0).detach(), rtol=rtol, atol=10 * atol)
    assert bool((found.is_top1.bool() == (mask & (shares.argmax(dim=-1) == labels[:, 1:]))).all())
    assert bool((found.label_mask == mask).all())
    got = gradients(model, -found.log_probs.sum() / 7)
    assert max(float(grad.abs().max()) for grad in expected.values()) > 1e-3
    for part, grad in expected.items():
        torch.testing.assert_close(got[part], grad, rtol=rtol, atol=atol * max(1.0, float(grad.abs().max())), msg=part)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["plain", "constrained", "floor", "scaled"])
def test_one_pass_is_autograd_through_full_logits(name: str, form: str, bias: bool) -> None:
    compare(Lonely(bias=bias, **FORMS[form]), some_labels(), name, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_it_is_so_in_float32(name: str) -> None:
    compare(Lonely(torch.float32, bias=True, **FORMS["both"]), some_labels(), name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 17, 20, 43])
def test_the_size_of_a_slice_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """43 response tokens: slices of 16 at the least, of 17 and 20, and all at once."""
    monkeypatch.setattr(head, "_SLICE_BYTES", 4 * VOCAB * rows)
    assert int((some_labels()[:, 1:] != IGNORED).sum()) == 43
    compare(Lonely(bias=True, **FORMS["cap"]), some_labels(), "scaled", rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_real_architectures_get_their_own_gradients(model_type: str, random_model: Any) -> None:
    """Tied and untied, with caps, scales and biases: every weight of the model."""
    model = random_model(model_type, **ARCHITECTURES[model_type])
    assert has_one_pass_head(model)
    compare(model, some_labels(vocab=97), "constrained", rtol=2e-3, atol=2e-5)


def scored(model: Any, labels: Tensor, objective: Objective | None = None) -> HeadOutput:
    add_one_pass_head(model)
    out: HeadOutput = model(labels=labels, objective=objective or Objective())
    return out


def test_a_batch_without_a_response_is_a_zero_with_a_gradient() -> None:
    model = Lonely(bias=True)
    labels = torch.full((BATCH, LENGTH), IGNORED)
    found = scored(model, labels, objectives(labels, torch.zeros(BATCH, LENGTH - 1))["scaled"])
    assert found.log_probs is not None
    loss = -found.log_probs.sum()
    assert float(loss.detach()) == 0.0
    assert all(float(grad.abs().max()) == 0.0 for grad in gradients(model, loss).values())


def test_a_loss_that_weighs_tokens_once_more_is_refused() -> None:
    """Its gradient would be wrong: each token's was computed before the factor was known."""
    found = scored(Lonely(), some_labels())
    assert found.log_probs is not None
    with pytest.raises(RuntimeError, match="plain sum"):
        found.log_probs.square().sum().backward()


def test_without_gradients_the_figures_are_the_same() -> None:
    model, labels = Lonely(bias=True, **FORMS["cap"]), some_labels()
    with_graph = scored(model, labels)
    objective = objectives(labels, with_graph.logps)["scaled"]
    with_graph = scored(model, labels, objective)
    with torch.no_grad():
        without = scored(model, labels, objective)
    assert without.log_probs is not None
    assert not without.log_probs.requires_grad
    for name in ("log_probs", "logps", "weights", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(without, name), getattr(with_graph, name).detach(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("frozen", ["hidden", "layer.weight", "layer.bias"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: str) -> None:
    whole, part = Lonely(bias=True), Lonely(bias=True)
    part.get_parameter(frozen).requires_grad_(False)
    labels = some_labels()
    results = [scored(model, labels).log_probs for model in (whole, part)]
    expected, got = (gradients(model, out.sum()) for model, out in zip((whole, part), results, strict=True))
    assert set(expected) - set(got) == {frozen}
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


def test_low_precision_is_normalised_in_float32() -> None:
    """Logits are rounded by the model's own head; what comes of them is not rounded again."""
    model, labels = Lonely(torch.bfloat16), some_labels()
    found = scored(model, labels)
    assert found.logps is not None
    assert found.logps.dtype == torch.float32
    mask = labels[:, 1:] != IGNORED
    expected = torch.where(mask, chosen_log_probs(model.layer(model.hidden).float(), labels), 0.0)
    # As elsewhere, matrix products of other shapes may round a logit to its neighbour.
    assert float((found.logps - expected.detach()).abs().median()) < 1e-5
    torch.testing.assert_close(found.logps, expected.detach(), rtol=0.02, atol=0.05)
    assert found.log_probs is not None
    grads = gradients(model, -found.log_probs.sum())
    exact = Lonely(torch.bfloat16).double()
    out = scored(exact, labels).log_probs
    assert out is not None
    for name, grad in gradients(exact, -out.sum()).items():
        assert grads[name].dtype == torch.bfloat16
        assert float((grads[name].double() - grad).norm() / grad.norm()) < 0.02, name


@pytest.mark.parametrize(
    "model_type",
    ["qwen2", "gemma", "mistral", "cohere2", "phi3", "olmo2", "gpt_neox", "bloom", "starcoder2", "mixtral"],
)
def test_it_is_known_where_the_head_is_the_models_logits(model_type: str, random_model: Any) -> None:
    assert has_one_pass_head(random_model(model_type))


@pytest.mark.parametrize("model_type", ["hyperclovax", "llama4_text"])
def test_it_is_known_where_it_is_not(model_type: str, random_model: Any) -> None:
    """HyperCLOVA X multiplies by what others divide by; Llama 4's text model names no body of its own."""
    config = {"logits_scaling": 2.0} if model_type == "hyperclovax" else {}
    assert not has_one_pass_head(random_model(model_type, **config))


@pytest.mark.parametrize("training", [False, True])
def test_the_question_changes_nothing(training: bool, tiny_llama: Any) -> None:
    model = tiny_llama(attention_dropout=0.5).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert has_one_pass_head(model)
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.1)
    assert not has_one_pass_head(model)


def test_without_an_objective_the_model_is_as_it_was(tiny_llama: Any) -> None:
    model, ids = tiny_llama(), torch.arange(4, 20).unsqueeze(0)
    expected = model(input_ids=ids, labels=ids)
    add_one_pass_head(model)
    found = model(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == 18
