"""The operations of dsv3: one file each, with the torch reference that defines it.

Independent of models, ranks and requests. Shape letters: see `dsv3/__init__.py`.
"""

from dsv3_kernels._cast import as_dtype
from dsv3_kernels._gpu import next_power_of_2, row_bucket, row_buckets
from dsv3_kernels._triton import overlap_launches
from dsv3_kernels.attention.absorb_query import absorb_query
from dsv3_kernels.attention.expand_values import expand_values
from dsv3_kernels.attention.keys_values import KeysValues
from dsv3_kernels.attention.kv_fp8 import pack_latent, packed_bytes, scale_bytes, unpack_latent
from dsv3_kernels.attention.merge_lse import merge_lse
from dsv3_kernels.attention.mha_decode import mha_decode
from dsv3_kernels.attention.mla_decode import mla_decode, mla_decode_values
from dsv3_kernels.attention.mla_decode_parts import mla_decode_parts
from dsv3_kernels.attention.mla_prefill import mla_prefill, mla_prefill_packed
from dsv3_kernels.attention.norm_and_cache import norm_and_cache
from dsv3_kernels.attention.paging import Keys, PageTables, Paging
from dsv3_kernels.attention.parts import PartialOutputs, empty_parts, open_parts
from dsv3_kernels.attention.rope import Rotation, apply_rope, rotate
from dsv3_kernels.attention.rope_and_cache import EntryWrite, latent_entries, rope_and_cache
from dsv3_kernels.attention.write_slots import StoredRows, write_slots
from dsv3_kernels.gemm._split_k import make_locks
from dsv3_kernels.gemm.act_quant import Quantized, act_quant
from dsv3_kernels.gemm.bf16_gemm import linear
from dsv3_kernels.gemm.blocked import blocked_linear, has_blocked_product, to_blocked
from dsv3_kernels.gemm.fp8_gemm import fp8_gemm
from dsv3_kernels.gemm.int8_gemm import int8_gemm
from dsv3_kernels.gemm.int8_quant import int8_quant
from dsv3_kernels.gemm.int_gemm import int_gemm, int_linear, takes_int8_rows
from dsv3_kernels.gemm.integers import Integers, int_dequant
from dsv3_kernels.gemm.packed import PackedIntegers, cpu_product, has_cpu_product, pack_for_cpu
from dsv3_kernels.gemm.weight_dequant import weight_dequant
from dsv3_kernels.index.index_cache import IndexCache, index_key_bytes
from dsv3_kernels.index.index_key import IndexWrite, write_index_keys
from dsv3_kernels.index.index_query import index_queries
from dsv3_kernels.index.index_scores import index_scores
from dsv3_kernels.index.top_k import candidate_positions, select_slots, top_candidates
from dsv3_kernels.moe.grouped_down import grouped_down
from dsv3_kernels.moe.grouped_gate_up import grouped_gate_up
from dsv3_kernels.moe.grouped_gemm import Stack
from dsv3_kernels.moe.moe import experts
from dsv3_kernels.moe.permute import Groups, LocalExperts, permute, unpermute
from dsv3_kernels.moe.route import RouterInput, Routing, route
from dsv3_kernels.moe.route_and_permute import route_and_permute
from dsv3_kernels.moe.router_logits import router_logits
from dsv3_kernels.ops.rmsnorm import NormedSum, add_rmsnorm, rmsnorm
from dsv3_kernels.ops.sample import RowParams, sample
from dsv3_kernels.ops.silu_mul import silu_mul, silu_mul_quant
from dsv3_kernels.ops.sum_norm import Peers, fits_sum_norm, shared_bytes, sum_norm

__all__ = [
    "EntryWrite",
    "Groups",
    "IndexCache",
    "IndexWrite",
    "Integers",
    "Keys",
    "KeysValues",
    "LocalExperts",
    "NormedSum",
    "PackedIntegers",
    "PageTables",
    "Paging",
    "PartialOutputs",
    "Peers",
    "Quantized",
    "Rotation",
    "RouterInput",
    "Routing",
    "RowParams",
    "Stack",
    "StoredRows",
    "absorb_query",
    "act_quant",
    "add_rmsnorm",
    "apply_rope",
    "as_dtype",
    "blocked_linear",
    "candidate_positions",
    "cpu_product",
    "empty_parts",
    "expand_values",
    "experts",
    "fits_sum_norm",
    "fp8_gemm",
    "grouped_down",
    "grouped_gate_up",
    "has_blocked_product",
    "has_cpu_product",
    "index_key_bytes",
    "index_queries",
    "index_scores",
    "int8_gemm",
    "int8_quant",
    "int_dequant",
    "int_gemm",
    "int_linear",
    "latent_entries",
    "linear",
    "make_locks",
    "merge_lse",
    "mha_decode",
    "mla_decode",
    "mla_decode_parts",
    "mla_decode_values",
    "mla_prefill",
    "mla_prefill_packed",
    "next_power_of_2",
    "norm_and_cache",
    "open_parts",
    "overlap_launches",
    "pack_for_cpu",
    "pack_latent",
    "packed_bytes",
    "permute",
    "rmsnorm",
    "rope_and_cache",
    "rotate",
    "route",
    "route_and_permute",
    "router_logits",
    "row_bucket",
    "row_buckets",
    "sample",
    "scale_bytes",
    "select_slots",
    "shared_bytes",
    "silu_mul",
    "silu_mul_quant",
    "sum_norm",
    "takes_int8_rows",
    "to_blocked",
    "top_candidates",
    "unpack_latent",
    "unpermute",
    "weight_dequant",
    "write_index_keys",
    "write_slots",
]
