"""A session: tenants of unlike kinds and losses in shared passes, against autograd and AdamW written apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.training import layouts
from graft.training.batching import Batcher
from graft.training.objectives.token_losses import TOKEN_LOSSES
from graft.training.session import Session
from graft.training.tenant import AdamSettings
from graft.training.tokens import Ask, Given, TokenSample
from tests.small import small_model
from tests.training.test_layout import _mixing

KINDS: dict[str, Any] = {
    "cross_entropy": graft.LoRA(rank=3, sites="linear"),
    "importance_sampling": graft.Series(bottleneck=4),
    "ppo": graft.Prefix(tokens=3),
    "cispo": graft.IA3(),
    "dro": graft.LoRA(rank=2, sites="attn.q head"),
    "gspo": graft.PromptTuning(tokens=2),
}
"""Loss -> the kind of the tenant that learns by it."""
SETTINGS = {"ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05}, "dro": {"beta": 0.3}}


def sample(loss: str, seed: int, length: int, width: int = 0) -> TokenSample:
    draw = torch.Generator().manual_seed(seed)
    shape = (length, width) if width else (length,)
    ids = torch.randint(2, 258, (length,), generator=draw).tolist()
    fields = {"target_tokens": torch.randint(2, 258, shape, generator=draw)}
    if loss == "cross_entropy":
        fields["weights"] = torch.randn(shape, generator=draw)
    else:
        fields |= {
            "logprobs": -7 + torch.randn(shape, generator=draw),
            "advantages": torch.randn(shape, generator=draw),
        }
    if loss == "gspo":
        fields["sequence_ratio_mask"] = (torch.rand(shape, generator=draw) < 0.6).float()
    return TokenSample(ids, fields)


def asks() -> list[Ask]:
    return [
        Ask(
            loss,
            [sample(loss, 10 * at + each, 4 + 3 * each, 2 * (each == 1)) for each in range(3)],
            loss,
            SETTINGS.get(loss, {}),
        )
        for at, loss in enumerate(KINDS)
    ]


def session(seed: int = 0, **options: Any) -> Session:
    # GPT-2: LLaMA's norm rounds to float32 on its way, in backward too
    found = Session(small_model("gpt2", scale=4.0).double(), **options)
    for name, kind in KINDS.items():
        found.open(name, kind, seed)
        torch.manual_seed(1)
        with torch.no_grad():
            for _, parameter in graft.parameters(found.model, name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return found


def written_apart(loss: str, logp: Tensor, own: dict[str, Tensor], low: float, high: float, beta: float) -> Tensor:
    """The loss of one sample, by the table of the losses."""
    if loss == "cross_entropy":
        return -torch.dot(own["weights"].flatten(), logp.flatten())
    A, q = own["advantages"], own["logprobs"]
    ratio = torch.exp(logp - q)
    if loss == "gspo":
        kept = own["sequence_ratio_mask"] != 0
        s = torch.exp((logp - q)[kept].mean()).detach()
        ratio = s * torch.exp(logp - logp.detach())
    if loss == "importance_sampling":
        return -(ratio * A).sum()
    clipped = torch.clip(ratio, low, high)
    if loss == "cispo":
        return -(clipped.detach() * logp * A).sum()
    if loss == "dro":
        return -(logp * A - beta / 2 * (logp - q) ** 2).sum()
    return -torch.min(ratio * A, clipped * A).sum()


def alone(model: Any, ask: Ask) -> tuple[list[Tensor], float, dict[str, Tensor]]:
    """Log-probabilities, loss and gradients by the model's own forward and autograd, one sample at a time."""
    low, high = {"cispo": (0.0, 4.0), "gspo": (1 - 3e-4, 1 + 4e-4)}.get(ask.loss, (0.9, 1.05))
    found, total = [], torch.zeros((), dtype=torch.float64)
    with graft.use(model, ask.tenant):
        for each in ask.samples:
            logits = model(torch.tensor([each.ids])).logits[0].log_softmax(-1)
            targets = each.targets.reshape(len(each.ids), -1)
            logp = logits.gather(1, targets).reshape(each.targets.shape)
            own = {key: value.double() for key, value in each.fields.items()}
            total = total + written_apart(ask.loss, logp, own, low, high, 0.3)
            found.append(logp.detach())
    parameters = dict(graft.parameters(model, ask.tenant))
    grads = torch.autograd.grad(total, list(parameters.values()))
    return found, float(total.detach()), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("budget", [4096, 12])
