"""How a model is trained: everything that pretraining and fine-tuning share."""

from dataclasses import dataclass, field
from typing import Literal

from spade_t5.training.batch_warmup import BatchWarmupConfig, StepRows
from spade_t5.training.optimizers import AdamWConfig, OptimizerConfig, check_zero_stage
from spade_t5.training.profiling import ProfileConfig
from spade_t5.training.recomputation import Recomputation
from spade_t5.training.schedules import ConstantSchedule, Schedule, WSDSchedule
from spade_t5.training.spikes import SpikesConfig
from spade_t5.training.wandb_run import WandbConfig
from spade_t5.training.watchdog import TimeoutsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """The part of training that DeepSpeed does; its own JSON is derived from this tree by `deepspeed_json`."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """0 copies everything to all ranks; 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep the sharded optimizer states in host memory (ZeRO 1-3, GPUs only)."""
    offload_parameters: bool = False
    """ZeRO 3: keep the sharded parameters in host memory; each layer's are copied to the GPU when it runs (GPUs only)."""
    hpz_partition_size: int = 1
    """ZeRO 3: besides its shard over all ranks, every group of so many neighbouring ranks, best the GPUs of a node, holds a copy of the
    parameters, so that the backward pass gathers them within the group (hierarchical partitioning, ZeRO++). 1: no second copy."""
    bucket_numel: int = 200_000_000
    """Number of elements reduced or gathered at once; smaller takes less memory."""
    persistence_threshold_numel: int = 100_000
    """ZeRO 3: parameters with fewer elements than this stay whole on every rank."""

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer: needs zero_stage 1, 2 or 3; set zero_stage or switch it off")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters: needs zero_stage 3; set zero_stage or switch it off")
        if self.hpz_partition_size < 1:
            raise ValueError(
                f"hpz_partition_size: {self.hpz_partition_size} must be at least 1, which is no second copy"
            )
        if self.hpz_partition_size > 1 and self.zero_stage != 3:
            raise ValueError(
                f"hpz_partition_size: {self.hpz_partition_size} needs zero_stage 3, which shards parameters; set zero_stage=3 or "
                "hpz_partition_size=1"
            )
        if self.hpz_partition_size > 1 and self.offload_parameters:
            raise ValueError(
                "hpz_partition_size: a second copy in each node and offload_parameters contradict each other; keep one"
            )
        if self.bucket_numel < 1:
            raise ValueError(f"bucket_numel: {self.bucket_numel} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One training run: how long, how large the batches, which optimizer, what is saved when."""

    steps: int
    """Number of optimizer steps."""
    global_batch_rows: int
    """Rows in one optimizer step, over all ranks and micro-batches."""
    batch_warmup: BatchWarmupConfig | None = None
    """Fewer rows in the first steps; null: every step has as many."""
    micro_batch_rows: int
    """Rows that one rank runs through the model at once; accumulation follows from it, a remainder is filled with empty rows."""
    optimizer: OptimizerConfig = field(default_factory=lambda: AdamWConfig(learning_rate=1e-3))
    """Optimizer and its peak learning rate."""
    schedule: Schedule = field(default_factory=ConstantSchedule)
    """Learning-rate schedule."""
    ssm_learning_rate: float | None = None
    """Peak rate of state-space parameters, where they train; null: as all others."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 switches clipping off."""
    precision: Literal["fp32", "bf16_autocast", "bf16"] = "fp32"
    """fp32; bf16_autocast: fp32 parameters, matrix products in bf16; bf16: bf16 parameters with fp32 master weights (ZeRO 1-3)."""
    kernel_backend: Literal["auto", "triton", "torch", "naive"] = "auto"
    """What the model's ops run on; auto: SPADE_T5_BACKEND, or without it Triton on a GPU and torch on a CPU."""
    gradient_checkpointing: Literal["none", "selective", "full", False, True] = "none"
    """What layers keep for the backward pass: none: everything; selective: results of products, and norms, gates and dropout are computed
    again; full: their input alone, and all of each layer is computed again. true and false, of older configs, are full and none."""
    compile: bool = False
    """Compile every encoder and decoder layer when it first runs (`torch.compile`; not with ZeRO 3). Losses are the same up to rounding;
    with dropout, other masks are drawn."""
    deepspeed: DeepSpeedConfig | None = None
    """Null trains in one process without DeepSpeed."""
    seed: int = 0
    """Seed of initialisation, data order, noise and dropout."""
    loader_workers: int = 0
    """Processes per rank that prepare batches ahead; 0 prepares them in the training process."""
    log_every_steps: int = 10
    """Steps between progress lines; metrics.jsonl has every step."""
    peak_tflops: float | None = None
    """What one device can do, in 10^12 operations a second, for MFU and HFU; null: that of the known GPUs at the run's precision."""
    norms_every_steps: int | None = None
    """Steps between norms of gradient and weights by part of the model in metrics.jsonl; null: never."""
    profile: ProfileConfig | None = None
    """Steps that torch.profiler records; null: none."""
    wandb: WandbConfig | None = None
    """Where Weights & Biases shows the run as well; null: nowhere."""
    eval_every_steps: int | None = None
    """Steps between evaluations on held-out data; null: only at the end."""
    save_every_steps: int | None = None
    """Steps between checkpoints; null: only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: int | None = None
    """Checkpoints of steps that are multiples of this are kept as well, for good; null: none."""
    keep_best: int = 0
    """Checkpoints with the lowest held-out loss that are kept as well; only those count whose step was evaluated."""
    on_save_error: Literal["stop", "retry"] = "stop"
    """When a checkpoint cannot be written: stop ends the run, retry goes on and writes the next one when it is due."""
    max_wall_seconds: float | None = None
    """The run saves and ends with exit code 75 once it has run for so long; null: no limit."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, which checkpoints carry and `export --ema` writes; null: none."""
    max_skipped_in_a_row: int = 5
    """Steps with a loss or gradient that is not finite are skipped; the run ends after so many in a row."""
    spikes: SpikesConfig | None = None
    """What is done about loss spikes; null: nothing."""
    replica_check_every_steps: int | None = None
    """Steps between comparisons of the weights that ranks hold copies of; they are also compared before each save. Null: never."""
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    """How long each phase may go without progress before the run counts as hanging and ends."""

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        for name in ("steps", "global_batch_rows", "micro_batch_rows", "log_every_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.max_skipped_in_a_row < 1:
            raise ValueError(f"max_skipped_in_a_row: {self.max_skipped_in_a_row} must be at least 1")
        for name in ("eval_every_steps", "save_every_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1, or null for only at the end")
        for name in ("keep_every_steps", "replica_check_every_steps", "norms_every_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1, or null for none")
        if self.keep_best < 0:
            raise ValueError(f"keep_best: {self.keep_best} must not be negative")
        if self.max_wall_seconds is not None and self.max_wall_seconds <= 0:
            raise ValueError(f"max_wall_seconds: {self.max_wall_seconds} must be positive, or null for no limit")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay} must lie between 0 and 1, or be null for no average")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops: {self.peak_tflops} must be positive, or null for that of a known GPU")
        if self.clip_norm < 0:
            raise ValueError(f"clip_norm: {self.clip_norm} must not be negative; 0 switches clipping off")
        if self.loader_workers < 0:
            raise ValueError(f"loader_workers: {self.loader_workers} must not be negative")
        if self.precision == "bf16" and (self.deepspeed is None or self.deepspeed.zero_stage == 0):
            raise ValueError(
                "precision: bf16 keeps fp32 master weights in DeepSpeed's ZeRO 1-3; set deepspeed or use bf16_autocast"
            )
        if self.batch_warmup is not None and self.batch_warmup.initial_rows > self.global_batch_rows:
            raise ValueError(
                f"batch_warmup: initial_rows {self.batch_warmup.initial_rows} is above global_batch_rows {self.global_batch_rows}; "
                "lower it, or leave batch_warmup out"
            )
        if self.compile and self.deepspeed is not None and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "compile: ZeRO 3 gathers parameters in the middle of each layer, which no graph can hold; set compile=false or zero_stage 0 to 2"
            )
        if self.compile and self.recomputation == "selective":
            raise ValueError(
                "compile: compiled layers choose themselves which cheap results they compute again; set gradient_checkpointing to none or full"
            )
        if self.deepspeed is not None:
            check_zero_stage(self.optimizer, self.deepspeed.zero_stage)
        self._check_decay()

    def _check_decay(self) -> None:
        """Refuses a decay that begins before the warm-up ends: the rate would never reach its peak."""
        if not isinstance(self.schedule, WSDSchedule):
            return
        length, warmup = self.schedule.decay_length(self.steps), self.schedule.warmup_steps
        if length and self.steps - length < warmup:
            field = "decay_share" if self.schedule.decay_steps is None else "decay_steps"
            raise ValueError(
                f"schedule.{field}: {getattr(self.schedule, field)} is a decay of {length} steps, which does not fit behind warmup_steps={warmup} "
                f"into steps={self.steps}; shorten the decay or the warm-up, or set steps to at least {warmup + length}"
            )

    @property
    def step_rows(self) -> StepRows:
        """How many rows each step takes."""
        return StepRows(self.global_batch_rows, self.batch_warmup)

    @property
    def recomputation(self) -> Recomputation:
        """What `gradient_checkpointing` means, whichever words say it."""
        if isinstance(self.gradient_checkpointing, bool):
            return "full" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing
