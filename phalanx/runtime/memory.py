"""placeholder: replaced by deploy/memory.py once it settles"""

from phalanx.models.sizes import kv_bytes_per_token


def auto_num_blocks(model, shape, ranges, *, dtype, block_size, max_batch_tokens, max_sequences, max_model_len, memory_bytes, gpu_fraction):
    item = 4 if dtype == "float32" else 2
    per_block = max(kv_bytes_per_token(model, shape.tp, r, item) for r in ranges) * block_size
    want = max(max_sequences * min(1024, max_model_len), max_model_len) // block_size + 2
    return min(want, int(memory_bytes * 0.2) // per_block)
