"""Puts a model under sequence parallelism, per instance and undoably, through HF's own doors only.

- `AttentionInterface.register` adds the implementation "ds_cp"; the instance's `set_attn_implementation` selects it;
- a forward pre-hook turns whole rows into local tokens plus the keyword `cp=context`, which HF passes to every attention call;
- the `loss_function` setter gives the loss of the whole row, and `lm_head.Door` computes it where the logits would be;
- a forward hook checks on the first step that every attention layer was called with the context (the census).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from ds_cp import batch as batches
from ds_cp import comm
from ds_cp.attention import attend
from ds_cp.balance import Chunks, Window
from ds_cp.batch import Methods, SequenceContext
from ds_cp.indexed import attend_chosen
from ds_cp.kernels.attention import Score
from ds_cp.late import Late
from ds_cp.loss import LOCAL, CausalLMLoss
from ds_cp.mesh import Mesh
from ds_cp.models import calls, counted, dropout, family_of, indexer, lm_head, mlp, routers, scored, vision
from ds_cp.models.checks import token_mixers, window_of
from ds_cp.models.relay import relays
from ds_cp.models.same_row import SameRow, check_plan
from ds_cp.offload import Offload
from ds_cp.token_values import TokenValues
from ds_cp.watch import Preemption, Watch

if TYPE_CHECKING:
    from ds_cp.meter import Meter
    from ds_cp.profiling import Profile

IMPLEMENTATION = "ds_cp"  # must not hold "flash": transformers branches on that substring
HANDLE = "ds_cp_handle"
CONTEXT = "ds_cp_context"


class Census:
    """Counts the calls of layers that mix tokens in one forward pass."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()

    def check(self, expected: dict[str, nn.Module], times: Counter[int] | None) -> None:
        """
        Args:
            expected: by name. times: how often each runs, by id; None where a type that no family lists may run it several times.
        """
        missing = [name for name, module in expected.items() if not self.calls[id(module)]]
        if missing or len(self.calls) != len(expected):
            raise ValueError(
                f"model: of {len(expected)} layers that mix tokens {len(expected) - len(missing)} ran under ds_cp; "
                f"{', '.join(missing[:3])} did not run, so training would be wrong"
            )
        if times is None:
            return
        for name, module in expected.items():
            if self.calls[id(module)] != times[id(module)]:
                raise ValueError(
                    f"model: {name} ran {self.calls[id(module)]} times under ds_cp in one pass, and {times[id(module)]} is how "
                    "often its model type runs it; more or fewer was never compared with one process, so training could be wrong"
                )


