"""Residual models that exist, made reversible in place: their blocks as one pipeline that runs from block to block.

NOTE [Passage] A model's own loop calls the blocks one after another, and hooks, caches and outputs hang on that. So
the loop stays, and so do the blocks: each gets another `forward`, which runs its stage of the pipeline and shows one
stream to the loop, a tensor like any other, while the other stream waits. The first block enters the streams, and the
last one leaves them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import isfunction, unwrap
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _torch
from ..checkpoint import Checkpointed, checkpoint
from ..core.combine import swap
from ..core.context import bind, has_state, taken, takes
from ..core.couple import Half, additive, couple
from ..core.op import Chain, Invertible, chain, name_of, named
from ..engine.lower import Passage
from ..engine.mode import current
from ..engine.parts import version
from ..errors import OptionError, WireError
from ..ops.grids import SPACING, OnGrid, bdia, on_grid
from ..ops.residual import Stepped, hamiltonian, leapfrog, midpoint, momentum
from ..wires import Wire, describe, leaves
from .blocks import Handle, Joined, by_name, find_blocks, find_repeat

Branch: TypeAlias = str | Callable[..., Tensor]
"""A residual branch: the paths of what a block applies one after another, or ``(block, x, **context) -> tensor``.

What is written as ``mlp(x)`` is called with x alone, and what is written as ``attn`` is told what it takes by name. It
is the recipe that knows: an adapter or a compiled module in the place of a layer takes any name, and hands it on.
"""

_ALONE = "(x)"


# ---- branches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """A function that is called with x alone, whatever else it would take."""

    fn: Callable[..., Any]
    keywords_taken = frozenset[str](), False

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What of the block it calls."""
        return (self.fn,)

    def __call__(self, x: Tensor) -> Any:
        return self.fn(x)


def _getter(path: str) -> Callable[[nn.Module], Callable[..., Any]]:
    """What gets a part of a block."""
    get = attrgetter(path.removesuffix(_ALONE))
    return partial(_get_alone, get) if path.endswith(_ALONE) else get


def _get_alone(get: Callable[[nn.Module], Callable[..., Any]], block: nn.Module) -> Alone:
    return Alone(get(block))


@dataclass(frozen=True, eq=False)
class BlockBranch:
    """A residual branch of a block, which is looked up in each call: what takes a module's place is called."""

    block: nn.Module
    branch: Branch
    getters: tuple[Callable[[nn.Module], Callable[..., Any]], ...] = field(init=False)
    keywords_taken = frozenset[str](), True  # it is told all, and tells on

    def __post_init__(self) -> None:
        branch = self.branch
        getters = (partial(partial, branch),) if callable(branch) else tuple(map(_getter, branch.split()))
        object.__setattr__(self, "getters", getters)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What of the block it calls."""
        return tuple([get(self.block) for get in self.getters])

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        for fn in self.functions:
            out = fn(x, **taken(fn, context))
            x = out[0] if isinstance(out, (tuple, list)) else out
        return x

    @property
    def __name__(self) -> str:
        return name_of(self.branch) if callable(self.branch) else self.branch


@dataclass(frozen=True)
class Whole:
    """The residual branch of a whole block: ``x -> f(x) + g(x + f(x)) + ...``."""

    branches: tuple[BlockBranch, ...]
    keywords_taken = frozenset[str](), True

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What of the block it calls."""
        return self.branches

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        total = self.branches[0](x, **context)
        for branch in self.branches[1:]:
            total = total + branch(x + total, **context)
        return total

    @property
    def __name__(self) -> str:
        return " + ".join(branch.__name__ for branch in self.branches)


# ---- schemes ---------------------------------------------------------------------------------------------------------


def _twice(x: Tensor) -> Wire:
    return x, x


def _at_rest(x: Tensor) -> Wire:
    return x, torch.zeros_like(x)


def _twice_on_grid(spacing: float, x: Tensor) -> Wire:
    return _twice(on_grid(x, spacing))