def test_every_loss_in_company_is_autograd_alone(budget: int) -> None:
    assert set(KINDS) == set(TOKEN_LOSSES)
    together = session(token_budget=budget)
    both = [together.gradients(asks()), together.gradients(asks())]
    seen = together.forward(asks())
    for at, ask in enumerate(asks()):
        logprobs, loss, grads = alone(together.model, ask)
        for given in (both[0][at], both[1][at], seen[at]):
            assert isinstance(given, Given)
            assert given.loss == pytest.approx(loss, abs=1e-11)
            for one, other in zip(given.logprobs, logprobs, strict=True):
                torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        sums = together.tenants[ask.tenant].sums
        assert set(sums) == {key for key, grad in grads.items()}
        for key, grad in grads.items():  # two asks add up
            torch.testing.assert_close(sums[key], 2 * grad, atol=1e-11, rtol=1e-11)


def test_padding_free_where_it_is_proved_and_equal_to_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, padded = session(), session(layout="padded")
    laid = []
    batch = Batcher.batch
    monkeypatch.setattr(Batcher, "batch", lambda self, rows: laid.append(self.layout) or batch(self, rows))
    flat.forward(asks())
    assert set(laid) == {"padded", "flat"}  # the proofs
    laid.clear()
    one = flat.gradients(asks())
    assert set(laid) == {"flat"}
    other = padded.gradients(asks())
    for first, second in zip(one, other, strict=True):
        assert isinstance(first, Given) and isinstance(second, Given)
        assert first.loss == pytest.approx(second.loss, abs=1e-11)
    for name, tenant in padded.tenants.items():
        for key, grad in tenant.sums.items():
            torch.testing.assert_close(flat.tenants[name].sums[key], grad, atol=1e-11, rtol=1e-11)


def _proved(opened: Session) -> Any:
    ask = asks()[0]
    return opened._forward, opened.tenants[ask.tenant], ask


def test_a_base_that_mixes_sequences_runs_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.attention.functions._by_segments", _mixing)
    trained = session()
    found = trained.gradients(asks())
    assert trained.layouts is not None and trained.layouts.of(*_proved(trained)) == "padded"
    for at, ask in enumerate(asks()):
        given = found[at]
        assert isinstance(given, Given) and given.loss == pytest.approx(alone(trained.model, ask)[1], abs=1e-11)


def test_longer_rows_are_proved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = session()
    short, long = (Ask("cross_entropy", [sample("cross_entropy", 5, length)] * 2) for length in (6, 40))
    compared = []
    compare = layouts.compare_layouts
    monkeypatch.setattr(layouts, "compare_layouts", lambda *given: compared.append(given[2].tokens) or compare(*given))
    for ask in (short, short, long, short, long):
        trained.forward([ask])
    assert compared == [6, 40]


def test_an_update_is_adamw_with_the_settings_of_that_step() -> None:
    trained = session()
    parameters = dict(graft.parameters(trained.model, "dro"))
    copies = {key: value.detach().clone().requires_grad_() for key, value in parameters.items()}
    other = torch.optim.AdamW(list(copies.values()))
    steps = [AdamSettings(1e-2), AdamSettings(3e-3, 0.8, 0.99, 1e-8, 0.1), AdamSettings(1e-2, grad_clip_norm=0.01)]
    for settings in steps:
        trained.gradients(asks())
        for key, grad in trained.tenants["dro"].sums.items():
            copies[key].grad = grad.clone()
        for group in other.param_groups:
            group |= {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2)}
            group |= {"eps": settings.eps, "weight_decay": settings.weight_decay}
        if settings.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(list(copies.values()), settings.grad_clip_norm)
        other.step()
        said = trained.update("dro", settings)
        assert said["asks"] == 1 and said["grad_norm"] > 0 and not trained.tenants["dro"].sums
        for key, value in copies.items():
            torch.testing.assert_close(parameters[key], value, atol=1e-14, rtol=1e-13)
    before = copy.deepcopy(trained.tenants["dro"].trainable.state())
    assert trained.update("dro", AdamSettings()) == {"asks": 0.0, "step": 3.0}  # nothing was asked for
    assert all(torch.equal(value, before[key]) for key, value in trained.tenants["dro"].trainable.state().items())