@dataclass
class Handle:
    """One attached model. `remove()` restores it; `disabled()` does so for a while."""

    model: PreTrainedModel
    mesh: Mesh
    methods: Methods
    loss: CausalLMLoss
    loss_chunk: int | Literal["auto"] = 0
    loss_kernel: Literal["auto", "liger"] = "auto"
    tiled_mlp: bool = False
    activation_offload: bool = False
    watch: Watch | None = None
    preemption: Preemption | None = None
    meter: Meter | None = None
    profile: Profile | None = None
    token_values: TokenValues | None = None
    """What a call for the scores of tokens gives (`scored`), for whoever makes such calls."""
    before_backward: Callable[[], None] | None = None
    """Raises where the backward that begins would be wrong."""
    _undo: list[Any] | None = None
    _checked: bool = False
    _scored: scored.Call | None = None
    _local: Tensor | None = None
    """This rank's own part of the loss that was computed last."""
    _loss: tuple[Late, Tensor, Tensor | None] | None = None
    """(it is finite, row's loss, own part) of a training forward that was not looked at."""

    def apply(self) -> None:
        assert self._undo is None, "already attached"
        AttentionInterface.register(IMPLEMENTATION, attention_forward)
        before = self.model.config.get_text_config()._attn_implementation, self.model.__dict__.get("_loss_function")
        self._set_attention(IMPLEMENTATION)
        if self.model.config.get_text_config()._attn_implementation != IMPLEMENTATION:
            raise ValueError(f"model: {type(self.model).__name__} does not let its attention implementation be set")
        self.model.loss_function = self._loss_function
        self._head = lm_head.Door(self.model, self.loss_chunk, self.loss_kernel)
        self._head.apply()
        self._mlps = mlp.Door(self.model, self.tiled_mlp)
        self._mlps.apply()
        self._dropout = dropout.Door(self.model, self.mesh)
        self._dropout.apply()
        self._same_row = SameRow(self.mesh)
        self._routers = routers.Door(self.model)
        self._routers.apply()
        self._vision = vision.Door(self.model, self.mesh)
        self._counted = counted.Door(self.model)
        self._counted.apply()
        self._offload = Offload() if self.activation_offload else None
        family = family_of(self.model.config)
        self._computes_its_loss = family is None and counted.computes_its_loss(self.model)  # which the trial has compared then
        undo = [family.attach(module) for module in family.mixers(self.model).values()] if family else []
        hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._end_offload, always_call=True),
            self.model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        undo += [relay.remove for relay in relays(self.model, token_mixers(self.model))]  # which find what the hooks put in
        self._indexers = indexer.Door(self.model)
        self._indexers.apply()  # after the relays, whose context it reads
        self._undo = [before, hooks, undo]
        setattr(self.model, HANDLE, self)

    def remove(self) -> None:
        """Gives the model back as it was, to the bit."""
        assert self._undo is not None, "not attached"
        (implementation, loss), hooks, undo = self._undo
        for restore in undo:
            restore()
        for hook in hooks:
            hook.remove()
        self._head.remove()
        self._mlps.remove()
        self._dropout.remove()
        self._routers.remove()
        self._counted.remove()
        self._indexers.remove()
        self._set_attention(implementation)
        if loss is None:
            del self.model._loss_function
        else:
            self.model.loss_function = loss
        delattr(self.model, HANDLE)
        self._undo = None

    def _set_attention(self, implementation: str) -> None:
        """Of the language model; a tower, which sees whole images, keeps its own."""
        config = self.model.config
        text = next((key for key in config.sub_configs if getattr(config, key, None) is config.get_text_config()), "")
        self.model.set_attn_implementation({text: implementation} if vision.has_parts(config) else implementation)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.remove()
        try:
            yield
        finally:
            self.apply()

    def check_finite(self) -> None:
        """Of the last training forward, in the pass after it: the host does not wait for what the device was given since.

        Raises:
            FloatingPointError: on every rank of the row, naming the ranks whose tokens have it. Not in fp16, where DeepSpeed skips
                such steps.
        """
        if self._loss is None:
            return
        (finite, loss, local), self._loss = self._loss, None
        if finite.read():
            return
        assert local is not None, "a loss that is followed has this rank's part"
        everyone = comm.all_gather(local, self.mesh.seq.group).isfinite().tolist()
        ranks = [rank for rank, finite in zip(self.mesh.seq.ranks, everyone, strict=True) if not finite]
        raise FloatingPointError(
            f"the loss of the last forward pass is {loss.item()}, from the tokens of ranks {ranks}; the Trainer has saved nothing "
            "since. Look at that row, or lower the learning rate"
        )

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._enter("forward")
        self.check_finite()
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        calls.refuse_keywords(given)
        calls.refuse_changes(self.model, IMPLEMENTATION)
        device = next(module.parameters()).device
        self._scored = scored.begin(given, self.token_values)
        keep = self._keeps()
        self._same_row.check(given, device, keep)
        census = None if self._checked else Census()
        asked = {key: given.pop(key, None) for key in lm_head.CALL_KEYS}
        if self._computes_its_loss and asked["token_values"] is None:
            given = counted.unshifted(given, module)
        rest = self._routers.begin(given.pop(routers.KEY, None))
        encoded, ids = self._vision.begin(given, device), given.get("input_ids")
        local, context = batches.prepare(given, self.mesh, self.methods, device, census, keep)
        if census is not None:
            check_plan(context, device)
        if self.meter is not None and self.watch is not None:
            self.meter.forward(context, self.watch.step(), module.training)
        if self.profile is not None and self.watch is not None:
            self.profile.forward(self.watch.step(), module.training and torch.is_grad_enabled())
        rest |= self._vision.end(encoded, ids, context)
        self._counted.check(given.get("position_ids"), self.mesh, device)
        self._counted.begin(local["position_ids"])
        self._head.begin(asked, local, context)
        self._targets = local.pop("labels", None) if self._computes_its_loss else None
        if self._offload is not None and torch.is_grad_enabled():
            self._begin_offload(local["position_ids"].shape[-1])
        return (), {**local, **rest, "use_cache": False, "cp": context}

    def _loss_function(self, logits: Tensor, *args: Any, cp: SequenceContext | None = None, **kwargs: Any) -> Tensor:
        loss = self.loss(logits, *args, **{**kwargs, **self._head.loss_arguments(logits, cp), "cp": cp})
        self._local = getattr(loss, LOCAL)
        balance = self._routers.loss(self.loss, kwargs.get("num_items_in_batch"), cp)
        return loss if balance is None else loss + balance

    def _checkpoints(self) -> bool:
        model = self.model
        name = "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
        return bool(getattr(model, name) and model.training)

    def _keeps(self) -> bool:
        """Whether the ring's keys and values of this pass wait for its backward; asked in every pass: the flag may be set late."""
        return self.methods.ring_keep == "always" or (self.methods.ring_keep == "checkpointing" and self._checkpoints())

    def _begin_offload(self, tokens: int) -> None:
        model = self.model
        if not self._checkpoints():
            raise ValueError(
                "sequence_parallel.activation_offload: only inputs of checkpointed layers are kept on the host, but gradient "
                "checkpointing is off; call model.gradient_checkpointing_enable() (Trainer: gradient_checkpointing=True), or set "
                "it to false"
            )
        assert self._offload is not None
        embedding = model.get_input_embeddings().weight
        self._offload.begin((1, tokens, model.config.get_text_config().hidden_size), embedding.dtype, embedding.device)

    def _times(self, module: nn.Module) -> Counter[int] | None:
        """As often as a layer is somebody's child: Zamba's attention is that of several layers."""
        if family_of(self.model.config) is None:
            return None
        return Counter(id(child) for _, child in module.named_modules(remove_duplicate=False))

    def _end_offload(self, *_: Any) -> None:
        if self._offload is not None:
            self._offload.end()

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        context: SequenceContext = kwargs["cp"]
        if context.census is not None:
            context.census.check(token_mixers(module), self._times(module))
            self._checked = True
        if self._targets is not None:
            loss = self._loss_function(
                output.logits, self._targets, cp=context, num_items_in_batch=kwargs.get("num_items_in_batch")
            )
            output = counted.with_loss(output, loss)
        output = self._routers.end(self._head.end(output, context), context)
        if self._scored is not None:
            output = self._end_scored(output, context)
        for x in (getattr(output, "logits", None), *(getattr(output, "hidden_states", None) or ())):
            if isinstance(x, Tensor):
                setattr(x, CONTEXT, context)
        self._enter("after the forward" if torch.is_grad_enabled() else "evaluation")
        shown, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if isinstance(shown, Tensor):
            self._follow(shown, shown.detach(), self._local)
        elif isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(self._begin_backward)
        return output

    def _end_scored(self, given: Any, context: SequenceContext) -> scored.TokenOutput:
        call, self._scored = self._scored, None
        assert call is not None
        local: Tensor = given.logits
        output = call.end(local, getattr(given, "aux_loss", None), context)
        assert output.log_probs is not None
        self._follow(output.log_probs, -output.log_probs.detach().sum(), -local[..., 0].detach().sum())
        return output

    def _follow(self, computed: Tensor, loss: Tensor, own: Tensor | None) -> None:
        """Notes when backward comes to what this pass has computed, and its loss for `check_finite`."""
        if not computed.requires_grad:
            return
        computed.register_hook(self._begin_backward)
        if self.model.dtype != torch.float16:
            self._loss = Late(torch.isfinite(loss)), loss, own

    def _begin_backward(self, _: Tensor) -> None:
        self._enter("backward")
        if self.before_backward is not None:
            self.before_backward()

    def _enter(self, phase: str) -> None:
        if self.watch is not None:
            self.watch.enter(phase)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cp: SequenceContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """HF's attention interface: query [1, N, T, H], key and value [1, M, T, H] to ([1, T, N, H], None).

    Raises:
        ValueError: the model did not pass the context on, or asks for something that only shows at the call.
    """
    name = type(module).__name__
    if cp is None:
        raise ValueError(
            f"model: {name} was called without ds_cp's context: the model drops unknown keywords on the way to its layers, or "
            "was called past its hooks; it cannot be trained under sequence parallelism"
        )
    asked = {"dropout": dropout, **{k: kwargs.get(k) for k in ("head_mask", "block_indices")}}
    for what, given in asked.items():
        if given is not None and (isinstance(given, Tensor) or given):
            raise ValueError(f"model: {name} asks its attention for {what}={given}, which is not in this version of ds_cp")
    if attention_mask is not None and not indexer.is_stand_in(attention_mask):
        raise ValueError(f"model: {name} passes a mask of its own to its attention, which is not in this version of ds_cp")
    if cp.census is not None:
        cp.census.calls[id(module)] += 1
    score = Score(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap") or None)
    query = counted.with_temperature(module, query, kwargs.get("position_ids"))
    window, size = _window(module, kwargs.get("sliding_window"), cp), value.shape[-1]
    if size != query.shape[-1]:  # latent attention
        query, key, value = _of_one_size(query, key, value)
    if (chosen := kwargs.get(indexer.KEY)) is not None:
        if score.softcap is not None:
            raise ValueError(f"model: {name} asks for a softcap over chosen keys, which is not in this version of ds_cp")
        out = attend_chosen(query, key, value, chosen, cp, score.scale, kwargs.get("s_aux"))
        return out[..., :size].contiguous(), None
    return attend(query, key, value, cp, score, window, kwargs.get("s_aux"))[..., :size].contiguous(), None


def _of_one_size(*tensors: Tensor) -> list[Tensor]:
    """Heads filled up with zeros, which change no score, and of the output only what is cut off again."""
    size = max(x.shape[-1] for x in tensors)
    return [functional.pad(x, (0, size - x.shape[-1])) for x in tensors]


def _window(module: nn.Module, given: int | None, cp: SequenceContext) -> Window:
    """The layer's window, which must be one that the batch was planned for. Nobody tells attention of chunks."""
    config = getattr(module, "config", None)
    if given is None and config is not None and isinstance(chunks := window_of(module, config), Chunks):
        return chunks
    if given not in cp.plans or given != (given if config is None else window_of(module, config)):
        raise ValueError(
            f"model: {type(module).__name__} asks its attention for sliding_window={given}; its layers were found to have "
            f"{', '.join(str(window) for window in cp.plans)} when the run began"
        )
    return given


def find(model: nn.Module) -> PreTrainedModel | nn.Module:
    """The HF model inside wrappers (PEFT and the like): the outermost PreTrainedModel, else the module itself."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of an attached model, also through an engine or a wrapper."""
    return next((getattr(m, HANDLE) for m in model.modules() if HANDLE in m.__dict__), None)