class Scheme(NamedTuple):
    """How the branches of a block become an op on two streams."""

    make: Callable[..., Invertible]  # of all branches, or of the whole block's
    takes: int | None = 1  # of the functions that it takes: 1 for the whole block's, None for any number of branches
    first: Callable[..., Invertible] | None = None  # the same for the first block
    enter: Callable[[Tensor], Wire] = _twice
    shown: int = 1  # the stream that the model sees
    keeps_evaluation: bool = False  # whether the model runs as it was when it is not in training
    draws: bool = False  # whether it draws a number for each sample

    def stage(self, branches: Sequence[BlockBranch], is_first: bool) -> Invertible:
        """The op of a block."""
        make = self.first if is_first and self.first is not None else self._made_for(branches[0].block)
        functions = (Whole(tuple(branches)),) if self.takes == 1 else tuple(branches)
        if self.takes not in (None, len(functions)):
            raise OptionError(
                f"reversible: {len(functions)} branches", expected=f"{self.takes} for {name_of(self.make)}"
            )
        return make(*functions)

    def is_unbatched(self, block: nn.Module, x: Tensor) -> bool:
        """Whether there is one sample alone where the scheme draws for each; torch's own layers take it as a matrix."""
        return self.draws and x.dim() == 2 and _is_torchs(block)

    def _made_for(self, block: nn.Module) -> Callable[..., Invertible]:
        """What makes the op of a block: torch's own layers have positions first, unless they say otherwise."""
        is_batch_first = not _is_torchs(block) or getattr(block.self_attn, "batch_first", True)
        is_told = _given(self.make, "batch_dim", None) is not None
        return self.make if is_batch_first or is_told or not self.draws else partial(self.make, batch_dim=1)


def _is_torchs(block: nn.Module) -> bool:
    return isinstance(block, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))


def _take_turns(*branches: Callable[..., Any]) -> Invertible:
    """The branches change the two streams by turns, the last one that which is shown."""
    if len(branches) == 1:
        return _euler(*branches)
    targets = [(len(branches) - i) % 2 for i in range(len(branches))]
    return chain(*(Half(fn, additive, target, name_of(fn)) for fn, target in zip(branches, targets, strict=True)))


def _euler(fn: Callable[..., Any], step: float = 1.0) -> Invertible:
    """``(x, x) -> (x, x + step * fn(x))``."""
    return chain(couple(fn if step == 1 else Stepped(fn, step)), swap())


def _euler_on_grid(spacing: float, fn: Callable[..., Any]) -> Invertible:
    return _euler(OnGrid(fn, spacing))


def _coupled(scheme: Callable[..., Invertible]) -> Scheme:
    return Scheme(scheme, None if scheme is _take_turns else 2)


def _with_velocity(scheme: Callable[..., Invertible]) -> Scheme:
    return Scheme(scheme, enter=_at_rest, shown=0)


def _two_positions(scheme: Callable[..., Invertible]) -> Scheme:
    return Scheme(scheme, first=partial(_euler, step=_given(scheme, "step", 1.0)))


def _on_grid(scheme: Callable[..., Invertible]) -> Scheme:
    spacing, gammas = _given(scheme, "spacing", SPACING), _given(scheme, "gammas", (0.5, -0.5))
    is_random = not isinstance(gammas, (int, float)) and not sum(gammas)
    first, enter = partial(_euler_on_grid, spacing), partial(_twice_on_grid, spacing)
    draws = not isinstance(gammas, (int, float))
    return Scheme(scheme, first=first, enter=enter, keeps_evaluation=is_random, draws=draws)


def _given(scheme: Any, name: str, default: Any) -> Any:
    return scheme.keywords.get(name, default) if isinstance(scheme, partial) else default


_KINDS = {
    _take_turns: _coupled,
    hamiltonian: _coupled,
    momentum: _with_velocity,
    midpoint: _two_positions,
    leapfrog: Scheme,
    bdia: _on_grid,
}

SCHEMES: dict[str, Callable[..., Invertible]] = {
    "couple": _take_turns,
    "hamiltonian": hamiltonian,
    "momentum": momentum,
    "midpoint": midpoint,
    "leapfrog": leapfrog,
    "bdia": bdia,
    "retrofit": partial(bdia, gammas=2.0**-4),
}


