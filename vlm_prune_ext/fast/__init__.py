"""The CUDA-graph wing: the engine's pruned prefill and decoding, recorded once and replayed."""
