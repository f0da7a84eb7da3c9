import pytest
import torch
from torch import nn

from rba_core.training.loop import optimise


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3


def loss_of(module):
    def loss(step: int) -> dict:
        x, y = batch(step)
        return {"fit": ((module(x) - y) ** 2).mean(), "size": 1e-4 * module.weight.abs().mean()}

    return loss


def train(module, checkpoint, loss=None, **changes):
    options = dict(steps=60, groups=[{"params": list(module.parameters()), "lr": 0.1}], precision=torch.float32, warmup=5, save_every=10)
    optimise(module, loss or loss_of(module), checkpoint=checkpoint, **options | changes)
    return module


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_optimising_lowers_the_loss(tmp_path):
    module = line()
    before = float(loss_of(module)(1000)["fit"])
    train(module, tmp_path / "line.pt")
    assert float(loss_of(module)(1000)["fit"]) < 0.05 * before


def test_each_step_is_asked_for_once_in_order(tmp_path):
    module, asked = line(), []

    def loss(step):
        asked.append(step)
        return loss_of(module)(step)

    train(module, tmp_path / "line.pt", loss)
    assert asked == list(range(60))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_after_a_stop_it_goes_on_from_the_checkpoint_and_ends_as_if_never_stopped(tmp_path, ema):
    whole = train(line(), tmp_path / "whole.pt", ema_decay=ema)
    module, asked = line(), []

    def stopping(step):
        if step == 37:
            raise Stopped
        return loss_of(module)(step)

    with pytest.raises(Stopped):
        train(module, tmp_path / "line.pt", stopping, ema_decay=ema)

    resumed = line()

    def loss(step):
        asked.append(step)
        return loss_of(resumed)(step)

    train(resumed, tmp_path / "line.pt", loss, ema_decay=ema)
    assert asked == list(range(30, 60))
    assert same(resumed, whole)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_finished_training_is_read_and_not_repeated(tmp_path, ema):
    first = train(line(), tmp_path / "line.pt", ema_decay=ema)

    def never(step):
        raise AssertionError(f"step {step} was asked for")

    assert same(train(line(), tmp_path / "line.pt", never, ema_decay=ema), first)


def test_the_module_ends_with_the_average_of_its_weights(tmp_path):
    module, seen = line(), []

    def loss(step):
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return loss_of(module)(step)

    train(module, tmp_path / "line.pt", loss, ema_decay=0.9)
    last = torch.load(tmp_path / "line.pt", weights_only=True)["module"]
    average = seen[0]["weight"]
    for step, weights in enumerate([*seen[1:], last]):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights["weight"]
    assert torch.allclose(module.weight, average, atol=1e-5)
    assert not torch.allclose(module.weight, last["weight"])


def test_without_an_average_the_module_keeps_its_last_weights(tmp_path):
    module = train(line(), tmp_path / "line.pt")
    assert torch.equal(module.weight, torch.load(tmp_path / "line.pt", weights_only=True)["module"]["weight"])


def test_the_learning_rate_warms_up_and_decays(tmp_path, monkeypatch):
    rates = []
    usual = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(line(), tmp_path / "line.pt")
    assert rates[0] == pytest.approx(0.1 / 5, rel=0.01) and max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates.index(max(rates)) in range(3, 7)
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.03 * max(rates)


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    module = line()
    usual, saves = torch.save, []

    def save(state, path):
        saves.append(state["step"])
        if len(saves) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        usual(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError):
        train(module, tmp_path / "line.pt")
    assert saves == [10, 20, 30]
    assert torch.load(tmp_path / "line.pt", weights_only=True)["step"] == 20


def test_bfloat16_autocast_trains_too(tmp_path):
    module = line()
    before = float(loss_of(module)(1000)["fit"])
    train(module, tmp_path / "line.pt", precision=torch.bfloat16)
    assert module.weight.dtype == torch.float32
    assert float(loss_of(module)(1000)["fit"]) < 0.1 * before
