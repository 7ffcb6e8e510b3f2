"""Generation: samples responses from a policy, with the log-probability of every token, by transformers or vLLM.

The samples depend on the prompts of a call, the weights and a seed, not on earlier calls. The distribution is that of
`rlhf_critic.model.policy.sampling_logits`. Knows nothing about rewards, Ray or its callers.

Shape legend: S responses, V vocabulary, R tokens of a response.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from rlhf_critic.batching.prefix_tree import TokenIds
from rlhf_critic.config.model import BodyConfig
from rlhf_critic.data.encoding import Encoder
from rlhf_critic.errors import CheckpointError, DivergedError, EncodingError
from rlhf_critic.model.hf_config import load_config
from rlhf_critic.model.policy import SUPPRESSED_LOGIT, create_policy, sampling_logits, suppressed_ids
from rlhf_critic.model.weights import persistent_tensors


@dataclass(frozen=True, eq=False)
class Response:
    """A sampled response.

    Attributes:
        ids: Token ids, including the EOS token if the response ended; int64 ``[R]``.
        log_probs: Log-probability with which each token was sampled, fp32 ``[R]``, in nats.
        truncated: Whether the response reached the maximum length without an end.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    truncated: bool


def create_generator(
    model: BodyConfig, tokenizer: PreTrainedTokenizerBase, temperature: float, use_gpu: bool
) -> TransformersGenerator | VllmGenerator:
    """Creates a vLLM generator if vLLM is installed and a GPU is used, otherwise one of transformers."""
    model = model.resolved(use_gpu)
    if use_gpu and importlib.util.find_spec("vllm") is not None:
        return VllmGenerator(model, tokenizer, temperature)
    return TransformersGenerator(model, tokenizer, temperature, torch.device("cuda" if use_gpu else "cpu"))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that end a response: EOS and, if it is another special token, the template's end of a turn."""
    eos = int(tokenizer.eos_token_id)
    try:
        ending = tokenizer(Encoder(tokenizer, max_length=1).ending, add_special_tokens=False)["input_ids"]
    except EncodingError:  # the template rejects the short conversation from which its ending is read
        return [eos]
    added = tokenizer.added_tokens_decoder  # it includes special tokens without a role in the tokenizer
    return sorted({eos, *(token for token in ending[:1] if token in added and added[token].special)})


