"""Models that are planned as they are, and the command that does it."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from kit import assert_close, assert_refused
from torch import nn

import invfunc as inv
from invfunc.__main__ import main
from invfunc.errors import OptionError
from invfunc.look.memory import measure
from invfunc.plan import Invert, Plan, Recompute, Store
from invfunc.plan.schedule import predict, store_all
from invfunc.plan.search import least

WORDS, WIDTH, LENGTH = 32, 16, 12


class Block(nn.Module):
    def __init__(self, calls=None):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))

    def forward(self, x, mask=None):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    """Embeddings, a loop over blocks with a mask, and a head: no chain that anybody wrote."""

    def __init__(self, depth=4):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(self.norm(x))


def tokens(rows=8):
    return torch.randint(0, WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def sequence():
    def stage():
        return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Dropout(0.2), nn.Linear(64, 16))

    return nn.Sequential(stage(), inv.nn.Coupling(nn.Linear(8, 8), nn.Linear(8, 8)), stage(), nn.Linear(16, 4))


def gradients(model, x):
    torch.manual_seed(1)
    y = model(x)
    return [y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))]


def peak_of_step(model, x):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return measure(lambda: model(x).square().mean().backward()).peak_bytes


def plain_peak(costs):
    return predict(costs, store_all(len(costs.ops))).peak_bytes


@pytest.mark.parametrize("share", [1.0, 0.6, 0.35])
def test_a_model_with_a_list_of_blocks_is_planned_as_it_is(share):
    torch.manual_seed(0)
    model, x = Model(), tokens()
    costs = inv.plan(model, x, max_time=1.0).costs
    plan = inv.plan(model, x, budget=int(share * plain_peak(costs)))
    fast = inv.checkpoint(model, plan=plan)
    assert all(map(torch.equal, gradients(fast, x), gradients(model, x)))
    assert peak_of_step(fast, x) <= 1.01 * plan.peak_bytes <= 1.01 * share * plain_peak(costs)
    assert peak_of_step(fast, x) >= 0.85 * plan.peak_bytes
    assert any(isinstance(node, Recompute) for node in plan.schedule) == (share < 1)


class Remembering(Block):
    def forward(self, x, mask=None, seen=None):
        seen.append(self.mlp(x))
        return super().forward(sum(seen), mask)


class Writing(Model):
    """Its blocks are given what they write into."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Remembering() for _ in range(4))

    def forward(self, tokens):
        x, seen = self.words(tokens) + self.places(torch.arange(tokens.shape[1])), []
        for block in self.blocks:
            x = block(x, seen=seen)
        return self.head(self.norm(x))


class Cache:
    """Keys and values of each block, for who called the model."""

    def __init__(self):
        self.values = []

    def update(self, new):
        self.values.append(new)
        return new


class Caching(Block):
    def forward(self, x, cache=None):
        return x + self.mlp(cache.update(self.norm(x) * 2))


@dataclass
class Scores:
    scores: torch.Tensor
    cache: Cache


