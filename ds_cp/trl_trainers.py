"""TRL's trainers under sequence parallelism: their losses and metrics are those of whole rows, and a sequence group is one process.

TRL computes everything from the scores of tokens, which `models.scored` gives of whole rows to every rank of a group. So every
rank computes the same loss and the same metrics, in TRL's own code. What is left is to count: TRL gathers over processes and
divides by their number, and the ranks of a group are one. GRPO also draws: the ranks of a group have one seed, and the completions
and rewards of its first rank.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import set_seed

from ds_cp import engine
from ds_cp.config import Config
from ds_cp.mesh import Mesh
from ds_cp.models import attach, checks
from ds_cp.token_values import TokenValues

if TYPE_CHECKING:
    from ds_cp.reliable import Host
else:
    Host = object

SCORES: Mapping[str, TokenValues] = {
    "SFTTrainer": TokenValues(extras=("entropy", "is_top1")),
    "DPOTrainer": TokenValues(extras=("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")),
    "GRPOTrainer": TokenValues(entropies=True),
}
"""The trainers that work, and what each reads of its model."""

REFUSED: Mapping[str, str] = {
    "compute_metrics": "leave it out: the logits that TRL hands to it would be a shard's",
    "label_smoothing_factor": "set it to 0: TRL takes it from logits, which would be a shard's",
    "activation_offloading": "set sequence_parallel.activation_offload instead",
    "precompute_ref_log_probs": "set it to False",
    "cast_lm_head_to_fp32": "set it to False: scores are in fp32 from the logits on",
    "use_vllm": "set it to False",
    "log_completions": "set it to False: each would be listed once a rank",
    "tools": "leave tools and environments out",
    "rollout_func": "leave it out",
}
"""Arguments of TRL's, and what to do instead."""

VERSIONS = ((1, 16), (2, 0))
"""Of TRL: from, and before."""


class Rows(Host):
    """What `TrainerMixin` does for TRL's classes; nothing with another class behind it, or where rows are not shared."""

    cp_mesh: Mesh | None = None
    cp_trl: str | None = None
    """The TRL trainer behind the mixin."""

    def begin_trl(self) -> None:
        """With the model attached: what TRL will read of it, and the models and numbers beside it."""
        assert self.cp_trl is not None
        assert self.cp_mesh is not None
        _refuse_selective(self.args, self.cp_mesh)
        asked = SCORES[self.cp_trl]
        asked = TokenValues(asked.entropies, getattr(self, "temperature", 1.0), asked.extras)
        handle = attach.handle_of(self.model)
        assert handle is not None
        handle.token_values = asked
        if getattr(self, "ref_model", None) is not None:
            _attach_reference(self.ref_model, handle, TokenValues(temperature=asked.temperature))
        if self.cp_trl == "GRPOTrainer":
            _share_generations(self.args, self.num_generations, self.num_generations_eval, self.cp_mesh)

    @contextmanager
    def rows_as_processes(self) -> Iterator[None]:
        """TRL's code inside sees one process for each sequence group."""
        own = self.accelerator
        if self.cp_mesh is None or self.cp_trl is None or isinstance(own, Replicas):
            yield
            return
        self.accelerator = Replicas(own, self.cp_mesh)
        try:
            yield
        finally:
            self.accelerator = own

    def _prepare_inputs(self, inputs: Any) -> Any:
        with self.rows_as_processes():
            return super()._prepare_inputs(inputs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Completions from the unsharded model; those of the first rank of the group for all of it."""
        if self.cp_mesh is None:
            return super()._generate_single_turn(*args, **kwargs)
        with engine.disabled(self.model):
            found = [super()._generate_single_turn(*args, **kwargs)]
        dist.broadcast_object_list(found, src=self.cp_mesh.seq.ranks[0], group=self.cp_mesh.seq.group, device=self.args.device)
        return found[0]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """[rows of all replicas, reward functions]: TRL's has them once a rank."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        return rewards if self.cp_mesh is None else one_per_group(rewards, self.cp_mesh)


class Replicas:
    """An accelerate.Accelerator whose processes are the sequence groups; what else it has is the real one's."""

    def __init__(self, accelerator: Any, mesh: Mesh) -> None:
        self._accelerator, self._mesh = accelerator, mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @property
    def num_processes(self) -> int:
        return self._mesh.data.size

    @property
    def process_index(self) -> int:
        return self._mesh.data.rank

    def gather(self, tensor: Tensor) -> Tensor:
        if self._mesh.data.size == 1:
            return tensor  # as in one process
        return one_per_group(self._accelerator.gather(tensor), self._mesh)

    def gather_for_metrics(self, tensor: Tensor) -> Tensor:
        """Without the repeats in the last batch of an epoch."""
        gathered, state = self.gather(tensor), self._accelerator.gradient_state
        repeats = state.end_of_dataloader and state.remainder > 0 and gathered.ndim > 0
        return gathered[: state.remainder] if repeats else gathered

    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor:
        reduced = self._accelerator.reduce(tensor, reduction=reduction, scale=scale)
        return reduced / self._mesh.seq.size if reduction == "sum" else reduced


def one_per_group(gathered: Tensor, mesh: Mesh) -> Tensor:
    """Of what all ranks have given [W * n, ...] the part of the first rank of each group [D * n, ...]."""
    return gathered.unflatten(0, (mesh.data.size, mesh.seq.size, -1))[:, 0].flatten(0, 1)


def trainer_of(trainer: Any) -> str | None:
    """The name of the first class behind a trainer that is TRL's."""
    found = (kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] == "trl")
    return next((name for name in found if not name.startswith("_")), None)


