"""`ConstrainedSFTConfig`: TRL's settings and the constraint's, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig

from deepalign.errors import UserError
from deepalign.losses import TokenStrength

_CHOICES = {
    "objective": ("constrained", "sft"),
    "reduction": ("token", "sequence_sum", "sequence_mean"),
    "reference": ("auto", "online", "precomputed"),
    "head": ("auto", "one-pass", "trl"),
}


@dataclass
class ConstrainedSFTConfig(SFTConfig):  # type: ignore[misc]
    """`SFTConfig` with the constraint's settings; usable with `TrlParser`.

    Two defaults differ from TRL's, because the constraint needs them: all weights are 1 before the first step, so the
    first steps are plain fine-tuning, and only a warm-up keeps them small (Table 9: without one, identity shifting
    succeeds in 69.6 % instead of 8.1 %). On benign data most of the gain is the warm-up's own.

    Raises:
        UserError: A setting is out of range, or one that changes what the loss means.
    """

    objective: str = field(default="constrained", metadata={"help": "constrained (Eq. 3) or sft (plain)."})
    beta_first: float = field(default=0.5, metadata={"help": "Strength at the first response token."})
    beta_early: float = field(default=2.0, metadata={"help": "Strength from the second to the num_early-th."})
    beta_rest: float = field(default=0.1, metadata={"help": "Strength after them."})
    num_early: int = field(default=5, metadata={"help": "Response tokens that are not `rest`."})
    weight_floor: float = field(default=0.0, metadata={"help": "Least weight; 1e-3 is what the official code does."})
    reduction: str = field(
        default="token", metadata={"help": "Mean over tokens (global), or over responses: sequence_sum, sequence_mean."}
    )
    reference: str = field(
        default="auto",
        metadata={"help": "When the reference model is read: online (each step), precomputed (once), or auto."},
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder for precomputed log-probabilities; default one in output_dir."}
    )
    head: str = field(
        default="auto", metadata={"help": "Output layer: one-pass (ours), trl, or auto: trl's on CUDA, else ours."}
    )
    group_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each group's mean loss; rows name the groups of their tokens."}
    )
    warmup_steps: float = field(default=10, metadata={"help": "Linear warm-up; the paper's, and part of the defence."})
    adam_beta1: float = field(default=0.5, metadata={"help": "The paper's; TRL's default is 0.9."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(choices)}")
        try:
            self.strength  # noqa: B018 - raises where it cannot be meant
        except ValueError as error:
            raise UserError(f"{'' if str(error).startswith('num_early') else 'beta_'}{error}") from error
        if not 0.0 <= self.weight_floor < 2.0:
            raise UserError(f"weight_floor={self.weight_floor} is outside [0, 2)")
        if self.group_weights is not None and not all(weight >= 0 for weight in self.group_weights):
            raise UserError(f"group_weights={self.group_weights}: give numbers from 0 up")
        for reason in _unsupported(self):
            raise UserError(reason)

    @property
    def strength(self) -> TokenStrength:
        """Beta by response position."""
        return TokenStrength(
            first=self.beta_first, early=self.beta_early, rest=self.beta_rest, num_early=self.num_early
        )


def _unsupported(args: ConstrainedSFTConfig) -> list[str]:
    found = []
    if args.loss_type != "nll":
        found.append(f"loss_type={args.loss_type!r} weighs tokens in its own way; leave it at 'nll'")
    if args.label_smoothing_factor:
        found.append("label_smoothing_factor changes what a token's log-probability is; leave it at 0")
    if args.use_liger_kernel:
        found.append("use_liger_kernel replaces the forward pass that log-probabilities come from; leave it off")
    if args.packing and args.packing_strategy == "wrapped":
        found.append("packing_strategy='wrapped' cuts answers anywhere, so response positions are lost; use 'bfd'")
    if args.packing and args.group_weights is not None:
        found.append("packing keeps no column of groups; leave out packing, or group_weights")
    return found
