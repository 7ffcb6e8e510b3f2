"""Options of ``rlhf-critic ppo``: policy, critic, prompts, rollouts, rewards and algorithm. Knows nothing about Ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rlhf_critic.config.base import (
    Decay,
    Fraction,
    ModelPath,
    NonNegativeFloat,
    NonNegativeInt,
    PathOrUri,
    RunName,
    Section,
    Sources,
)
from rlhf_critic.config.model import AssumedEncoding, BodyConfig, ChatTemplate, ModelConfig, OptimizerConfig
from rlhf_critic.errors import ConfigError


class CriticOptimizerConfig(OptimizerConfig):
    """AdamW for the critic."""

    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """Learning-rate schedule after warm-up."""
    warmup_fraction: Fraction = 0.0
    """Fraction of all steps over which the learning rate rises from 0."""


class PolicyOptimizerConfig(CriticOptimizerConfig):
    """AdamW for the policy."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""


class PolicyConfig(Section):
    """The trained policy and its frozen reference."""

    model: BodyConfig = BodyConfig()
    optimizer: PolicyOptimizerConfig = PolicyOptimizerConfig()
    chat_template: ChatTemplate = "auto"
    """Chat template of prompts: 'auto' (the tokenizer's own, else plain), 'plain' or a Jinja file."""
    shards: PositiveInt = 1
    """Number of actors that the policy is sharded over."""
    cpus_per_shard: PositiveFloat = 1.0
    """CPUs that Ray reserves per policy shard; also its number of torch threads without a GPU."""


class CriticConfig(Section):
    """The online critic, which is trained on returns."""

    model: ModelConfig = ModelConfig()
    """Critic to start from: a critic directory as path, or by default the policy's base model with a zero head."""
    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    shards: PositiveInt = 1
    """Number of actors that the critic is sharded over."""
    cpus_per_shard: PositiveFloat = 1.0
    """CPUs that Ray reserves per critic shard; also its number of torch threads without a GPU."""
    offload: bool = False
    """Offload the critic's parameters and optimizer state during rollouts. Has no benefit with run.use_gpu, where every
    actor has its own GPU."""


class PromptConfig(Section):
    """Sources of the prompts that the policy answers."""

    train: Sources = ()
    """Training prompts (required): files, directories from datasets' save_to_disk, or hub ids. Rows need a prompt."""
    validation: Sources = ()
    """Held-out prompts, sources as in prompts.train; an alternative to prompts.validation_fraction."""
    validation_fraction: Decay = 0.0
    """Fraction of the training prompts to hold out."""
    fields: dict[str, str] = Field({})
    """Field name of prompts in your data: --prompts.fields prompt instruction."""
    max_tokens: PositiveInt = 256
    """Maximum prompt length in tokens. Longer prompts are truncated from the left."""


class RolloutConfig(Section):
    """Sampling of responses by rollout workers."""

    workers: PositiveInt = 1
    """Number of actors that sample responses, each with the full policy."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray reserves per rollout worker; also its number of torch threads without a GPU."""
    prompts_per_iteration: PositiveInt = 32
    """Number of prompts per iteration."""
    samples_per_prompt: PositiveInt = 1
    """Responses sampled per prompt, which share the prompt's computation in critic and policy."""
    prompts_per_task: PositiveInt = 4
    """Prompts per task of a worker. With several tasks, sampling overlaps the scoring of the previous task. Samples
    depend on this number, not on the number of workers."""
    max_new_tokens: PositiveInt = 64
    """Maximum response length in tokens; longer responses are truncated. Answers of rollout.environment count."""
    environment: str | None = None
    """Python function MODULE:FUNCTION that answers each turn of the policy, such as a tool; None samples one turn."""
    max_turns: PositiveInt = 8
    """Maximum number of turns of the policy in a response (only with rollout.environment)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of response tokens."""
    timeout_s: PositiveFloat = 3600.0
    """Seconds to wait for the rollouts of an iteration."""


class RewardConfig(AssumedEncoding):
    """The scorers of responses, and the treatment of their rewards."""

    app: str = "scorers"
    """Name of the scorer pool, as in rlhf-critic serve --app."""
    checkpoint: ModelPath | None = None
    """Critic directory or another reward model, as in rlhf-critic serve, for a scorer pool that lives as long as the
    job; None uses a running pool."""
    components: PathOrUri | None = None
    """YAML file with the components of a reward, as in rlhf-critic serve (only with reward.checkpoint)."""
    normalize: bool = False
    """Normalise rewards with the critic's reference mean and deviation (only with reward.checkpoint)."""
    pessimism: NonNegativeFloat = 0.0
    """Standard deviations of the reward to subtract from it, as in rlhf-critic serve (only with reward.checkpoint). The
    reward model must be calibrated."""
    min_replicas: PositiveInt = 1
    """Minimum number of scorer replicas (only with reward.checkpoint)."""
    max_replicas: PositiveInt = 1
    """Maximum number of scorer replicas (only with reward.checkpoint)."""
    cpus_per_replica: PositiveFloat = 1.0
    """CPUs per scorer replica (only with reward.checkpoint)."""
    deadline_s: PositiveFloat = 600.0
    """Seconds to wait for rewards, retries included."""
    patience_s: NonNegativeFloat = 1800.0
    """Seconds to keep asking scorers that did not answer within reward.deadline_s. The run pauses meanwhile, and
    rollout.timeout_s is extended by this time."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Penalty subtracted from the reward of a response truncated at rollout.max_new_tokens."""
    scaling: Literal["none", "running"] = "none"
    """Reward scaling. running divides rewards by the standard deviation of all rewards so far."""
    clip: PositiveFloat | None = None
    """Limit of scaled rewards, which are clipped to [-clip, clip]; None does not clip."""
    allow_mixed_versions: bool = False
    """Allow rewards of two reward-model versions in one iteration during a publication. If off, such an iteration is
    scored again by one version."""