def _scheme(scheme: str | Callable[..., Invertible]) -> Scheme:
    if isinstance(scheme, str) and scheme not in SCHEMES:
        expected = f"one of {', '.join(map(repr, SCHEMES))}, or a function from a branch to an op"
        raise OptionError(f"reversible: scheme is {scheme!r}", expected=expected)
    make = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return _KINDS.get(make.func if isinstance(make, partial) else make, Scheme)(make)  # pyright: ignore


# ---- recipes: what the blocks of known families do to their stream ---------------------------------------------------


def _self_attention_of_gpt2(
    block: Any, x: Tensor, encoder_hidden_states: Any = None, encoder_attention_mask: Any = None, **context: Any
) -> Tensor:
    return block.attn(block.ln_1(x), **context)[0]


def _cross_attention_of_gpt2(block: Any, x: Tensor, encoder_hidden_states: Any = None, **context: Any) -> Tensor:
    if encoder_hidden_states is None:
        return torch.zeros_like(x)
    return block.crossattention(block.ln_cross_attn(x), encoder_hidden_states=encoder_hidden_states, **context)[0]


def _of_gpt2(block: Any) -> tuple[Branch, ...]:
    has_cross = hasattr(block, "crossattention")  # without it, attention refuses an encoder's states
    attention = (_self_attention_of_gpt2, _cross_attention_of_gpt2) if has_cross else ("ln_1(x) attn",)
    return (*attention, "ln_2(x) mlp(x)")


def _cross_attention_of_roberta(
    block: Any, x: Tensor, encoder_hidden_states: Any = None, encoder_attention_mask: Any = None, **context: Any
) -> Tensor:
    if encoder_hidden_states is None:
        return torch.zeros_like(x)
    cross, mask = block.crossattention, encoder_attention_mask
    context = {**context, "encoder_hidden_states": encoder_hidden_states, "attention_mask": mask}
    return cross.output.dropout(cross.output.dense(cross.self(cross.LayerNorm(x), **context)[0]))


def _of_roberta(block: Any) -> tuple[Branch, ...]:
    cross = (_cross_attention_of_roberta,) if hasattr(block, "crossattention") else ()
    attention = "attention.LayerNorm(x) attention.self attention.output.dense(x) attention.output.dropout(x)"
    return (attention, *cross, "intermediate(x) output.dense(x) output.dropout(x)")