def test_what_was_saved_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first = session(seed=3)
    first.gradients(asks())
    first.update("cross_entropy", AdamSettings(1e-2))
    first.save("cross_entropy", tmp_path / "saved")
    other = session(seed=3)
    other.load("cross_entropy", tmp_path / "saved")
    cold = session(seed=3)
    cold.load("cross_entropy", tmp_path / "saved", optimizer=False)
    states = []
    for each in (first, other, cold):
        each.gradients(asks())
        each.update("cross_entropy", AdamSettings(1e-2))
        states.append(each.tenants["cross_entropy"].trainable.state())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not all(torch.equal(value, states[2][key]) for key, value in states[0].items())
    model = small_model("gpt2", scale=4.0).double()  # the folder is that of any adapter
    graft.load(model, tmp_path / "saved", name="again")
    with pytest.raises(graft.GraftError):
        other.load("ppo", tmp_path / "saved")
    first.save("ppo", tmp_path / "bare", optimizer=False)
    with pytest.raises(graft.GraftError, match="saved without what training needs"):
        other.load("ppo", tmp_path / "bare")


def test_a_tenant_that_breaks_breaks_alone() -> None:
    clean, broken = session(), session()
    with torch.no_grad():
        next(iter(broken.tenants["ppo"].trainable.params.values())).fill_(float("nan"))
    wanted, found = clean.gradients(asks()), broken.gradients(asks())
    for at, name in enumerate(KINDS):
        if name == "ppo":
            assert isinstance(found[at], graft.GraftError) and not broken.tenants[name].sums
            continue
        one, other = wanted[at], found[at]
        assert isinstance(one, Given) and isinstance(other, Given) and one.loss == other.loss
        for key, grad in clean.tenants[name].sums.items():
            assert torch.equal(grad, broken.tenants[name].sums[key])


def changed(ask: Ask, **fields: Any) -> Ask:
    first = ask.samples[0]
    return Ask(
        ask.tenant, [TokenSample(fields.pop("ids", first.ids), {**first.fields, **fields})], ask.loss, ask.settings
    )


@pytest.mark.parametrize(
    "bad, said",
    [
        (lambda ask: Ask("nobody", ask.samples), "no tenant 'nobody'"),
        (lambda ask: Ask(ask.tenant, ask.samples, "ppo2"), "no loss 'ppo2': allowed are"),
        (lambda ask: Ask(ask.tenant, ask.samples, "ppo"), "sample 0: the loss ppo needs advantages, logprobs"),
        (lambda ask: Ask(ask.tenant, ask.samples, settings={"beta": 1.0}), "has no setting beta: it takes none"),
        (lambda ask: Ask(ask.tenant, []), "no samples"),
        (lambda ask: changed(ask, mask=torch.ones(4)), "does not read mask: it reads"),
        (lambda ask: changed(ask, ids=[]), "no tokens"),
        (lambda ask: changed(ask, ids=[5] * 300), "300 tokens, and the model takes at most 256"),
        (lambda ask: changed(ask, ids=[5, 6, 7, 258]), "ids has to hold token ids from 0 to 257"),
        (lambda ask: changed(ask, target_tokens=torch.tensor([1, 2, 3, -1])), "target_tokens has to hold token ids"),
        (lambda ask: changed(ask, target_tokens=torch.tensor([1, 2, 3])), r"is \[3\], and has to be \[4\]"),
        (lambda ask: changed(ask, weights=torch.ones(4, 2)), r"weights is \[4, 2\], and has to be \[4\]"),
        (lambda ask: changed(ask, weights=torch.tensor([1.0, 2.0, float("inf"), 0.0])), "weights holds a number that is not"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_named_and_changes_nothing(bad: Any, said: str, opened: Session) -> None:
    good = asks()[0]
    (first,) = opened.gradients([good])
    before = {key: value.clone() for key, value in opened.tenants[good.tenant].sums.items()}
    error, second = opened.gradients([bad(good), asks()[1]])
    assert isinstance(first, Given) and isinstance(second, Given)
    assert isinstance(error, graft.GraftError)
    with pytest.raises(graft.GraftError, match=said):
        raise error
    assert all(torch.equal(value, before[key]) for key, value in opened.tenants[good.tenant].sums.items())


@pytest.fixture(scope="module")
def opened() -> Session:
    return session()


def test_mistakes_of_a_tenant_are_named(opened: Session) -> None:
    with pytest.raises(graft.GraftError, match="0 <= beta1 < 1"):
        opened.update("ppo", AdamSettings(beta1=1.0))
    with pytest.raises(graft.GraftError, match="schedule over all steps"):
        opened.open("ranks", graft.AdaLoRA())
    with pytest.raises(graft.GraftError, match="'ppo'"):
        opened.open("ppo", graft.IA3())
    opened.open("extra", graft.IA3())
    opened.close("extra")
    with pytest.raises(graft.GraftError, match="no tenant 'extra'"):
        opened.update("extra", AdamSettings())
