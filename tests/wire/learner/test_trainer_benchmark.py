"""The benchmark's driver of our learner runs as a process and counts what the shapes say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has all the ids of the benchmark's traces."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **shape)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("system", "computed"), [("packed", 888), ("per_call", 5368), ("packed_critic", 888)])
def test_the_driver_times_an_update_and_says_what_it_computed(
    model: Path, tmp_path: Path, system: str, computed: int
) -> None:
    asked = {"model": str(model), "kind": "group_of_8", "system": system, "threads": 1}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "trainer_driver.py", tmp_path, tmp_path / "asked.json"],
        input="round0\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    about, played = map(json.loads, done.stdout.splitlines())
    assert (about["trained_tokens"], about["computed_tokens"]) == (256, computed)
    assert played["seconds_per_update"] > 0
    assert played["peak_rss_mb"] > 0