def _attention_of_torch(
    layer: Any, x: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Tensor:
    x, mask, padding = layer.norm1(x), src_mask, src_key_padding_mask
    attention = layer.self_attn(
        x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
    )
    return layer.dropout1(attention[0])


def _attention_of_torch_decoder(
    layer: Any, x: Tensor, tgt_mask: Any = None, tgt_key_padding_mask: Any = None, tgt_is_causal: bool = False
) -> Tensor:
    return _attention_of_torch(layer, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)


def _cross_attention_of_torch(
    layer: Any,
    x: Tensor,
    memory: Tensor,
    memory_mask: Any = None,
    memory_key_padding_mask: Any = None,
    memory_is_causal: bool = False,
) -> Tensor:
    attention = layer.multihead_attn(
        layer.norm2(x),
        memory,
        memory,
        attn_mask=memory_mask,
        key_padding_mask=memory_key_padding_mask,
        is_causal=memory_is_causal,
        need_weights=False,
    )
    return layer.dropout2(attention[0])


def _of_torch(layer: Any) -> tuple[Branch, ...]:
    _check_pre_norm(layer)
    return _attention_of_torch, "norm2(x) linear1(x) activation(x) dropout(x) linear2(x) dropout2(x)"


def _of_torch_decoder(layer: Any) -> tuple[Branch, ...]:
    _check_pre_norm(layer)
    feed_forward = "norm3(x) linear1(x) activation(x) dropout(x) linear2(x) dropout3(x)"
    return _attention_of_torch_decoder, _cross_attention_of_torch, feed_forward


def _check_pre_norm(layer: Any, option: str = "norm_first") -> None:
    if not getattr(layer, option):
        raise OptionError(
            f"reversible: {type(layer).__name__} normalises behind each sum",
            expected=f"{option}=True: x + f(x)",
            cure=f"build it with {option}=True, or use inv.nn.checkpoint_blocks",
        )


def _self_attention_of_llama(block: Any, x: Tensor, **context: Any) -> Tensor:
    """By name, as the block does: an adapter may take it so alone."""
    return block.self_attn(hidden_states=block.input_layernorm(x), **context)[0]


_LLAMA = _self_attention_of_llama, "post_attention_layernorm(x) mlp(x)"


def _attention_of_opt(layer: Any, x: Tensor, **context: Any) -> Tensor:
    attention = layer.self_attn(hidden_states=layer.self_attn_layer_norm(x), **context)[0]
    return F.dropout(attention, layer.dropout, layer.training)


def _feed_forward_of_opt(layer: Any, x: Tensor) -> Tensor:
    x = layer.activation_fn(layer.fc1(layer.final_layer_norm(x)))
    x = F.dropout(x, getattr(layer, "activation_dropout", 0.0), layer.training)  # of Whisper
    return F.dropout(layer.fc2(x), layer.dropout, layer.training)


_OPT = _attention_of_opt, _feed_forward_of_opt


def _of_opt(layer: Any) -> tuple[Branch, ...]:
    _check_pre_norm(layer, "do_layer_norm_before")
    return _OPT


def _parallel_of_neox(layer: Any, x: Tensor, **context: Any) -> Tensor:
    attention = layer.post_attention_dropout(layer.attention(layer.input_layernorm(x), **context)[0])
    return attention + layer.post_mlp_dropout(layer.mlp(layer.post_attention_layernorm(x)))


def _of_neox(layer: Any) -> tuple[Branch, ...]:
    if layer.use_parallel_residual:
        return (_parallel_of_neox,)
    return (
        "input_layernorm(x) attention post_attention_dropout(x)",
        "post_attention_layernorm(x) mlp(x) post_mlp_dropout(x)",
    )


def _parallel_of_phi(layer: Any, x: Tensor, **context: Any) -> Tensor:
    x = layer.input_layernorm(x)
    attention = layer.self_attn(hidden_states=x, **context)[0]
    return layer.resid_dropout(attention) + layer.resid_dropout(layer.mlp(x))


def _attention_of_eva(block: Any, x: Tensor, **context: Any) -> Tensor:
    x = block.attn(block.norm1(x), **context)
    return block.drop_path1(x if block.gamma_1 is None else block.gamma_1 * x)


def _feed_forward_of_eva(block: Any, x: Tensor) -> Tensor:
    x = block.mlp(block.norm2(x))
    return block.drop_path2(x if block.gamma_2 is None else block.gamma_2 * x)


_EVA = _attention_of_eva, _feed_forward_of_eva


def _mix_of_mixer(block: Any, x: Tensor) -> Tensor:
    return block.drop_path(block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2))


_CLIP = "layer_norm1(x) self_attn", "layer_norm2(x) mlp(x)"
_NORM_OF_BRANCH = "self_attn post_attention_layernorm(x)", "mlp(x) post_feedforward_layernorm(x)"
_NORM_ON_BOTH_SIDES = (
    "input_layernorm(x) self_attn post_attention_layernorm(x)",
    "pre_feedforward_layernorm(x) mlp(x) post_feedforward_layernorm(x)",
)

