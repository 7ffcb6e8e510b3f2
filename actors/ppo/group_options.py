"""Options of the policy's and the critic's groups, made from those of a PPO job."""

from __future__ import annotations

from actors.ppo.critic_group import CriticOptions
from actors.ppo.policy_group import PolicyOptions
from rlhf_critic.config.model import EncodingConfig
from rlhf_critic.config.ppo import PPOJobConfig
from rlhf_critic.config.train import TrainConfig
from rlhf_critic.data.encoding import validate_same_tokens
from rlhf_critic.errors import ConfigError


def policy_options(config: PPOJobConfig) -> PolicyOptions:
    """Returns the options of a run's policy."""
    return PolicyOptions(
        config.policy.model,
        config.policy.optimizer,
        config.policy.chat_template,
        max(1, config.ppo.iterations - config.ppo.value_warmup_iterations) * config.updates_per_iteration,
        config.ppo.seed,
        config.rollout.temperature,
        config.rollout.environment,
        config.rollout.max_turns,
    )


def critic_options(config: PPOJobConfig) -> CriticOptions:
    """Returns the options of a run's critic, after checking that it can read the policy's tokens.

    Raises:
        EncodingError: A token id of the policy means something else to the critic.
        ConfigError: The critic reads fewer tokens than a rollout may have.
        CheckpointError: The critic's directory is damaged.
    """
    length = config.prompts.max_tokens + config.rollout.max_new_tokens
    model = config.critic.model
    if not model.path:
        model = model.model_copy(update={"path": config.policy.model.path})
    critic = CriticOptions(
        model,
        TrainConfig(**config.critic.optimizer.model_dump(), seed=config.ppo.seed),
        EncodingConfig(chat_template=config.policy.chat_template, max_length=length),
        config.critic_updates,
    )
    encoder = critic.encoder()
    validate_same_tokens(policy_options(config).tokenizer(), encoder.tokenizer)
    if length > encoder.max_length:
        raise ConfigError(
            f"prompts.max_tokens and rollout.max_new_tokens make up to {length} tokens, but the critic {model.path} "
            f"reads {encoder.max_length}: lower them, or train a critic with a longer encoding.max_length"
        )
    return critic
