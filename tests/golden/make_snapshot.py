"""Writes tests/data/golden_smollm2.jsonl: what transformers answers, greedily and in float32, from the same GGUF file.

python tests/golden/make_snapshot.py        some 10 minutes on one core
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from engine.model_source import ModelFiles, cached_default
from engine.tokenizer import load
from tests.golden import snapshot
from tests.golden.snapshot import NEW_TOKENS, Golden

Oracle = Callable[[list[int]], tuple[list[int], list[float]]]


def load_oracle(path: Path) -> Oracle:
    """transformers' greedy answer to a prompt: tokens, and at each the distance of the two best logits.

    The end token is ruled out for all 48 tokens, so that every prompt is compared over the same length.
    """
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()

    def answer(token_ids: list[int]) -> tuple[list[int], list[float]]:
        prompt = torch.tensor([token_ids])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = [scores[0].topk(2).values for scores in output.scores]
        return output.sequences[0, len(token_ids) :].tolist(), [round(float(a - b), 5) for a, b in best]

    return answer


def main() -> None:
    path = cached_default()
    if path is None:
        raise SystemExit("the default model is not in the cache; make test fetches it")
    torch.set_num_threads(1)
    oracle = load_oracle(path)
    records = []
    for prompt_id, source, token_ids in snapshot.prompts(load(ModelFiles("gguf", path))):
        records.append(Golden(prompt_id, source, token_ids, *oracle(token_ids)))
        print(len(records), prompt_id, len(token_ids), min(records[-1].gaps), flush=True)
    snapshot.write(records)


if __name__ == "__main__":
    main()