RECIPES: dict[str, tuple[Branch, ...] | Callable[[Any], tuple[Branch, ...]]] = {
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": _of_gpt2,
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": _LLAMA,
    "transformers.models.opt.modeling_opt.OPTDecoderLayer": _of_opt,
    "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer": _of_neox,
    "transformers.models.phi.modeling_phi.PhiDecoderLayer": (_parallel_of_phi,),
    "transformers.models.mixtral.modeling_mixtral.MixtralDecoderLayer": _LLAMA,
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeDecoderLayer": _LLAMA,
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer": _LLAMA,
    "transformers.models.mistral.modeling_mistral.MistralDecoderLayer": _LLAMA,
    "transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer": _LLAMA,
    "transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer": _LLAMA,
    "transformers.models.gemma.modeling_gemma.GemmaDecoderLayer": _LLAMA,
    "transformers.models.gemma2.modeling_gemma2.Gemma2DecoderLayer": _NORM_ON_BOTH_SIDES,
    "transformers.models.gemma3.modeling_gemma3.Gemma3DecoderLayer": _NORM_ON_BOTH_SIDES,
    "transformers.models.olmo.modeling_olmo.OlmoDecoderLayer": _LLAMA,
    "transformers.models.olmo2.modeling_olmo2.Olmo2DecoderLayer": _NORM_OF_BRANCH,
    "transformers.models.olmo3.modeling_olmo3.Olmo3DecoderLayer": _NORM_OF_BRANCH,
    "transformers.models.smollm3.modeling_smollm3.SmolLM3DecoderLayer": _LLAMA,
    "transformers.models.starcoder2.modeling_starcoder2.Starcoder2DecoderLayer": _LLAMA,
    "transformers.models.phi3.modeling_phi3.Phi3DecoderLayer": (
        "input_layernorm(x) self_attn resid_attn_dropout(x)",
        "post_attention_layernorm(x) mlp(x) resid_mlp_dropout(x)",
    ),
    "transformers.models.modernbert.modeling_modernbert.ModernBertEncoderLayer": (
        "attn_norm(x) attn",
        "mlp_norm(x) mlp(x)",
    ),
    "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormLayer": _of_roberta,
    "transformers.models.vit.modeling_vit.ViTLayer": (
        "layernorm_before(x) attention dropout(x)",
        "layernorm_after(x) mlp(x) dropout(x)",
    ),
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": _CLIP,
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": _CLIP,
    "transformers.models.whisper.modeling_whisper.WhisperEncoderLayer": _OPT,
    "timm.models.beit.Block": _EVA,
    "timm.models.eva.EvaBlock": _EVA,
    "timm.models.mlp_mixer.MixerBlock": (_mix_of_mixer, "norm2(x) mlp_channels(x) drop_path(x)"),
    "timm.models.vision_transformer.Block": (
        "norm1(x) attn ls1(x) drop_path1(x)",
        "norm2(x) mlp(x) ls2(x) drop_path2(x)",
    ),
    "torch.nn.modules.transformer.TransformerEncoderLayer": _of_torch,
    "torch.nn.modules.transformer.TransformerDecoderLayer": _of_torch_decoder,
}
"""The residual branches of the blocks of known families, by the class whose forward they take apart."""


def _path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _recipe_of(block: nn.Module) -> Any:
    """The recipe for a block: of the class that its forward is of, as any other forward computes something else."""
    known = next((kind for kind in type(block).__mro__ if _path_of(kind) in RECIPES), None)
    changed = _changed(block, known) if known is not None else None
    if known is None or changed is not None:
        raise OptionError(
            f"reversible: no recipe for {_path_of(type(block))}"
            + (f", whose {changed} is not that of {known.__name__}" if known is not None else ""),
            expected=f"one of {', '.join(path.rpartition('.')[2] for path in RECIPES)}",
            cure="say what it adds to its stream: branches=('norm1 attn', 'norm2 mlp'); where it normalises behind "
            "each sum, as BERT does, use inv.nn.checkpoint_blocks",
        )
    return RECIPES[_path_of(known)]


def _changed(block: nn.Module, known: type) -> str | None:
    """A method of a known class that a block has another one for; None where it has all of them."""
    methods = {name: item for name, item in vars(known).items() if isfunction(item) and not name.startswith("__")}
    return next((name for name, item in methods.items() if not _is_method(block, name, item)), None)


def _is_method(block: nn.Module, name: str, item: Callable[..., Any]) -> bool:
    """Whether a block's method is the one of its class, or has something put around it, such as a checkpoint."""
    own = vars(block).get(name)
    if own is None:
        return getattr(type(block), name) is item
    below = unwrap(own)
    return getattr(below, "__func__", below) is unwrap(item)


def _branches_of(block: nn.Module, branches: Any) -> tuple[BlockBranch, ...]:
    """The residual branches of a block, which has to have what they name."""
    branches = _recipe_of(block) if branches is None else branches
    found: Sequence[Branch] = branches(block) if callable(branches) else branches  # pyright: ignore
    for path in [path for branch in found if isinstance(branch, str) for path in branch.split()]:
        try:
            _getter(path)(block)
        except AttributeError as error:
            raise OptionError(
                f"reversible: {type(block).__name__} has no {path.removesuffix(_ALONE)!r}",
                expected="paths of what the block applies one after another",
                cure=f"it has {', '.join(name for name, _ in block.named_children())}",
            ) from error
    return tuple([BlockBranch(block, branch) for branch in found])