def refuse(trainer: Any, kind: str, block: Config) -> None:
    """Raises ValueError, on every rank, for a trainer, a version or an argument of TRL that would be wrong over shards."""
    if kind not in SCORES:
        raise ValueError(
            f"{kind}: TRL's trainer is not in this version of ds_cp under sequence parallelism, allowed {', '.join(SCORES)}; train "
            "it without the sequence_parallel block"
        )
    version, (least, below) = importlib.metadata.version("trl"), VERSIONS
    if not least <= tuple(int(part) for part in version.split(".")[:2]) < below:
        raise ValueError(f"trl: found {version}, allowed {_dotted(least)} and later, before {_dotted(below)}; install one of those")
    if block.loss_reduction != "auto":
        raise ValueError(
            f"sequence_parallel.loss_reduction: got {block.loss_reduction}, allowed auto, because {kind} computes its loss itself; "
            "leave it out"
        )
    given = {**vars(trainer.args), **{key: getattr(trainer, key, None) for key in ("compute_metrics", "tools", "rollout_func")}}
    for name, advice in REFUSED.items():
        if given.get(name):
            raise ValueError(f"{name}: not in this version of ds_cp with {kind} under sequence parallelism; {advice}")


def _refuse_selective(args: Any, mesh: Mesh) -> None:
    """TRL's checkpointing that keeps what attention kernels give: a ring merges into that, and would merge into it again."""
    if mesh.ring.size > 1 and (args.gradient_checkpointing_kwargs or {}).get("selective"):
        raise ValueError(
            f"gradient_checkpointing_kwargs.selective: not in this version of ds_cp with a ring (ring_size {mesh.ring.size}); "
            "leave it out, or set sequence_parallel.ulysses_size to size"
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _attach_reference(wrapped: nn.Module, handle: attach.Handle, asked: TokenValues) -> None:
    """The frozen model that the trained one is compared with, in the same shards."""
    model, trained = attach.find(wrapped), handle.model
    properties = (type, checks.heads, checks.head_size, checks.windows)
    if any(of(model) != of(trained) for of in properties):
        raise ValueError(
            f"ref_model: {type(model).__name__} has other layers than {type(trained).__name__}, which is trained; pass one of the "
            "same architecture"
        )
    attach.Handle(model, handle.mesh, handle.methods, handle.loss, handle.loss_chunk, token_values=asked).apply()


def _share_generations(args: Any, generations: int, evaluated: int, mesh: Mesh) -> None:
    """GRPO counts a batch of completions over ranks; and each rank has drawn a seed of its own.

    Args: generations, evaluated: completions of a prompt, in training and in evaluation.
    """
    args.generation_batch_size = args.per_device_train_batch_size * mesh.data.size * args.steps_per_generation
    whole = args.generation_batch_size * mesh.seq.size
    if args.generation_batch_size % generations:
        raise ValueError(
            f"generation_batch_size: {whole} over ranks is {args.generation_batch_size} over rows, which num_generations = "
            f"{generations} must divide; change per_device_train_batch_size, gradient_accumulation_steps or num_generations"
        )
    rows = args.per_device_eval_batch_size * mesh.data.size
    if args.eval_strategy != "no" and rows % evaluated:
        raise ValueError(
            f"per_device_eval_batch_size: {args.per_device_eval_batch_size} rows of each of {mesh.data.size} replicas are {rows}, "
            f"which num_generations_eval = {evaluated} must divide; change per_device_eval_batch_size or num_generations_eval"
        )
    set_seed(args.seed + mesh.data.rank)