class AlgorithmConfig(Section):
    """Hyperparameters of the PPO algorithm."""

    iterations: PositiveInt = 100
    """Number of rounds of rollouts and updates."""
    epochs: PositiveInt = 1
    """Passes over the rollouts of an iteration."""
    critic_epochs: PositiveInt = 1
    """Passes of the critic for each pass of the policy."""
    minibatches: PositiveInt = 1
    """Number of optimizer steps per epoch."""
    gamma: Fraction = 1.0
    """Discount factor per token."""
    gae_lambda: Fraction = 0.95
    """Lambda of GAE: 0 relies on the critic's next value, 1 on the observed rewards."""
    critic_lambda: Fraction | None = None
    """Lambda of the critic's returns (decoupled GAE). None means 1 with ppo.length_adaptive_alpha and otherwise
    ppo.gae_lambda, as in earlier versions."""
    length_adaptive_alpha: PositiveFloat | None = None
    """Alpha of a lambda of the policy's advantages that grows with the response: 1 - 1 / (alpha * tokens), as in VAPO,
    which uses 0.05. None uses ppo.gae_lambda."""
    gae_step: Literal["token", "turn"] = "token"
    """Action of GAE: a token, or a whole turn of the policy between outputs of tools."""
    baseline: Literal["critic", "rloo", "grpo"] = "critic"
    """Baseline of the policy's advantages: the critic, or the other responses to the prompt. The critic is trained and
    measured in any case."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Clip range of the policy's probability ratio: [1 - clip, 1 + clip]."""
    clip_high: PositiveFloat | None = None
    """Upper part of the clip range, 1 + clip_high, as in DAPO; None uses ppo.clip."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Maximum probability ratio of tokens with negative advantages (dual clip); None does not limit it."""
    loss_mean: Literal["token", "sequence"] = "token"
    """Mean of the losses: over all response tokens, or over responses after a mean over the tokens of each."""
    value_clip: PositiveFloat | None = 0.2
    """Maximum change of a value from its old value; None does not clip."""
    kl_coefficient: NonNegativeFloat = 0.05
    """Penalty per nat of KL divergence from the reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL divergence, named as by Schulman."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Bonus per nat of the policy's entropy."""
    whiten_advantages: bool = True
    """Normalise advantages to mean 0 and variance 1 over the iteration."""
    bootstrap_truncated: bool = False
    """Leave truncated responses unscored and continue their return with the critic's value. If off, they are scored as
    they are and end there."""
    value_warmup_iterations: NonNegativeInt = 0
    """Number of first iterations that train the critic and leave the policy unchanged."""
    value_warmup_lambda: Fraction | None = None
    """Lambda of the critic's returns in these iterations. 1 gives Monte Carlo returns of the initial policy, as in
    VC-PPO. None uses that of the other iterations."""
    max_kl: PositiveFloat = 50.0
    """Maximum mean KL of a response from the reference, in nats; above it the run stops."""
    seed: NonNegativeInt = 0
    """Random seed for prompt order, sampling and minibatches."""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_name(cls, options: Any) -> Any:
        """Reads ``lam``, the name of ``gae_lambda`` in files of earlier versions."""
        if isinstance(options, dict) and "lam" in options:
            options = {("gae_lambda" if name == "lam" else name): value for name, value in options.items()}
        return options


