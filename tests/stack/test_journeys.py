"""What people do with a model that exists: trainers, precisions, averages, optimizers, files. Ours against the plain run."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from kit import assert_close
from reformer_pytorch.reversible import ReversibleSequence
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import invfunc as inv

WORDS, LENGTH = 32, 12


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """As people train."""
    torch.set_default_dtype(torch.float32)
    yield


def gpt2(depth: int = 3) -> nn.Module:
    """A small GPT-2 with dropout, the same in each call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_head": 2, "n_layer": depth}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, use_cache=False))


def checkpointed(depth: int = 3) -> nn.Module:
    """The same, each block recomputed."""
    model = gpt2(depth)
    inv.nn.checkpoint_blocks(model, "transformer.h.*")
    return model


def samples(count: int = 16) -> list[dict[str, Tensor]]:
    """Random words; each is to be predicted by those before it."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


Make = Callable[[], nn.Module]


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    """To the bit, under the same keys."""
    found_state, state = found.state_dict(), expected.state_dict()
    assert found_state.keys() == state.keys()
    assert all(torch.equal(found_state[key], state[key]) for key in state)


# ---- trainers --------------------------------------------------------------------------------------------------------


def trained_by_transformers(make: Make, folder: Path, resume: bool = False) -> nn.Module:
    """Four steps of two batches each, clipped; with a file after the second."""
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-2,
        save_steps=2,
        seed=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = hf.Trainer(make(), arguments, train_dataset=samples())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer.model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_trainer_of_transformers_gives_the_same_bits_and_resumes(tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    plain = trained_by_transformers(gpt2, tmp_path / "plain")
    ours = trained_by_transformers(checkpointed, tmp_path / "ours")
    assert_same_weights(ours, plain)
    assert_same_weights(trained_by_transformers(checkpointed, tmp_path / "ours", resume=True), plain)
    logging.disable(logging.NOTSET)


def trained_by_accelerate(make: Make) -> tuple[nn.Module, AveragedModel]:
    """bfloat16, two batches a step, clipped, with a moving average of the weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2)
    model = make()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(samples(), 2))
    torch.manual_seed(4)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(accelerator.unwrap_model(model))
    return accelerator.unwrap_model(model), average


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_accelerate_in_bfloat16_with_a_moving_average_gives_the_same_bits() -> None:
    (plain, plain_average), (ours, average) = map(trained_by_accelerate, (gpt2, checkpointed))
    assert_same_weights(ours, plain)
    assert_same_weights(average, plain_average)


