"""The door to a model's output head: the loss is computed where the head's parameters are, tile by tile.

The head's own `forward` (of this instance, undone by `remove`) is called by the model as before, with every hook around it, so
under ZeRO-3 its parameters are gathered once. In a call whose loss is tiled it gives back the logits of one token only, as the end
of the graph that the loss hangs on; the model does to them what it does to logits (scaling, softcap) and hands them to its
`loss_function`, which on the first step compares that with what ds_cp did to all the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_cp.batch import SequenceContext
from ds_cp.liger_head import liger_loss, missing
from ds_cp.tiled_head import FUSED_DTYPES, Head, Terms, joined, tiled_loss
from ds_cp.token_values import TokenValues, token_values

TILE_BYTES = 256 * 2**20
"""Of one tile's logits under "auto", in the dtype in which they are held: fp32, or where one kernel takes them as the head gives
them (`tiled_head.FUSED_DTYPES`) half of it. At a vocabulary of 128,256 that is 512 or 1,024 tokens, enough for the matrix products
to be bound by arithmetic."""

CALL_KEYS = ("label_smoothing", "z_loss", "return_logits", "token_values")
PROBE_TOLERANCE = 0.03  # bf16 rounds once more in the model's own scaling; a scale that was missed is off by more


@dataclass
class Call:
    """What one forward pass of the model asks of its head, and what came of it."""

    terms: Terms
    tile: int
    """0 where the logits stay whole."""
    targets: Tensor | None
    weights: Tensor | None
    values: TokenValues | None = None
    local: Tensor | None = None
    """What was computed: the local sum of the loss, or the values of single tokens."""
    expected: Tensor | None = None
    taken: bool = False


class Door:
    """The head of one attached model."""

    def __init__(self, model: PreTrainedModel, chunk: int | Literal["auto"], kernel: Literal["auto", "liger"] = "auto") -> None:
        self.module = model.get_output_embeddings()
        self.chunk, self.kernel = chunk, kernel
        self._scale, self._softcap = scaling(model.config)
        self._plain: Callable[..., Tensor] | None = None
        self._had_own_forward = False
        self._call: Call | None = None

    def apply(self) -> None:
        if self.module is None:
            return
        self._had_own_forward = "forward" in self.module.__dict__
        self._plain = self.module.forward
        self.module.forward = self._forward

    def remove(self) -> None:
        if self._plain is None:
            return
        if self._had_own_forward:
            self.module.forward = self._plain
        else:
            del self.module.forward
        self._plain = self._call = None

    def begin(self, asked: dict[str, Any], local: dict[str, Any], context: SequenceContext) -> None:
        """Notes what this forward pass is for; `asked` are the keywords of the call that are meant for the head."""
        terms = Terms(float(asked.get("label_smoothing") or 0), float(asked.get("z_loss") or 0))
        if not 0 <= terms.label_smoothing < 1 or terms.z_loss < 0:
            raise ValueError(f"batch: label_smoothing must be in [0, 1) and z_loss at least 0, got {terms}")
        tile: int | Literal["auto"] = 0
        targets = local.get("labels")
        if targets is not None and self._plain is not None and not asked.get("return_logits"):
            tile = tile_of(self.chunk, vocabulary(self.module), targets.numel(), self._logit_bytes())
            if self.kernel == "liger":
                tile = targets.numel()  # it picks its own
                if context.weights is not None:
                    raise ValueError("batch: loss_weights: Liger's loss has none; set sequence_parallel.loss_kernel to auto")
        values = asked.get("token_values")
        if values is not None:
            assert targets is not None
            if self._plain is None:
                raise ValueError("token_logprobs: the model has no output head")
            if self.chunk == 0 and is_composite(self.module) and any(hasattr(p, "ds_id") for p in self.module.parameters()):
                raise ValueError(
                    "token_logprobs: with an adapter on the output head and ZeRO-3 the head must be gathered as one; leave "
                    'sequence_parallel.loss_chunk "auto"'
                )
            del local["labels"]  # the model then asks for no loss
            tile = auto_tile(vocabulary(self.module)) if self.chunk in ("auto", 0) else self.chunk
        assert tile != "auto"
        self._call = Call(terms, tile, targets, context.weights, values)

    def _logit_bytes(self) -> int:
        weight = next(self.module.parameters())
        plain = weight.is_cuda and self._softcap is None and self._plain is not None and _is_linear(self.module, self._plain)
        return weight.element_size() if plain and weight.dtype in FUSED_DTYPES else 4

    def loss_arguments(self, logits: Tensor, context: SequenceContext | None) -> dict[str, Any]:
        """For `CausalLMLoss`: the local sum if the head has computed it, and what a token's loss is made of."""
        call = self._call
        if call is None:
            return {}
        assert call.values is None
        call.taken = True
        if call.local is None:
            return {"terms": call.terms}
        if context is not None and context.census is not None:
            assert call.expected is not None, "it comes with the local sum"
            _check_probe(logits, call.expected)
        return {"local": joined(call.local, logits)}

    def end(self, output: Any, context: SequenceContext) -> Any:
        """The model's output without the stand-in for its logits; with the values of single tokens in their place if asked for."""
        call, self._call = self._call, None
        if call is None or (call.local is None and call.values is None):
            return output
        if call.values is not None:
            if call.local is None or call.expected is None or output.logits.shape != call.expected.shape:
                raise ValueError("model: its logits are not what its output head gave, so token_logprobs would be wrong for it")
            if context.census is not None:
                _check_probe(output.logits, call.expected)
            return type(output)(**{**output, "logits": joined(call.local, output.logits)})
        if not call.taken:
            raise ValueError(
                "model: it did not hand its logits to its loss_function, so a tiled loss would be lost; set "
                "sequence_parallel.loss_chunk to 0"
            )
        if isinstance(output, tuple):
            return (output[0], None, *output[2:])
        return type(output)(**{**output, "logits": None})

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call, plain = self._call, self._plain
        assert plain is not None, "it stands in for it"
        if call is None or not call.tile:
            return plain(hidden, *args, **kwargs)
        tile, call.tile = call.tile, 0  # once a call
        assert call.targets is not None, "tiles are of targets"
        _refuse_leaf_without_input_gradient(self.module, hidden)
        head = Head(plain, tuple(self.module.parameters()), _is_linear(self.module, plain), self._scale, self._softcap)
        if call.values is not None:
            call.local, output = token_values(hidden, head, tile, call.targets, call.values)
        elif self.kernel == "liger":
            call.local, output = liger_loss(hidden, head, call.targets, call.terms)
        else:
            call.local, output = tiled_loss(hidden, head, tile, call.targets, call.weights, call.terms)
        call.expected = head.score_(output.detach().to(torch.float32, copy=True))
        return output