class PPORunConfig(Section):
    """Name, storage, hardware and checkpoints of the run."""

    name: RunName = "ppo"
    """Name of the run. Its directory is STORAGE_PATH/NAME."""
    storage_path: PathOrUri = "runs"
    """Directory of all runs: a local path, which all nodes must share."""
    use_gpu: bool = False
    """Use one GPU for each shard, worker and replica."""
    checkpoint_every: NonNegativeInt = 10
    """Iterations between checkpoints; 0 saves at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep in the run's directory."""
    wandb_project: str | None = None
    """Project of Weights & Biases that also receives the history; needs the wandb package."""
    history_uri: PathOrUri | None = None
    """URI (s3://, gs://) or path to which the history is also copied, as NAME/history."""
    evaluate_every: NonNegativeInt = 0
    """Iterations between evaluations on held-out prompts; 0 evaluates before the first and after the last."""
    max_failures: NonNegativeInt = 3
    """Maximum number of times that a lost critic or policy is restored before the job fails."""
    start_timeout_s: PositiveFloat = 1800.0
    """Seconds to wait for actors to start, including the time an autoscaler needs to add nodes."""

    @field_validator("storage_path")
    @classmethod
    def _a_path(cls, path: str) -> str:
        if "://" in path:
            raise ValueError("must be a path, because shards write their checkpoints there; mount the store")
        return path


class PPOJobConfig(Section):
    """Trains a policy with PPO: workers sample responses, scorers score them, and a sharded critic estimates values.

    For example: rlhf-critic ppo --policy.model.path MODEL --prompts.train prompts.jsonl --reward.checkpoint CRITIC
    """

    policy: PolicyConfig = PolicyConfig()
    critic: CriticConfig = CriticConfig()
    prompts: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    ppo: AlgorithmConfig = AlgorithmConfig()
    run: PPORunConfig = Field(default_factory=PPORunConfig)
    resume: bool = False
    """Resume the run of this name from its last checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> PPOJobConfig:
        if self.prompts.validation and self.prompts.validation_fraction:
            raise ValueError("prompts.validation and prompts.validation_fraction exclude each other; give one of them")
        if self.ppo.minibatches > self.rollout.prompts_per_iteration:
            raise ValueError(
                "ppo.minibatches exceeds rollout.prompts_per_iteration; rollouts of one prompt stay together"
            )
        if self.ppo.bootstrap_truncated and self.reward.missing_eos_penalty:
            raise ValueError(
                "reward.missing_eos_penalty and ppo.bootstrap_truncated exclude each other, because bootstrapping "
                "leaves truncated responses without a reward"
            )
        if self.ppo.baseline != "critic" and self.rollout.samples_per_prompt < 2:
            raise ValueError(f"ppo.baseline {self.ppo.baseline} needs rollout.samples_per_prompt of at least 2")
        if self.ppo.baseline != "critic" and self.ppo.bootstrap_truncated:
            raise ValueError(
                f"ppo.baseline {self.ppo.baseline} and ppo.bootstrap_truncated exclude each other, because only a "
                "critic can continue the return of a truncated response"
            )
        if self.ppo.value_warmup_lambda is not None and not self.ppo.value_warmup_iterations:
            raise ValueError("ppo.value_warmup_lambda needs ppo.value_warmup_iterations")
        if self.ppo.value_warmup_iterations >= self.ppo.iterations:
            raise ValueError("ppo.value_warmup_iterations must be less than ppo.iterations")
        if self.reward.max_replicas < self.reward.min_replicas:
            raise ValueError(
                f"reward.max_replicas {self.reward.max_replicas} is below reward.min_replicas "
                f"{self.reward.min_replicas}"
            )
        of_a_pool = ("components", "normalize", "pessimism", "chat_template", "max_length")
        given = [f"reward.{name}" for name in of_a_pool if getattr(self.reward, name)]
        if self.reward.checkpoint is None and given:
            raise ValueError(f"{given[0]} needs reward.checkpoint, because it configures the pool of that checkpoint")
        return self

    def resolved(self) -> PPOJobConfig:
        """Returns these options with the dtypes that auto stands for on the devices of this run."""
        on_gpu = self.run.use_gpu
        policy = self.policy.model_copy(update={"model": self.policy.model.resolved(on_gpu)})
        critic = self.critic.model_copy(update={"model": self.critic.model.resolved(on_gpu)})
        return self.model_copy(update={"policy": policy, "critic": critic})

    def validate_complete(self) -> None:
        """Checks options that have no default.

        Raises:
            ConfigError: A required option is missing; the message names it.
        """
        for option, value in (("policy.model.path", self.policy.model.path), ("prompts.train", self.prompts.train)):
            if not value:
                raise ConfigError(f"{option} is required: give --{option} VALUE, or set it in the --config file")

    @property
    def cpus(self) -> float:
        """Number of CPUs that the job reserves."""
        own_pool = self.reward.min_replicas * self.reward.cpus_per_replica if self.reward.checkpoint else 0.0
        return (
            self.policy.shards * self.policy.cpus_per_shard
            + self.critic.shards * self.critic.cpus_per_shard
            + self.rollout.workers * self.rollout.cpus_per_worker
            + own_pool
        )

    @property
    def updates_per_iteration(self) -> int:
        """Number of the policy's optimizer steps per iteration."""
        return self.ppo.epochs * self.ppo.minibatches

    @property
    def critic_updates(self) -> int:
        """Number of the critic's optimizer steps in the whole run."""
        return self.ppo.iterations * self.updates_per_iteration * self.ppo.critic_epochs
