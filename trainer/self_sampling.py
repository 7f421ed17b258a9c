"""Sample a few sequences from the trainer's own weights: a publish probe where no recorded traces are at hand.

Used at start-up (canary, first publish, a publish that a kill interrupted). Prompts are a few seeded random tokens:
what follows is the model's own text at a low temperature, because rounding in bfloat16 disturbs likely tokens least.
Called by the learner.
"""

import torch
from torch import Tensor

from tracegrad.trainer.policy import Policy

PROMPT_TOKENS = 4
SEQUENCE_TOKENS = 32
TEMPERATURE = 0.5


@torch.no_grad()
def self_sample(policy: Policy, n_tokens: int, *, seed: int) -> list[tuple[int, ...]]:
    """Return sequences of 4 random and 32 sampled tokens, at least `n_tokens` sampled in all. Deterministic."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, -(-n_tokens // SEQUENCE_TOKENS))
    vocabulary = policy.lm.config.vocab_size
    ids_BT = torch.randint(vocabulary, (rows, PROMPT_TOKENS), generator=generator)
    cache, latest_BT = None, ids_BT.to(policy.device)
    for _ in range(SEQUENCE_TOKENS):
        outputs = policy.lm(input_ids=latest_BT, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        drawn_BT = _draw(outputs.logits[:, -1].cpu(), generator)
        ids_BT, latest_BT = torch.cat([ids_BT, drawn_BT], dim=1), drawn_BT.to(policy.device)
    return [tuple(row) for row in ids_BT.tolist()]


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(torch.softmax(logits_BV.float() / TEMPERATURE, dim=-1), 1, generator=generator)