# ---- from block to block ---------------------------------------------------------------------------------------------


class Waiting:
    """A pipeline that waits for its next block, and what the wire was when the block before has shown it.

    A write in place is seen by the version counter, which a view shares, and a view of other numbers by how it lies in
    the storage.
    """

    def __init__(self, index: int, passage: Passage) -> None:
        self.index, self.passage = index, passage
        self.versions = [version(leaf) for leaf in leaves(passage.wire)]

    def is_part(self, x: Tensor, shown: int) -> bool:
        """Whether x is the first element of the stream that was shown."""
        return x.dim() > 0 and x.shape == self.passage.wire[shown].shape[1:]

    def is_unchanged(self, x: Tensor, shown: int) -> bool:
        """Whether x is the stream that was shown, or a view of all of it, and no stream has been written into."""
        wire = list(self.passage.wire)
        before, versions = wire[shown], [version(leaf) for leaf in leaves(self.passage.wire)]
        if versions != self.versions or (x is not before and _lying(x) != _lying(before)):
            return False
        if x is not before:
            wire[shown] = x
            self.passage.replace(tuple(wire))
        return True


def _is_state(leaf: Any) -> bool:
    """Whether a block computes with it: a tensor, or an object that it may write into; no flag and no None."""
    return isinstance(leaf, Tensor) or has_state(leaf)


_IN_ORDER = (
    "call all blocks one after another, without layer drop, and change the hidden states nowhere in between, in place "
    "neither; lists of which one does not go on where another ends take a call each"
)
_NO_TUPLES = "use inv.nn.checkpoint_blocks: a block that returns a tuple can not be reversible"


def _lying(x: Tensor) -> tuple[Any, ...]:
    """Which numbers of which storage a tensor has, in what order."""
    where = _torch.storage_of(x), x.storage_offset(), x.shape, x.stride()
    return *where, x.dtype, x.is_conj(), x.is_neg(), version(x)


class Stack:
    """The blocks of a model as one pipeline; see NOTE [Passage].

    Args:
        blocks: The blocks by their paths, in order.
        scheme: How they become ops.
        branches: What of each is a branch.
        options: Those of `invfunc.checkpoint`.
    """

    def __init__(
        self, blocks: Mapping[str, nn.Module], scheme: Scheme, branches: Any, options: Mapping[str, Any]
    ) -> None:
        self.paths, self.blocks, self.scheme = list(blocks), list(blocks.values()), scheme
        self.branches = [_branches_of(block, branches) for block in self.blocks]
        stages = [scheme.stage(of_block, not i) for i, of_block in enumerate(self.branches)]
        self.pipeline = Chain(tuple([named(stage, path) for stage, path in zip(stages, blocks, strict=True)]))
        lowered = checkpoint(self.pipeline, **options)
        assert isinstance(lowered, Checkpointed)
        self.options = lowered.options
        self._under_way: dict[int, Waiting] = {}  # by thread

    def run(self, index: int, x: Tensor, context: Mapping[str, Any]) -> Tensor:
        """Run a block's stage: what the model sees of it."""
        self._check_taken(index, context)
        thread = threading.get_ident()
        passage = self._enter(x) if not index else self._resume(index, x, self._under_way.pop(thread, None))
        passage.step(index, bind(self.pipeline.parts[index], context))
        if index + 1 == len(self.paths):
            return passage.close()[self.scheme.shown]
        self._under_way[thread] = Waiting(index + 1, passage)
        return passage.wire[self.scheme.shown]

    def _check_taken(self, index: int, context: Mapping[str, Any]) -> None:
        """Raise where a block is given tensors or a cache that none of its branches takes: they would be left out."""
        functions = [fn for branch in self.branches[index] for fn in branch.functions]
        for name, value in context.items():
            if any(map(_is_state, leaves(value))) and not any(takes(fn, name) for fn in functions):
                raise WireError(
                    f"reversible: {self.paths[index]} received {name}",
                    expected="names that one of its branches takes",
                    cure=f"write the branch that needs it as a function (block, x, {name}) -> tensor",
                )

    def _enter(self, x: Tensor) -> Passage:
        if self.scheme.is_unbatched(self.blocks[0], x):
            raise WireError(
                f"reversible: {self.paths[0]} received {describe(x)}, one sample",
                expected="a batch: the scheme draws a number for each sample",
                cure="x.unsqueeze(0), or x.unsqueeze(1) where positions come first",
            )
        return Passage(self.pipeline, self.scheme.enter(x), current(self.options))

    def _resume(self, index: int, x: Tensor, waiting: Waiting | None) -> Passage:
        """What waits for a block, whose input has to be what the block before it has shown."""
        if waiting is not None and waiting.index == index and waiting.is_unchanged(x, self.scheme.shown):
            return waiting.passage
        expected, cure = f"what {self.paths[index - 1]} has returned", _IN_ORDER
        if waiting is not None and waiting.is_part(x, self.scheme.shown):
            expected, cure = f"{expected}, and not a part of it, as of a tuple", _NO_TUPLES
        raise WireError(
            f"reversible: {self.paths[index]} received {describe(x)}",
            expected=f"{expected}: its streams go on from there",
            cure=cure,
        )

    @property
    def is_kept(self) -> bool:
        """Whether the blocks run as they were: for evaluation, where the scheme says so.

        A block that is frozen by `eval` has its stage, as those around it are in training.
        """
        return self.scheme.keeps_evaluation and not any([block.training for block in self.blocks])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: nothing is under way there."""
        return {**vars(self), "_under_way": {}}


@dataclass(frozen=True, eq=False)
class BlockForward(Joined):
    """The forward of a block in a reversible model."""

    stack: Stack
    index: int
    block: nn.Module
    original: Callable[..., Any]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What it stands for, for those who ask for its signature."""
        return self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stack.is_kept:
            return self.original(*args, **kwargs)
        return _run_block(self, args, kwargs)