class TransformersGenerator:
    """Generator that uses transformers' ``generate``."""

    def __init__(
        self, model: BodyConfig, tokenizer: PreTrainedTokenizerBase, temperature: float, device: torch.device
    ) -> None:
        self._policy = create_policy(model, tokenizer).eval().to(device)
        self._device = device
        self._temperature = temperature
        self._pad = int(tokenizer.pad_token_id)
        self._stop = stop_ids(tokenizer)
        # The model's own settings may truncate the distribution. `_SamplingRecorder` alone defines it.
        self._policy.model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=self._pad, eos_token_id=self._stop
        )

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Loads new weights, by their names in the policy's state dict. All must be present, shared ones at least once.

        Raises:
            CheckpointError: Weights are missing or unknown; names them.
        """
        state = self._policy.model.state_dict()
        _require_names(weights, persistent_tensors(self._policy.model).keys(), state.keys())
        with torch.no_grad():
            for name, tensor in weights.items():
                state[name].copy_(tensor)

    @torch.no_grad()
    def generate(self, prompts: Sequence[TokenIds], max_new_tokens: int, seed: int) -> list[Response]:
        """Samples a response to each prompt.

        Raises:
            DivergedError: The policy's output is NaN or infinite.
        """
        longest = max(len(ids) for ids in prompts)
        input_ids = torch.full((len(prompts), longest), self._pad, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):  # padded on the left, so that all responses start at the same column
            input_ids[row, longest - len(ids) :] = torch.tensor(ids)
            attention_mask[row, longest - len(ids) :] = 1
        recorder = _SamplingRecorder(self._temperature, self._policy.suppressed)
        torch.manual_seed(seed)
        generated = self._policy.model.generate(
            input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([recorder]),
        )
        sampled = generated[:, longest:].cpu()
        log_probs = recorder.log_probs(generated).cpu()
        return [self._response(ids, row) for ids, row in zip(sampled.numpy(), log_probs.numpy(), strict=True)]

    def _response(self, ids: NDArray[np.int64], log_probs: NDArray[np.float32]) -> Response:
        ends = np.flatnonzero(np.isin(ids, self._stop))
        length = int(ends[0]) + 1 if len(ends) else len(ids)
        return Response(ids[:length], log_probs[:length].astype(np.float32), truncated=not len(ends))


class _SamplingRecorder(LogitsProcessor):
    """Logits processor that sets the sampling distribution and records the log-probability of each sampled token."""

    def __init__(self, temperature: float, suppressed: list[int]) -> None:
        self._temperature = temperature
        self._suppressed = suppressed
        self._last: Tensor | None = None  # the distribution of the last step
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._collect(input_ids)
        logits_SV = sampling_logits(scores, self._temperature, self._suppressed)
        self._last = logits_SV.log_softmax(-1)
        if self._last[:, 0].isnan().any():  # then every column of the row is NaN
            raise DivergedError(
                "the policy's output is NaN or infinite, so no token can be sampled. Earlier checkpoints are not "
                "affected. Lower --policy.optimizer.learning-rate"
            )
        return logits_SV

    def log_probs(self, generated: Tensor) -> Tensor:
        """Returns the log-probability of every sampled token, fp32 ``[S, R]``."""
        self._collect(generated)
        return torch.cat(self._log_probs, dim=1)

    def _collect(self, input_ids: Tensor) -> None:
        if self._last is not None:
            self._log_probs.append(self._last.gather(1, input_ids[:, -1:]))


def _require_names(weights: Mapping[str, Tensor], needed: Set[str], known: Set[str]) -> None:
    unfit = sorted((needed - weights.keys()) | (weights.keys() - known))
    if unfit:
        named = ", ".join(unfit[:10]) + (f" and {len(unfit) - 10} more" if len(unfit) > 10 else "")
        raise CheckpointError(f"these are not the weights of the policy: missing or unknown: {named}")


class VllmGenerator:
    """Generator that uses vLLM, which computes each prompt once for all responses to it. Needs a GPU."""

    def __init__(self, model: BodyConfig, tokenizer: PreTrainedTokenizerBase, temperature: float) -> None:
        from vllm import LLM

        self._temperature = temperature
        self._stop = stop_ids(tokenizer)
        config = load_config(model.path)
        rows = config.get_text_config().vocab_size  # vLLM has the rows of the base model, the policy a few more
        self._suppressed = {token: SUPPRESSED_LOGIT for token in suppressed_ids(tokenizer, rows) if token < rows}
        self._tokens = len(tokenizer)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        self._shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
        self._needed = persistent_tensors(base).keys()
        overrides = {} if model.num_layers is None else {"hf_overrides": {"num_hidden_layers": model.num_layers}}
        self._llm = LLM(
            model.path, dtype=model.dtype, logprobs_mode="processed_logprobs", enable_prefix_caching=True, **overrides
        )

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Loads new weights. vLLM's models accept the names of Hugging Face checkpoints, and their shapes only.

        Raises:
            CheckpointError: Weights are missing or unknown; names them.
        """
        _require_names(weights, self._needed, self._shapes.keys())  # vLLM keeps its weights where new ones are missing
        tensors = {
            name: tensor if tensor.shape == self._shapes[name] else tensor[: self._shapes[name][0]]
            for name, tensor in weights.items()
        }
        self._llm.reset_prefix_cache()
        self._llm.apply_model(lambda model: model.load_weights(tensors.items()))

    def generate(self, prompts: Sequence[TokenIds], max_new_tokens: int, seed: int) -> list[Response]:
        """Samples a response to each prompt.

        Raises:
            CheckpointError: vLLM sampled an id that is no token.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        settings = [
            SamplingParams(
                temperature=self._temperature,
                max_tokens=max_new_tokens,
                seed=seed + row,
                logprobs=0,
                stop_token_ids=self._stop,
                logit_bias=self._suppressed,
            )
            for row in range(len(prompts))
        ]
        inputs = [TokensPrompt(prompt_token_ids=[int(token) for token in ids]) for ids in prompts]
        outputs = self._llm.generate(inputs, settings, use_tqdm=False)
        return [self._response(output.outputs[0]) for output in outputs]

    def _response(self, output: Any) -> Response:
        log_probs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        ids = np.array(output.token_ids, dtype=np.int64)
        if len(ids) and ids.max() >= self._tokens:
            raise CheckpointError(
                f"vLLM sampled the id {ids.max()}, and the policy's tokenizer has {self._tokens} tokens: this version "
                "of vLLM ignores logit_bias; install another, or uninstall it to sample with transformers"
            )
        return Response(ids, np.array(log_probs, dtype=np.float32), truncated=output.finish_reason == "length")