class Generator(Model):
    """Its output holds what its blocks have left in a cache."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Caching() for _ in range(4))

    def forward(self, tokens):
        x, cache = self.words(tokens) + self.places(torch.arange(tokens.shape[1])), Cache()
        for block in self.blocks:
            x = block(x, cache=cache)
        return Scores(self.head(self.norm(x)), cache)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_a_cache_that_the_output_holds_counts_in_the_promised_peak(share):
    torch.manual_seed(0)
    model, x = Generator(), tokens(32)

    def loss(out):
        return out.scores.square().mean()

    plan = inv.plan(model, x, max_time=1.0, loss=loss)
    lowest = min(point.peak_bytes for point in plan.curve)
    plan = plan.at(int(lowest + share * (plan.peak_bytes - lowest)))
    found = plan.verify(x, loss=loss)
    assert 0.85 * plan.peak_bytes <= found.peak_bytes <= plan.peak_bytes and found.error == 0


def test_what_blocks_write_into_is_as_it_was_in_every_call():
    torch.manual_seed(0)
    model, x = Writing(), tokens()
    plan = inv.plan(model, x, max_time=10.0)
    assert plan.modes[1:-1] == tuple(("recompute", i, (("store", i),)) for i in range(1, 5))
    assert all(map(torch.equal, gradients(inv.checkpoint(model, plan=plan), x), gradients(model, x)))


def test_the_planned_model_has_the_same_parameters_and_leaves_the_model_as_it_was():
    model, x = Model(), tokens()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    costs = inv.plan(model, x, max_time=1.0).costs
    fast = inv.checkpoint(model, plan=inv.plan(costs, budget=predict(costs, least(costs)).peak_bytes))
    assert type(fast) is Model and fast is not model
    assert dict(fast.named_parameters()) == dict(model.named_parameters())
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    fast.eval()
    assert model.training and model.blocks[0].training and not fast.blocks[0].training
    again = pickle.loads(pickle.dumps(fast))
    for other in (copy.deepcopy(fast), again):
        assert torch.equal(other(x), fast(x))


def test_blocks_are_recomputed_one_by_one():
    costs = inv.plan(Model(6), tokens(), max_time=1.0).costs
    for share in (0.8, 0.5, 0.3):
        plan = inv.plan(costs, budget=int(share * plain_peak(costs)))
        assert isinstance(plan.schedule[0], Store) and isinstance(plan.schedule[-1], Store)
        assert all(node.stop == node.first + 1 for node in plan.schedule)
    assert set(plan.fixed()) == {"store all", "recompute every 1"}
    pair = (Recompute(1, (Store(1), Store(2))),)
    rest = tuple(map(Store, range(3, 8)))
    message = "a schedule recomputes ops 1 to 2, expected regions that do without 'Block', or of one op"
    assert_refused(OptionError, message, lambda: Plan((Store(0), *pair, *rest), costs))
    with pytest.raises(OptionError, match="a schedule recomputes ops 0 to 0"):
        Plan((Recompute(0, (Store(0),)), *map(Store, range(1, 8))), costs)


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_a_sequence_is_planned_as_a_chain_of_its_children(share):
    torch.manual_seed(0)
    model, x = sequence(), torch.randn(256, 16)
    costs = inv.plan(model, x, max_time=1.0).costs
    assert len(costs.ops) > 8
    plan = inv.plan(costs, budget=int(max(share * plain_peak(costs), predict(costs, least(costs)).peak_bytes)))
    fast = inv.checkpoint(model, plan=plan)
    assert type(fast) is nn.Sequential and dict(fast.named_parameters()) == dict(model.named_parameters())
    with inv.mode("store"):  # the coupling lowers itself
        exact = gradients(model, x)
    assert not any(isinstance(node, Invert) for node in plan.schedule)
    assert all(map(torch.equal, gradients(fast, x), exact))


def test_a_planned_sequence_runs_the_children_that_it_has():
    model, x = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]), torch.randn(4, 8)
    fast = inv.checkpoint(model, plan=inv.plan(model, x, budget="1 MB"))
    copied, saved = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    fast[1] = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    assert_close(gradients(fast, x), gradients(nn.Sequential(*fast), x))
    assert torch.export.export(fast, (x,)).module()(x).requires_grad
    for other in (copied, saved):
        with torch.no_grad():
            other[0][0].weight.mul_(3)
        assert_close(gradients(other, x), gradients(nn.Sequential(*other), x))
    fast[1] = nn.Linear(8, 8)
    with pytest.raises(OptionError, match="this plan is for another op"):
        fast(x)


def test_verify_and_saved_plans_of_models(tmp_path):
    model, x = Model(), tokens()
    plan = inv.plan(model, x, max_time=2.0)
    found = plan.verify(x)
    assert found.error == 0 and found.peak_bytes <= 1.01 * plan.peak_bytes
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert torch.equal(inv.checkpoint(model.eval(), plan=again)(x), model(x))
    for other in (Model(5), sequence()):
        with pytest.raises(OptionError, match="this plan is for another op, expected before blocks > Block"):
            inv.checkpoint(other, plan=again)


@dataclass
class Output:
    """As transformers' models return theirs."""

    scores: torch.Tensor
    loss: torch.Tensor | None = None


RESULTS = {
    "a dict": (lambda y: {"scores": y, "loss": None}, lambda out: out["scores"]),
    "a list": (lambda y: [y, 2 * y], lambda out: out[1]),
    "a dataclass": (Output, lambda out: out.scores),
    "dataclasses in a dict": (lambda y: {"out": [Output(y)]}, lambda out: out["out"][0].scores),
}


class Returning(Model):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, tokens):
        return self.make(super().forward(tokens))


@pytest.mark.parametrize("kind", RESULTS)
def test_a_model_may_return_anything(kind):
    make, scores = RESULTS[kind]
    model, x = Returning(make), tokens()
    for options in ({"loss": lambda out: scores(out).square().mean()}, {}):
        plan = inv.plan(model, x, max_time=10.0, **options)
        found = plan.verify(x, **options)
        assert found.error == 0 and 0.85 * plan.peak_bytes <= found.peak_bytes <= 1.01 * plan.peak_bytes
        assert type(inv.checkpoint(model, plan=plan)(x)) is type(model(x))


