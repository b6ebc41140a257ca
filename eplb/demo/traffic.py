"""Skewed prompts whose topic shifts, and the completions of a server as token ids."""

from __future__ import annotations

import json
import random
import urllib.request

from .checkpoint import TinyMoE
from .server import open_local

Tokens = list[list[int]]


def batches(size: TinyMoE, per_topic: int, prompts: int = 8, length: int = 12) -> list[Tokens]:
    """`per_topic` batches of each topic in turn, each of `prompts` prompts of `length` tokens."""
    made = []
    for number in range(size.topics * per_topic):
        dice = random.Random(number)
        tokens = size.topic_tokens(number // per_topic)
        made.append([[dice.choice(tokens) for _ in range(length)] for _ in range(prompts)])
    return made


def complete(url: str, model: str, prompts: Tokens, tokens: int, timeout: float = 120) -> Tokens:
    """Greedy completions of exactly `tokens` tokens, by HTTP; one list of ids per prompt."""
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with open_local(request, timeout=timeout) as answer:
        choices = json.load(answer)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda c: c["index"])]


def differences(first: list[Tokens], second: list[Tokens]) -> tuple[int, int]:
    """(tokens that differ, tokens compared) of two lists of batches of the same lengths."""
    differing = compared = 0
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            compared += max(len(a), len(b))
            differing += sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    return differing, compared