def scaling(config: PretrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) between a head's output and the logits, as HF's configs name them."""
    text = config.get_text_config()
    scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    return scale, getattr(text, "final_logit_softcapping", None)


def tile_of(chunk: int | Literal["auto"], vocabulary_size: int, tokens: int, logit_bytes: int = 4) -> int:
    """Tokens a tile, 0 for whole logits: what "auto" means for a shard of so many tokens."""
    if chunk != "auto":
        return chunk
    tile = auto_tile(vocabulary_size, logit_bytes)
    return 0 if tokens <= tile else tile


def auto_tile(vocabulary_size: int, logit_bytes: int = 4) -> int:
    """Tokens whose logits fill TILE_BYTES, a multiple of 64 where it is more than that."""
    tile = max(1, TILE_BYTES // (logit_bytes * vocabulary_size))
    return tile if tile < 64 else tile // 64 * 64


def vocabulary(module: nn.Module) -> int:
    """Rows of a head's weight, also while ZeRO-3 has it split."""
    return max(getattr(p, "ds_shape", p.shape)[0] for p in module.parameters())


def is_composite(module: nn.Module | None) -> bool:
    """A head of several modules (LoRA's): under ZeRO-3 they would be gathered one by one, in every tile."""
    return module is not None and any(True for _ in module.children())


def refuse_liger(model: PreTrainedModel, device: str) -> None:
    """Raises a ValueError where Liger's loss would not be this model's, or cannot be had."""
    head, (scale, _) = model.get_output_embeddings(), scaling(model.config)
    reason = None
    if head is None or not _is_linear(head, head.forward):
        reason = f"the output head of {type(model).__name__} is no plain linear layer"
    elif scale != 1:
        reason = f"{type(model).__name__} scales its logits by {scale:g}, which Liger does not"
    elif device != "cuda":
        reason = f"its kernel is Triton, for GPUs, and this run is on {device}"
    elif (why := missing()) is not None:
        reason = f"it cannot be loaded here: {why}; pip install liger-kernel"
    if reason is not None:
        raise ValueError(f"sequence_parallel.loss_kernel: liger: {reason}; or set it to auto")


def _is_linear(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    return type(module) is nn.Linear and getattr(forward, "__func__", None) is nn.Linear.forward


def _refuse_leaf_without_input_gradient(module: nn.Module, hidden: Tensor) -> None:
    """DeepSpeed reduces a leaf module's gradients when that of its input is there, which then never comes."""
    split = any(hasattr(p, "ds_id") and p.requires_grad for p in module.parameters())
    if is_composite(module) and split and torch.is_grad_enabled() and not hidden.requires_grad:
        raise ValueError(
            "model: under ZeRO-3 an adapter on the output head cannot be the only thing that is trained with a tiled loss; set "
            "sequence_parallel.loss_chunk to 0, or use ZeRO 0 to 2"
        )


def _check_probe(logits: Tensor, expected: Tensor) -> None:
    """What the model made of one token's logits must be what ds_cp makes of every token's."""
    same = logits.shape == expected.shape
    if not same or float((logits.detach().float() - expected).abs().max()) > PROBE_TOLERANCE * float(expected.abs().max()):
        raise ValueError(
            "model: it does something to its logits before its loss that ds_cp does not know, so a tiled loss would be wrong; set "
            "sequence_parallel.loss_chunk to 0"
        )