def test_verify_compares_the_gradients_of_all_weights():
    model, x = Returning(RESULTS["a dict"][0]), tokens()
    plan, seen = inv.plan(model, x, max_time=1.5), []
    for p in model.parameters():
        p.register_hook(lambda grad, p=p: seen.append(id(p)))
    plan.verify(x)
    assert {id(p) for p in model.parameters()} <= set(seen)


class Masked(Model):
    def forward(self, tokens, weights):
        return Output(super().forward(tokens) * (1 if weights is None else weights))


@pytest.mark.parametrize("weights", [None, torch.ones(8, 1, 1)])
def test_a_model_of_several_arguments_is_verified(weights):
    x = tokens(), weights
    assert inv.plan(Masked(), x, max_time=1.5).verify(x).error == 0


class Between(Model):
    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = 2 * block(x)
        return x


class Named(Model):
    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x=x)
        return x


@pytest.mark.parametrize("kind", [Between, Named])
def test_blocks_that_are_no_chain_are_refused(kind):
    message = (
        f"plan: {kind.__name__}.blocks is no chain, expected block {int(kind is Between)} to take what the one before"
    )
    assert_refused(OptionError, message, lambda: inv.plan(kind(), tokens(), max_time=1.5))


class Short(Model):
    def forward(self, tokens):
        return self.blocks[1](self.blocks[0](self.words(tokens)))


def test_a_model_that_leaves_blocks_out_is_refused():
    net = Short()
    message = f"plan: Short.blocks is no chain, expected all of its {len(net.blocks)} blocks to run, got 2; write the"
    assert_refused(OptionError, message, lambda: inv.plan(net, tokens(), max_time=1.5))


def test_a_model_without_blocks_is_refused():
    message = "plan: Bilinear has no blocks, expected a chain, an nn.Sequential, or a model with an nn.ModuleList"
    assert_refused(OptionError, message, lambda: inv.plan(nn.Bilinear(2, 2, 2), ((4, 2), (4, 2)), max_time=1.5))


# ---- from the shell --------------------------------------------------------------------------------------------------


def test_the_command_prints_a_plan_and_saves_it(tmp_path, capsys):
    out = tmp_path / "plan.json"
    main(
        ["plan", "test_plan_models:Model", "--shape", "8,12", "--dtype", "int64", "--max-time", "2", "--out", str(out)]
    )
    shown, plan = capsys.readouterr().out, Plan.load(out)
    assert shown == f"{plan}\nsaved    {out}\n"
    fast = inv.checkpoint(Model(), plan=plan)
    assert fast(tokens()).shape == (8, LENGTH, WORDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1kB"], "budget 1000 B is below the least found"),
        ([], "plan: nothing is limited"),
        (["--budget", "much"], "budget is 'much', expected bytes"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["plan", "test_plan_models:Model", "--shape", "8,12", "--dtype", "int64", *arguments])
    shown = capsys.readouterr().err
    assert left.value.code == 2 and shown.startswith(f"python -m invfunc plan: {message}") and shown.count("\n") == 1


class Collecting(Model):
    """A model that puts hooks into its blocks when it is first called, and tells their results."""

    has_hooks = False

    def forward(self, tokens):
        if not self.has_hooks:
            for block in self.blocks:
                block.mlp.register_forward_hook(lambda module, args, y: self.found.append(y))
        self.has_hooks, self.found = True, []
        return super().forward(tokens)


def test_hooks_that_the_model_makes_in_a_trial_are_gone_behind_it():
    """The model forgot that it had made them, and made them again: it told each result several times."""
    model, tokens = Collecting(), torch.randint(WORDS, (2, LENGTH))
    plan = inv.plan(model, tokens, max_time=1.0)
    assert plan.verify(tokens).error == 0
    model(tokens)
    assert len(model.found) == len(model.blocks)


def test_the_peak_is_that_of_a_batch_as_it_is_given():
    """Images have no gradient in training; that of one that has was measured all the same."""
    model, x = nn.Sequential(nn.Linear(512, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()), torch.randn(64, 512)
    for is_given in (False, True):
        x = x.clone().requires_grad_(is_given)
        plan = inv.plan(model, x, max_time=1.0)
        found = plan.verify(x)
        assert found.error == 0 and 0.9 * plan.peak_bytes <= found.peak_bytes <= 1.01 * plan.peak_bytes
