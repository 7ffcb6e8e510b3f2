"""The options of PPO: the policy, the critic, prompts, rollouts, rewards and the algorithm. Knows nothing of Ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from rlhf_critic.config.base import (
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PathOrUri,
    RunName,
    Section,
    Sources,
)
from rlhf_critic.config.model import BodyConfig, ChatTemplate, ConstantSchedule, ModelConfig, OptimizerConfig
from rlhf_critic.errors import ConfigError


class PolicyOptimizerConfig(ConstantSchedule, OptimizerConfig):
    """AdamW for the policy."""

    learning_rate: PositiveFloat = Field(1e-6, description="Peak learning rate of AdamW.")


class CriticOptimizerConfig(ConstantSchedule, OptimizerConfig):
    """AdamW for the critic."""


class PolicyConfig(Section):
    """The policy, which is fitted, and its reference, which stays."""

    model: BodyConfig = BodyConfig()
    optimizer: PolicyOptimizerConfig = PolicyOptimizerConfig()
    chat_template: ChatTemplate = Field(
        "auto", description="How it reads prompts: 'auto' (the tokenizer's own, else plain), 'plain' or a Jinja file."
    )
    shards: PositiveInt = Field(1, description="Actors that it is sharded over.")
    cpus_per_shard: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for each; torch threads if no GPU.")


class CriticConfig(Section):
    """The online critic, which is fitted to returns."""

    model: ModelConfig = Field(
        ModelConfig(), description="path: a critic directory, or empty: the policy's base model with a head of zeros."
    )
    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    shards: PositiveInt = Field(1, description="Actors that it is sharded over.")
    cpus_per_shard: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for each; torch threads if no GPU.")
    offload: bool = Field(
        False,
        description="Take its state out of the devices while rollouts are made, for those who share them. Of this job "
        "that is nobody with use_gpu, where each actor has a GPU of its own.",
    )


class PromptConfig(Section):
    """What the policy is to answer."""

    train: Sources = Field(
        (), description="Sources of prompts: files, directories that datasets saved, or hub ids; rows have a prompt."
    )
    validation: Sources = Field((), description="Sources of held-out prompts; none: see validation_fraction.")
    validation_fraction: Decay = Field(0.0, description="Instead: hold out this fraction of the prompts.")
    fields: dict[str, str] = Field({}, description="Another name of the field: --prompts.fields prompt instruction.")
    max_tokens: PositiveInt = Field(256, description="Most tokens of a prompt; longer ones lose their beginning.")


class RolloutConfig(Section):
    """How rollouts are made."""

    workers: PositiveInt = Field(1, description="Actors that draw responses, each with the whole policy.")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that Ray reserves for each; torch threads if no GPU.")
    prompts_per_iteration: PositiveInt = Field(32, description="Prompts of an iteration.")
    samples_per_prompt: PositiveInt = Field(
        1, description="Responses to each; they share the prompt's computation in critic and policy."
    )
    prompts_per_task: PositiveInt = Field(
        4,
        description="Prompts that a worker takes at once; with several tasks it draws one while the last is judged. "
        "What is drawn depends on it, but not on the workers.",
    )
    max_new_tokens: PositiveInt = Field(64, description="Most tokens of a response; longer ones are cut.")
    temperature: PositiveFloat = Field(1.0, description="With which tokens are drawn.")
    timeout_s: PositiveFloat = Field(3600.0, description="Seconds to wait for an iteration's rollouts.")


class RewardConfig(Section):
    """What judges responses."""

    app: str = Field("scorers", description="The pool of scorers, as python -m jobs.serve --app names it.")
    checkpoint: PathOrUri | None = Field(
        None, description="A critic directory for a pool that the job runs itself and ends; None uses a running one."
    )
    components: PathOrUri | None = Field(None, description="Of that pool: see --components of jobs.serve.")
    normalize: bool = Field(False, description="Of that pool: see --normalize of jobs.serve.")
    min_replicas: PositiveInt = Field(1, description="Of that pool: fewest replicas.")
    max_replicas: PositiveInt = Field(1, description="Of that pool: most replicas.")
    cpus_per_replica: PositiveFloat = Field(1.0, description="Of that pool: CPUs of each.")
    deadline_s: PositiveFloat = Field(600.0, description="Seconds to wait for rewards, retries included.")
    missing_eos_penalty: NonNegativeFloat = Field(
        0.0, description="Taken off the reward of a response that was cut at rollout.max_new_tokens."
    )
    scaling: Literal["none", "running"] = Field(
        "none", description="running divides rewards by the standard deviation of all rewards so far."
    )
    clip: PositiveFloat | None = Field(None, description="Rewards are brought into [-clip, clip], after scaling.")
    allow_mixed_versions: bool = Field(
        False,
        description="Whether an iteration may hold rewards of two versions while a new reward model is published; if "
        "not, such an iteration is scored again by one.",
    )


class AlgorithmConfig(Section):
    """PPO itself."""

    iterations: PositiveInt = Field(100, description="Rounds of rollouts and updates.")
    epochs: PositiveInt = Field(1, description="How often an iteration's rollouts are gone through.")
    minibatches: PositiveInt = Field(1, description="Optimizer steps of an epoch.")
    gamma: Fraction = Field(1.0, description="Discount of a token.")
    gae_lambda: Fraction = Field(0.95, description="GAE: 0 trusts the critic's next value, 1 the rewards that came.")
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="How far the policy's ratio may move.")
    value_clip: PositiveFloat | None = Field(0.2, description="How far a value may move; None does not clip.")
    kl_coefficient: NonNegativeFloat = Field(0.05, description="What a nat of KL from the reference costs.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="Schulman's estimators of the KL divergence.")
    entropy_coefficient: NonNegativeFloat = Field(0.0, description="What a nat of entropy is worth.")
    whiten_advantages: bool = Field(True, description="Advantages get mean 0 and variance 1 over the iteration.")
    bootstrap_truncated: bool = Field(
        False,
        description="A response that was cut is not judged: its return goes on with the critic's value. If not, it is "
        "judged as it stands, and ends there.",
    )
    value_warmup_iterations: NonNegativeInt = Field(
        0, description="First iterations in which the critic is fitted and the policy stays."
    )
    max_kl: PositiveFloat = Field(
        50.0, description="The run stops where the mean KL of a response from the reference exceeds this, in nats."
    )
    seed: NonNegativeInt = Field(0, description="Random seed for prompt order, sampled responses and minibatches.")

    @model_validator(mode="before")
    @classmethod
    def _accept_old_name(cls, options: Any) -> Any:
        """Reads ``lam``, the name of ``gae_lambda`` in files of earlier versions."""
        if isinstance(options, dict) and "lam" in options:
            options = {("gae_lambda" if name == "lam" else name): value for name, value in options.items()}
        return options


class PPORunConfig(Section):
    """Where and on what the job runs."""

    name: RunName = Field("ppo", description="Name of the run; its directory is STORAGE_PATH/NAME.")
    storage_path: PathOrUri = Field("runs", description="Local path; with several nodes, one that all of them share.")
    use_gpu: bool = Field(False, description="One GPU for each shard, worker and replica (not yet run on a GPU).")
    checkpoint_every: NonNegativeInt = Field(10, description="Iterations between checkpoints; 0: at the end only.")
    keep_checkpoints: PositiveInt = Field(2, description="How many checkpoints the run's directory keeps.")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project that also receives the history; needs the wandb package."
    )
    history_uri: PathOrUri | None = Field(
        None, description="URI (s3://, gs://) or path that the history is also copied to, as NAME/history."
    )
    evaluate_every: NonNegativeInt = Field(
        0, description="Iterations between evaluations on held-out prompts; 0: before the first and after the last."
    )
    max_failures: NonNegativeInt = Field(
        3, description="How often a lost critic or policy is restored from the last checkpoint before the job gives up."
    )
    start_timeout_s: PositiveFloat = Field(
        1800.0, description="Seconds to wait for actors to be placed and started (an autoscaler may have to add nodes)."
    )

    @field_validator("storage_path")
    @classmethod
    def _a_path(cls, path: str) -> str:
        if "://" in path:
            raise ValueError("must be a path: shards write their checkpoints there themselves; mount the store")
        return path


class PPOJobConfig(Section):
    """Fits a policy by PPO: workers draw responses, scorers judge them, a sharded critic gives values and learns.

    For example: python -m jobs.ppo --policy.model.path MODEL --prompts.train prompts.jsonl --reward.checkpoint CRITIC
    """

    policy: PolicyConfig = PolicyConfig()
    critic: CriticConfig = CriticConfig()
    prompts: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    ppo: AlgorithmConfig = AlgorithmConfig()
    run: PPORunConfig = Field(default_factory=PPORunConfig)
    resume: bool = Field(False, description="Continue the run of this name from its last checkpoint.")

    @model_validator(mode="after")
    def _consistent(self) -> PPOJobConfig:
        if self.prompts.validation and self.prompts.validation_fraction:
            raise ValueError("prompts.validation and prompts.validation_fraction: give one or the other")
        if self.ppo.minibatches > self.rollout.prompts_per_iteration:
            raise ValueError("ppo.minibatches: there are fewer prompts in an iteration; rollouts of one stay together")
        if self.ppo.bootstrap_truncated and self.reward.missing_eos_penalty:
            raise ValueError(
                "reward.missing_eos_penalty: with ppo.bootstrap_truncated a response that was cut is not judged, and "
                "has no reward to take it off"
            )
        if self.ppo.value_warmup_iterations >= self.ppo.iterations:
            raise ValueError("ppo.value_warmup_iterations: must leave the policy at least one of ppo.iterations")
        if self.reward.max_replicas < self.reward.min_replicas:
            raise ValueError(
                f"reward.max_replicas {self.reward.max_replicas} is below reward.min_replicas "
                f"{self.reward.min_replicas}"
            )
        if self.reward.checkpoint is None and (self.reward.components or self.reward.normalize):
            raise ValueError(
                "reward.components and reward.normalize are of a pool that the job runs: reward.checkpoint"
            )
        return self

    def validate_complete(self) -> None:
        """Checks what has no default.

        Raises:
            ConfigError: Names the option that is missing.
        """
        required: tuple[tuple[str, object], ...] = (
            ("policy.model.path", self.policy.model.path),
            ("prompts.train", self.prompts.train),
        )
        for option, value in required:
            if not value:
                flag = option.replace("_", "-")
                raise ConfigError(f"{option} is required: give --{flag} VALUE, or set it in the --config file")

    @property
    def cpus(self) -> float:
        """CPUs that the job reserves."""
        own_pool = self.reward.min_replicas * self.reward.cpus_per_replica if self.reward.checkpoint else 0.0
        return (
            self.policy.shards * self.policy.cpus_per_shard
            + self.critic.shards * self.critic.cpus_per_shard
            + self.rollout.workers * self.rollout.cpus_per_worker
            + own_pool
        )

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps of an iteration."""
        return self.ppo.epochs * self.ppo.minibatches