def _traceable(forward: BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, context = by_name(forward.block, args, kwargs)
    return forward.stack.run(forward.index, x, context)


_run_block: Callable[..., Any] = _traceable


def _keep_out_of_graphs() -> None:
    """Not when this file is read: `torch.compiler.disable` imports Dynamo, for seconds."""
    global _run_block
    if _run_block is _traceable:
        _run_block = torch.compiler.disable(_traceable)


# ---- the call --------------------------------------------------------------------------------------------------------


def reversible(
    model: nn.Module,
    blocks: str,
    *,
    scheme: str | Callable[..., Invertible] = "couple",
    branches: Sequence[Branch] | Callable[[Any], Sequence[Branch]] | None = None,
    **options: Any,
) -> Handle:
    r"""Make the residual blocks of a model that exists reversible, in place: activations are rebuilt, none is kept.

    .. math:: x \mapsto x + f(x) + g(x + f(x)) \quad \text{becomes an op on two streams}

    The blocks stay the modules that they are: paths, state-dict keys, hooks, order and indexing of their list do not
    change. Masks, rotary embeddings, encoder states, caches and whatever else the model hands to its blocks reach the
    branches that take them, with gradients. ``output_hidden_states`` and ``generate`` with a cache work as before.

    A reversible network is another function than the residual network, which is not injective; they are equal where the
    branches are zero. What becomes of pretrained weights:

    - ``"couple"``: attention changes one stream and the feed-forward net the other. Another function from the second
      block on: to train from scratch, or to fine-tune for long. ``"hamiltonian"``: the same, with a step.
    - ``"momentum"``: ``partial(inv.ops.momentum, gamma=...)`` differs in proportion to gamma, and its rounding grows as
      :math:`\gamma^{-depth}`. With ``gamma=0`` the new stream has weight zero: *the model as it was*, in training, too,
      but each block keeps one tensor of a stream's size.
    - ``"midpoint"``: near where neighbouring blocks add nearly the same. ``"leapfrog"``: another function, for which f
      is a force.
    - ``"bdia"``: *evaluation is the model as it was*, to the bit, when none of the blocks is in training. In training,
      a block is the model's in the mean over gamma alone, and a step begins far from the pretrained function. Exact by
      one bit for each element and block.
    - ``"retrofit"``: one gamma of 2^-4, in training and in evaluation: begins near the pretrained function, at a
      distance in proportion to gamma, and is exact by four bits for each element and block.

    Args:
        model: The model, changed in place.
        blocks: The path of the blocks, as in `torch.nn.Module.get_submodule`, with ``*`` for any name of a level. The
            model calls them one after another, each with what the one before it returned.
        scheme: One of the names above, or a function from the block's branch to an op, such as
            ``partial(inv.ops.bdia, gammas=2.0**-6)``. ``"couple"`` takes any number of branches, which change the
            streams by turns, and ``"hamiltonian"`` two; the others take the block's whole branch.
        branches: What a block adds to its stream, in order: the paths of what it applies one after another, as in
            ``("ln_1 attn", "ln_2 mlp")``, or functions ``(block, x, **context) -> tensor``; or a function from a block
            to these. ``mlp(x)`` is called with x alone, also when an adapter that takes any name is in its place. None
            takes the recipe for the class of the block, or for the one whose forward it inherits: GPT-2, GPT-NeoX, OPT,
            Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma 1 to 3, OLMo 1 to 3, Phi, Phi-3, SmolLM3, StarCoder2,
            ModernBERT, RoBERTa-PreLayerNorm, ViT, CLIP, SigLIP and Whisper's encoder of transformers, timm's ViT, BEiT,
            EVA and Mixer, torch's encoder and decoder layers (``norm_first=True``).
        options: Those of `invfunc.checkpoint`, such as ``mode``, ``drift`` and ``keep``.

    Returns:
        A handle with the method ``remove()``, which undoes it; also a context manager. Its ``blocks`` are by path.

    Cost:
        Nothing is kept from block to block, but for the bits of the last two schemes and what the model itself keeps:
        hidden states, and a cache, which many models make in training, too, unless they get ``use_cache=False``. Each
        branch is evaluated exactly twice in a training step: 1.31 times plain's flops, where torch's checkpoint takes
        1.25 to 1.27. With ``keep`` of attention's operators, one tensor of a stream's size is kept for each block, and
        attention is not run twice: 1.19 times, in less memory than torch's checkpoint takes (GPT-2 and Llama of 8 and
        16 blocks, texts four times as long as the model is wide). That is less time in steps of some thousand tokens;
        in small steps it is more, as each operator is asked.

    Raises:
        OptionError: When no submodule has such a path, a block has no recipe or not what its branches name, stands in
            two places, or is reversible already, or the scheme or an option is unknown.
        WireError: In the model's forward, when it changes its hidden states between the blocks, or leaves one out, or
            gives a block a tensor or a cache that none of its branches takes.

    Limits:
        Blocks must compute sums, ``x + f(x)``, normalise inside f, and return one tensor. Streams should be float32
        (under autocast they are, if the embedding is). Below `torch.compile` the blocks run as they are written. The
        last block must be reached: a loss of hidden states alone, without the last, can not be rebuilt. A write through
        ``.data`` between the blocks is not refused, as autograd does not see it; a `DriftWarning` follows.

    Example:
        >>> import torch, invfunc as inv
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        >>> handle = inv.nn.reversible(model, "layers.*")
        >>> model(torch.randn(2, 5, 8)).sum().backward()

    Source:
        Gomez et al., RevNet (2017); Mangalam et al., Reversible Vision Transformers (2022); Sander et al., Momentum
        Residual Neural Networks (2021); Zhang, Lewis and Kleijn (2025); Gal et al. (2025): see the ops.
    """
    _keep_out_of_graphs()
    repeat = find_repeat(model, blocks)
    if repeat is not None:
        raise OptionError(
            f"reversible: {repeat[1]} is the same module as {repeat[0]}",
            expected="a module for each block: by it a call tells which stage it is",
            cure="give each a copy, or use inv.nn.checkpoint_blocks, which takes a block that runs more than once",
        )
    handle = Handle(find_blocks(model, blocks))
    stack = Stack(handle.blocks, _scheme(scheme), branches, options)
    for index, (path, block) in enumerate(handle.blocks.items()):
        handle.put(path, BlockForward(stack, index, block, block.forward))
    return handle
