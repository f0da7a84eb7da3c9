import json
import signal

import pytest
import torch
from torch import nn

from rba_core.errors import InputError
from rba_core.training.loop import Log, Stopped, make_accelerator, optimise, read_checkpoint, trained_state


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x, y):
        return {"fit": ((self.linear(x) - y) ** 2).mean(), "size": 1e-4 * self.linear.weight.abs().mean()}


def line() -> Line:
    torch.manual_seed(0)
    return Line()


def batch(step: int, index: int = 0, samples: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1000 * step + index))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3


def train(module, checkpoint, inputs=batch, precision="no", **changes):
    groups = [{"params": list(module.linear.parameters()), "lr": 0.1}]
    options = dict(steps=60, batch=32, groups=groups, plan={"rate": 0.1}, warmup=5, save_every=10)
    optimise(make_accelerator(precision), module, inputs, checkpoint=checkpoint, **options | changes)
    return module


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def loss(module) -> float:
    with torch.no_grad():
        return float(module(*batch(1000))["fit"])


def test_optimising_lowers_the_loss(tmp_path):
    module = line()
    before = loss(module)
    assert loss(train(module, tmp_path / "line.pt")) < 0.05 * before


def test_each_micro_batch_is_asked_for_once_in_order(tmp_path):
    asked = []

    def inputs(step, index):
        asked.append((step, index))
        return batch(step, index, 8)

    train(line(), tmp_path / "line.pt", inputs, micro_batch=8)
    assert asked == [(step, index) for step in range(60) for index in range(4)]


