"""dsv3: a distributed runtime for DeepSeek-V3-family models in plain PyTorch.

Shape letters used as tensor suffixes throughout (`q_THN` is [T, H, N]; the same letter whether
the dimension is sharded or not):

    B sequences            T tokens of the step (packed)   S cached positions
    D hidden               H heads                         A q_lora_rank
    C kv_lora_rank         N qk_nope_head_dim              R qk_rope_head_dim
    V v_head_dim           E experts                       K experts per token
    F expert hidden        M dispatched rows               G pages
    P positions in a page  W vocabulary                    X a cache entry (C + R)

A lower-case letter counts the 128-wide quantization blocks of that dimension: `w_FD` has
`scale_fd`.
"""

__version__ = "0.1.0"
