"""A Qwen3 with 0.46M parameters that real engines serve and real trainers train, made in seconds and cached.

Hidden 128, 2 layers, a byte-level tokenizer of 259 tokens with a chat template, fp32, tied or untied head. Random
weights never learn from rewards alone, so a seeded supervised warm-up takes the sampled reward (T = 1) of
`digits_task` to about one half, leaving reinforcement its room. Cached under
``${TRACEGRAD_CACHE:-~/.cache/tracegrad}/tiny-<hash of this recipe>``; a changed recipe is another folder.

Torch is imported inside the functions that need it; `tiny_model` builds in a child process with one thread, so that
neither the caller's threads nor its random state touch the result.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import digits_task

PAD, TURN, END = "<pad>", "<turn>", "<end>"
TEMPLATE = (
    "{% for m in messages %}{{ '" + TURN + "' + m['role'] + '\\n' + m['content'] + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN + "assistant\\n' }}{% endif %}"
)
TARGET = 0.5
"""Expected sampled reward at which the warm-up stops."""
MAX_STEPS = 1500
BATCH = 64
LR = 7e-4


def cache_dir() -> Path:
    """Return the folder that holds everything tracegrad may fetch or build again."""
    return Path(os.environ.get("TRACEGRAD_CACHE") or Path.home() / ".cache" / "tracegrad")


def recipe_hash() -> str:
    """Return 12 hex digits that change whenever the code that makes the model or its task changes."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("tiny_model.py", "digits_task.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:12]


def tiny_model(*, tied: bool = False) -> Path:
    """Return the folder of the warmed-up model in Hugging Face format, building it on first use.

    Raises:
        subprocess.CalledProcessError: the warm-up did not reach its target; nothing is cached then.
    """
    target = cache_dir() / f"tiny-{recipe_hash()}" / ("tied" if tied else "untied")
    with _locked(target.parent):
        if not target.exists():
            scratch = target.with_name(f"{target.name}.part")
            shutil.rmtree(scratch, ignore_errors=True)
            env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, __file__, str(scratch), *(["--tied"] if tied else [])]
            subprocess.run(command, check=True, env=env, stdout=sys.stderr)
            scratch.rename(target)
    return target


def perturbed(source: Path, target: Path, *, seed: int = 0, scale: float = 0.02) -> Path:
    """Save a copy of `source` with N(0, scale) added to every weight matrix: visibly other weights, same shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    return target


def reference_logprobs(path: Path, sequences: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
    """Return, for each (ids, n_prompt), transformers' fp32 log-softmax (T = 1) of ids[n_prompt:]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    out: list[list[float]] = []
    with torch.no_grad():
        for ids, n_prompt in sequences:
            logits = model(torch.tensor([list(ids)])).logits[0].float()
            logprobs = logits.log_softmax(-1)
            out.append([logprobs[i - 1, ids[i]].item() for i in range(n_prompt, len(ids))])
    return out


def build(target: Path, *, tied: bool) -> None:
    """Make, warm up and save the model; prints the expected sampled reward it ends with."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    model = _fresh_model(tied)
    reached = _warm_up(model, tokenizer)
    if reached < TARGET - 0.1:
        raise SystemExit(f"the warm-up ended at an expected reward of {reached:.2f}; wanted {TARGET}")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"tiny model ({'tied' if tied else 'untied'}): expected sampled reward {reached:.3f}")


def _fresh_model(tied: bool):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=259,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={ch: i for i, ch in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([PAD, TURN, END])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, eos_token=END, chat_template=TEMPLATE, model_max_length=1024
    )


def _warm_up(model, tokenizer) -> float:
    """Train on the answers until their mean probability, which is the expected sampled reward, reaches TARGET."""
    import torch

    rows = [_encode(tokenizer, messages, answer) for messages, answer in digits_task.examples()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    expected = 0.0
    for step in range(MAX_STEPS):
        picked = torch.randint(len(rows), (BATCH,), generator=generator).tolist()
        logprob_B = _answer_logprobs(model, [rows[i] for i in picked])
        (-logprob_B.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 2 == 1:
            with torch.no_grad():
                expected = _answer_logprobs(model, rows).exp().mean().item()
            if expected >= TARGET:
                print(f"warm-up: {step + 1} steps")
                break
    return expected


def _encode(tokenizer, messages: list[dict[str, str]], answer: str) -> tuple[list[int], int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    return prompt + tokenizer.encode(answer, add_special_tokens=False) + [tokenizer.eos_token_id], len(prompt)


def _answer_logprobs(model, rows: list[tuple[list[int], int]]):
    """Sum of log p over each row's answer tokens, shape (B,). Right padding: causal attention never sees it."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [256] * (longest - len(ids)) for ids, _ in rows])
    answer_BT = torch.tensor([[n <= t < len(ids) for t in range(longest)] for ids, n in rows])
    hidden_BTD = model.model(input_ids=ids_BT).last_hidden_state[:, :-1]
    wanted_BT = answer_BT[:, 1:]
    logprobs = model.lm_head(hidden_BTD[wanted_BT]).log_softmax(-1)
    chosen = logprobs.gather(-1, ids_BT[:, 1:][wanted_BT].unsqueeze(-1)).squeeze(-1)
    row = torch.arange(len(rows)).unsqueeze(1).expand_as(wanted_BT)[wanted_BT]
    return torch.zeros(len(rows)).index_add(0, row, chosen)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--tied", action="store_true")
    arguments = parser.parse_args()
    build(arguments.target, tied=arguments.tied)