class Lit(lightning.LightningModule):
    """A model with a loss, as Lightning wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-1)


def trained_by_lightning(make: Make) -> nn.Module:
    """bfloat16, two batches a step, clipped."""
    model = make()
    torch.manual_seed(4)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"accelerator": "cpu", "precision": "bf16-mixed", "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=4, accumulate_grad_batches=2, gradient_clip_val=0.5, **options)
    trainer.fit(Lit(model), DataLoader(samples(), 2))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_lightning_in_bfloat16_gives_the_same_bits() -> None:
    assert_same_weights(*map(trained_by_lightning, (checkpointed, gpt2)))


# ---- precisions, averages, optimizers --------------------------------------------------------------------------------


def couplings(depth: int, width: int) -> inv.nn.Lowered:
    """A reversible net as a module."""
    torch.manual_seed(0)
    blocks = [inv.couple(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(depth)]
    net = inv.nn.Lowered(inv.chain(inv.split(2), *blocks, inv.concat(2)))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(depth**-0.5)
    return net


def test_autocast_to_bfloat16_gives_plain_gradients_where_the_stream_is_float32() -> None:
    x = torch.randn(4, 16)

    def gradients(mode: str) -> list[Tensor]:
        model = couplings(8, 8)
        with inv.mode(mode), torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        return [p.grad for p in model.parameters()]

    for found, expected in zip(gradients("invert"), gradients("store"), strict=True):
        assert (found - expected).norm() <= 1e-2 * expected.norm()  # the bits of a bfloat16 are 8


def test_an_average_of_the_weights_follows_the_weights_alone() -> None:
    model = couplings(4, 8)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    x, before = torch.randn(4, 16), copy.deepcopy(model)
    average.update_parameters(model)
    with torch.no_grad():
        model.get_parameter("1.f.weight").add_(1.0)
    average.update_parameters(model)
    expected = before.get_parameter("1.f.weight") + 0.5
    assert_close(average.module.get_parameter("1.f.weight"), expected, 1e-6)
    assert_close(inv.measure(average, x).held_bytes, x.untyped_storage().nbytes())


def steps_of(model: nn.Module, x: Tensor, in_backward: bool, count: int = 3) -> int:
    """Train, and return the peak of the last step, gradients included, in bytes."""
    optimizers = {p: torch.optim.SGD([p], 1e-2) for p in model.parameters()}

    def update(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    if in_backward:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)

    def step() -> None:
        model(x).square().mean().backward()
        for p in model.parameters():
            if p.grad is not None:
                update(p)

    for _ in range(count - 1):
        step()
    return inv.measure(step).peak_bytes


def test_an_optimizer_in_backward_holds_one_gradient_at_a_time() -> None:
    x, weights = torch.randn(8, 512), [couplings(64, 256) for _ in range(3)]
    with inv.mode("store"):
        stored = steps_of(weights[0], x, in_backward=False)
        steps_of(weights[1], x, in_backward=True)
    lowered = steps_of(weights[2], x, in_backward=True)
    size = sum(p.untyped_storage().nbytes() for p in weights[0].parameters())
    assert stored >= size and lowered <= size / 27  # 32.1 MiB of gradients, 1.2 MiB
    for model in weights[1:]:
        assert_close(list(model.parameters()), list(weights[0].parameters()), 1e-6)


# ---- files and graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [checkpointed, lambda: inv.nn.reversible(model := gpt2(), "transformer.h.*") and model]
)
def test_safetensors_of_the_plain_model_load(make: Make, tmp_path: Path) -> None:
    plain, ours = gpt2(), make()
    with torch.no_grad():
        plain.transformer.wte.weight.add_(1.0)
    save_model(plain, str(tmp_path / "model.safetensors"))
    assert load_model(ours, str(tmp_path / "model.safetensors")) == (set(), [])
    assert_same_weights(ours, plain)


def head(model: nn.Module) -> nn.Module:
    """What can be deployed: a tensor to a tensor."""
    return nn.Sequential(nn.Linear(6, 16), model, nn.Linear(16, 3)).eval()


def test_an_exported_program_computes_the_same_for_any_batch() -> None:
    model, x = head(couplings(3, 8)), torch.randn(4, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    wide = torch.randn(7, 6)
    assert torch.equal(program.module()(wide), model(wide))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = head(couplings(3, 8)), torch.randn(4, 6)
    torch.onnx.export(model, (x,), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(found), model(x), 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_those_that_run() -> None:
    x = torch.randn(4, 6)
    ours, stored = (torch.ao.quantization.quantize_dynamic(head(couplings(3, 8)), {nn.Linear}) for _ in range(2))
    with torch.no_grad():
        found = ours(x)
        with inv.mode("store"):
            assert torch.equal(found, stored(x))
        error = (found - head(couplings(3, 8))(x)).abs().max()
    assert 0 < error < 0.1


# ---- another engine --------------------------------------------------------------------------------------------------


def test_blocks_of_reformer_pytorch_are_couplings() -> None:
    torch.set_default_dtype(torch.float64)
    nets = nn.ModuleList(nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in "fg") for _ in range(4))
    theirs = ReversibleSequence(copy.deepcopy(nets))
    ours = inv.checkpoint(inv.chain(inv.split(2, dim=2), *[inv.couple(f, g) for f, g in nets], inv.concat(2, dim=2)))
    x = torch.randn(2, 5, 16, requires_grad=True)  # theirs trains nothing without
    found, expected = ours(x), theirs(x, arg_route=(False, False))
    assert_close(found, expected, 1e-12)
    for y in found, expected:
        y.square().sum().backward()
    assert_close([p.grad for p in nets.parameters()], [p.grad for p in theirs.parameters()], 1e-12)
