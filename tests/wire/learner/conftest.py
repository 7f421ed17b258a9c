"""A small model, learners on it and stores with recorded runs: fixtures of `learners`."""

from learners import configure, learner, llama, recorded_store, store, tied_llama

__all__ = ["configure", "learner", "llama", "recorded_store", "store", "tied_llama"]