def test_micro_batches_add_up_to_the_batch_they_make(tmp_path):
    def whole(step, index):
        parts = [batch(step, part, 8) for part in range(4)]
        return tuple(torch.cat(values) for values in zip(*parts))

    once = train(line(), tmp_path / "once.pt", whole)
    gathered = train(line(), tmp_path / "gathered.pt", lambda step, index: batch(step, index, 8), micro_batch=8)
    assert torch.allclose(once.linear.weight, gathered.linear.weight, atol=1e-5)
    first_only = train(line(), tmp_path / "first.pt", lambda step, index: batch(step, 0, 8), micro_batch=8)
    assert not torch.allclose(once.linear.weight, first_only.linear.weight, atol=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_after_a_stop_it_goes_on_from_the_checkpoint_and_ends_as_if_never_stopped(tmp_path, ema):
    whole = train(line(), tmp_path / "whole.pt", ema=ema)

    def stopping(step, index):
        if step == 37:
            raise Killed
        return batch(step)

    with pytest.raises(Killed):
        train(line(), tmp_path / "line.pt", stopping, ema=ema)
    asked = []

    def inputs(step, index):
        asked.append(step)
        return batch(step)

    assert same(train(line(), tmp_path / "line.pt", inputs, ema=ema), whole)
    assert asked == list(range(30, 60))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_at_the_end_of_the_step_with_a_checkpoint(tmp_path, signum):
    whole = train(line(), tmp_path / "whole.pt", ema=0.9)
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    def inputs(step, index):
        if step == 33:
            signal.raise_signal(signum)
        return batch(step)

    with pytest.raises(Stopped, match="after step 34 of 60") as stopped:
        train(line(), tmp_path / "line.pt", inputs, ema=0.9)
    assert stopped.value.signum == signum
    assert torch.load(tmp_path / "line.pt", weights_only=True)["step"] == 34
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    assert same(train(line(), tmp_path / "line.pt", ema=0.9), whole)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_finished_training_is_read_and_not_repeated(tmp_path, ema):
    first = train(line(), tmp_path / "line.pt", ema=ema)

    def never(step, index):
        raise AssertionError(f"step {step} was asked for")

    assert same(train(line(), tmp_path / "line.pt", never, ema=ema), first)


def test_raised_steps_go_on_where_it_ended(tmp_path):
    train(line(), tmp_path / "line.pt")
    asked = []

    def inputs(step, index):
        asked.append(step)
        return batch(step)

    train(line(), tmp_path / "line.pt", inputs, steps=63)
    assert asked == [60, 61, 62]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"plan": {"rate": 0.2}}, "begun with rate 0.1, now it is 0.2"),
        ({"plan": {"rate": 0.1, "data": {"photos": ["a"]}}}, r"begun with data.photos absent, now it is \['a'\]"),
        ({"steps": 40}, "has 60 steps, more than the 40 asked for"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused(tmp_path, changes, message):
    train(line(), tmp_path / "line.pt")
    before = (tmp_path / "line.pt").read_bytes()
    with pytest.raises(InputError, match=message):
        train(line(), tmp_path / "line.pt", **changes)
    assert (tmp_path / "line.pt").read_bytes() == before


def test_a_checkpoint_cut_short_is_told(tmp_path):
    train(line(), tmp_path / "line.pt")
    (tmp_path / "line.pt").write_bytes((tmp_path / "line.pt").read_bytes()[:500])
    with pytest.raises(InputError, match="line.pt cannot be read"):
        read_checkpoint(tmp_path / "line.pt", {"rate": 0.1}, 60)


def test_frozen_weights_are_neither_moved_nor_kept(tmp_path):
    module = train(line(), tmp_path / "line.pt", ema=0.9)
    assert torch.equal(module.frozen.weight, line().frozen.weight)
    state = torch.load(tmp_path / "line.pt", weights_only=True)
    assert set(state["module"]) == set(state["average"]) == set(trained_state(module)) == {"linear.weight", "linear.bias"}


def test_the_module_ends_with_the_average_of_its_weights(tmp_path):
    module, seen = line(), []

    def inputs(step, index):
        seen.append(module.linear.weight.detach().clone())
        return batch(step)

    train(module, tmp_path / "line.pt", inputs, ema=0.9)
    last = torch.load(tmp_path / "line.pt", weights_only=True)["module"]["linear.weight"]
    average = seen[0]
    for step, weights in enumerate([*seen[1:], last]):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weights
    assert torch.allclose(module.linear.weight, average, atol=1e-5)
    assert not torch.allclose(module.linear.weight, last)


def test_without_an_average_the_module_keeps_its_last_weights(tmp_path):
    module = train(line(), tmp_path / "line.pt")
    assert torch.equal(module.linear.weight, torch.load(tmp_path / "line.pt", weights_only=True)["module"]["linear.weight"])


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rate_rises_and_follows_its_schedule(tmp_path, monkeypatch, schedule):
    rates = []
    usual = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(line(), tmp_path / "line.pt", schedule=schedule)
    assert rates[0] == pytest.approx(0.1 / 5, rel=0.01) and max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates.index(max(rates)) in range(3, 7)
    if schedule == "constant":
        assert rates[5:] == [0.1] * 55
    else:
        assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.03 * max(rates)


def test_groups_keep_their_own_rates(tmp_path, monkeypatch):
    rates = []
    usual = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(tuple(group["lr"] for group in self.param_groups))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    module = line()
    train(module, tmp_path / "line.pt", groups=[{"params": [module.linear.weight], "lr": 0.01}, {"params": [module.linear.bias], "lr": 0.04}])
    assert len(rates) == 60 and all(second == pytest.approx(4 * first) for first, second in rates)


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    usual, saves = torch.save, []

    def save(state, path):
        saves.append(state["step"])
        if len(saves) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        usual(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError):
        train(line(), tmp_path / "line.pt")
    assert saves == [10, 20, 30]
    assert torch.load(tmp_path / "line.pt", weights_only=True)["step"] == 20


def test_bfloat16_trains_too_and_keeps_its_weights_in_float(tmp_path):
    module, seen = line(), []
    before = loss(module)
    module.linear.register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    train(module, tmp_path / "line.pt", precision="bf16")
    assert set(seen) == {torch.bfloat16} and module.linear.weight.dtype == torch.float32
    assert loss(module) < 0.1 * before


def test_validating_sees_the_average_and_changes_nothing(tmp_path):
    plain = train(line(), tmp_path / "plain.pt", ema=0.9)
    module, seen = line(), []

    def validate(step):
        assert not module.training
        seen.append((step, module.linear.weight.clone()))
        return {"loss": 1.5, "miou": 0.25}

    train(module, tmp_path / "line.pt", ema=0.9, validate_every=25, validate=validate)
    assert [step for step, _ in seen] == [25, 50, 60]
    assert same(module, plain) and torch.equal(seen[-1][1], module.linear.weight)
    states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("plain", "line")]
    assert torch.equal(*(state["module"]["linear.weight"] for state in states))
    assert not torch.equal(seen[-1][1], states[0]["module"]["linear.weight"])
    entries = [json.loads(entry) for entry in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "held-out" in entry] == [25, 50, 60]
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_holds_the_means_of_the_steps_between(tmp_path):
    told = []

    class Told(Line):
        def forward(self, x, y):
            terms = super().forward(x, y)
            told.append(float(terms["fit"].detach()))
            return terms

    torch.manual_seed(0)
    train(Told(), tmp_path / "line.pt")
    entries = [json.loads(entry) for entry in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [20, 40, 60]
    assert entries[1]["fit"] == pytest.approx(sum(told[20:40]) / 20)
    assert entries[1]["loss"] == pytest.approx(entries[1]["fit"] + entries[1]["size"])


def test_the_log_of_a_killed_training_is_cut_back_to_its_checkpoint(tmp_path):
    (tmp_path / "line.jsonl").write_text('{"step": 20, "loss": 1}\n{"step": 40, "loss": 2}\n{"step": 60, "lo')
    Log(tmp_path / "line.jsonl", 30)
    assert (tmp_path / "line.jsonl").read_text() == '{"step": 20, "loss": 1}\n'
    Log(tmp_path / "line.jsonl", 0)
    assert (tmp_path / "line.jsonl").read_text() == ""


def test_two_trainings_of_one_process_may_differ_in_precision(tmp_path):
    assert make_accelerator("bf16").mixed_precision == "bf16"
    assert make_accelerator("no").mixed_precision == "no"


def test_a_missing_accelerate_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(InputError, match=r'pip install "refine-by-align\[train\]"'):
        make_accelerator("no")


def test_half_precision_without_a_gpu_is_told():
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="precision: 'fp16' needs a GPU"):
        make_accelerator("fp16")
