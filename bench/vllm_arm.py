"""vLLM as an arm of bench/engine.py: run by the Python of an environment that has vLLM, and imports nothing of ours.

    PYTHON -P bench/vllm_arm.py --model FOLDER --dtype float32 --max-batch 32

Speaks the line protocol of bench/engine_arm.py. The engine runs in this very process (no HTTP, no second process), as
its fastest offline use does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--kv-gib", default="1")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", arguments.kv_gib)
    # stdout is the protocol's; what vLLM prints goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        arguments.model,
        dtype=arguments.dtype,
        max_model_len=arguments.max_context,
        max_num_seqs=arguments.max_batch,
        max_num_batched_tokens=arguments.max_context,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for serial, line in enumerate(sys.stdin):
        request = json.loads(line)
        generator = torch.Generator().manual_seed(serial)
        shape = (request["prompts"], request["prompt_tokens"])
        ids = torch.randint(1000, 30_000, shape, generator=generator).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)


if __name__ == "__main__":
    main()
